"""What setup.py asks the compilers for, on machines that lay CUDA out in different ways."""

import os
import runpy
from distutils.core import run_setup  # setuptools brings it
from pathlib import Path

import pytest
import setuptools
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[1]


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """nvcc is on the path as bin/nvcc, a link into toolkit/, and torch takes it for a toolkit's."""
    for folder in ("bin", "toolkit/bin", "toolkit/include", "toolkit/lib64"):
        (tmp_path / folder).mkdir(parents=True)
    nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
    nvcc.touch(mode=0o755)
    (tmp_path / "toolkit" / "include" / "cuda_runtime.h").touch()
    (tmp_path / "bin" / "nvcc").symlink_to(nvcc)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    monkeypatch.delenv("FASTRL_BUILD", raising=False)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    monkeypatch.chdir(ROOT)
    return tmp_path


@pytest.fixture
def extension(monkeypatch):
    """The extension that setup.py would build; nothing is built."""

    def made():
        found = {}
        monkeypatch.setattr(setuptools, "setup", lambda **arguments: found.update(arguments))
        runpy.run_path("setup.py")
        return found["ext_modules"][0]

    return made


def test_the_toolkit_is_where_its_headers_are(machine, extension):
    (machine / "toolkit" / "lib64" / "libcudart.so").touch()
    built = extension()
    toolkit = machine / "toolkit"
    assert cpp_extension.CUDA_HOME == str(toolkit)  # whose nvcc is run
    assert str(toolkit / "include") in built.include_dirs
    assert str(toolkit / "lib64") in vars(built)["library_dirs"]
    assert "cudart" in built.libraries and "csrc/cuda/gae.cu" in built.sources


def test_without_a_libcudart_to_link_with_that_of_torch_serves(machine, extension):
    built = extension()
    assert "cudart" not in built.libraries and "torch_cuda" in built.libraries


def test_the_cuda_sources_may_be_left_out(machine, extension, monkeypatch):
    monkeypatch.setenv("FASTRL_BUILD", "cpu")
    built = extension()
    assert not [source for source in built.sources if source.endswith(".cu")]
    assert "torch_cuda" not in built.libraries and not built.define_macros


@pytest.mark.parametrize(
    "gpus, cuda, asked, built",
    [
        (0, "13.0", "", "8.0;9.0;10.0+PTX"),
        (0, "12.6", "", "8.0;9.0+PTX"),  # its nvcc knows no Blackwell
        (0, "13.0", "9.0a", "9.0a"),
        (1, "13.0", "", ""),  # torch's own choice
    ],
)
def test_without_a_gpu_in_sight_it_builds_for_several(
    machine, extension, monkeypatch, gpus, cuda, asked, built
):
    """torch breaks down there: IndexError, and the package cannot be installed."""
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    extension()
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == built


def test_an_archive_of_the_sources_has_all_that_a_build_needs(tmp_path, monkeypatch):
    """Those for a GPU too, whichever machine it was made on: a build without them is one for CPUs
    that says nothing."""
    monkeypatch.chdir(ROOT)
    run_setup("setup.py", ["--quiet", "egg_info", "--egg-base", str(tmp_path)])
    listed = (tmp_path / "fastrl.egg-info" / "SOURCES.txt").read_text().splitlines()
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")}
    assert sources < set(listed)
    assert {"fastrl/py.typed", "fastrl/_C.pyi", "fastrl/cli/recipes/tiny_grpo.toml"} < set(listed)
