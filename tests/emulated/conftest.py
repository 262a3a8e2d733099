import shutil

import pytest
from emulated.emulator import Emulator, build


@pytest.fixture(scope="session")
def compiler():
    found = shutil.which("g++")
    if found is None:
        pytest.skip("g++ is not installed")
    return found


@pytest.fixture(scope="session")
def built(tmp_path_factory, compiler):
    return Emulator(build(compiler, tmp_path_factory.mktemp("emulator")))


@pytest.fixture
def emulated(built):
    built.configure()
    return built
