import pytest


@pytest.fixture(scope="session")
def trl_utils():
    """The module of TRL that holds the originals."""
    return pytest.importorskip(
        "trl.trainer.utils", reason="TRL is not installed: `make test` does it, from Python 3.11 on"
    )


@pytest.fixture(scope="session")
def torchrl_value():
    """The package of TorchRL that holds the originals."""
    return pytest.importorskip(
        "torchrl.objectives.value", reason="torchrl is not installed: `make test` does it"
    )
