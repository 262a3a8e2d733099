import shutil

import pytest
from cuda.emulator import Emulator, build


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    return Emulator(build(tmp_path_factory.mktemp("emulator")))


@pytest.fixture
def emulated(built):
    built.configure()
    return built
