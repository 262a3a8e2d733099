"""Functions of os and io for tests to replace."""

import pathlib


def replace(module, name, function, setattr=setattr):
    """module.<name>, also where pathlib of Python 3.10 took it over when it was imported."""
    taken = getattr(pathlib, "_NormalAccessor", None)
    if taken is not None and vars(taken).get(name) is getattr(module, name):
        setattr(taken, name, staticmethod(function))
    setattr(module, name, function)
