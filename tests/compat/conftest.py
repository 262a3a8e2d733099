import pytest


@pytest.fixture(scope="session")
def trl_utils():
    """The module of TRL that holds the originals."""
    return pytest.importorskip(
        "trl.trainer.utils", reason="TRL is not installed: `make peers` or `make test-all` does it"
    )
