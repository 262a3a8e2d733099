import shutil

import pytest
from cuda.emulator import Kernels, build


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    return build(tmp_path_factory.mktemp("emulator"))


@pytest.fixture
def kernels(library):
    return Kernels(library)
