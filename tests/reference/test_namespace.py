import inspect

from fastrl import reference


def test_one_file_per_op_and_nothing_else_is_public():
    assert reference.__all__ == sorted(reference.__all__)
    for name in reference.__all__:
        op = inspect.unwrap(getattr(reference, name))
        assert op.__module__ == f"fastrl.reference.{name}"


def test_every_argument_is_documented():
    for name in reference.__all__:
        op = getattr(reference, name)
        for argument in inspect.signature(op).parameters:
            assert argument in op.__doc__.split("Args:")[1], f"{name} {argument}"
