"""Functions of os for tests to replace."""

import os
import pathlib


def replace(name, function, setattr=setattr):
    """os.<name>, and what pathlib of Python 3.10 took it for when it was imported."""
    setattr(os, name, function)
    taken = getattr(pathlib, "_NormalAccessor", None)
    if hasattr(taken, name):
        setattr(taken, name, staticmethod(function))
