"""Builds fastrl._C; everything else about the package stands in pyproject.toml."""

import os
import platform
import shutil
from pathlib import Path

import torch
from setuptools import setup
from torch.utils import cpp_extension
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension, library_paths

ROOT = Path(__file__).parent
STABLE_ABI = "0x020a000000000000"  # torch 2.10: one binary for it and all that follow


def require_compiler() -> None:
    name = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(name) is None:
        raise SystemExit(
            f"fastrl: expected a C++ compiler, found no {name}. Install g++ (Debian and Ubuntu: "
            "apt-get install g++) or clang, or set CXX."
        )


def pybind11_include() -> list[str]:
    """Without the package torch's own copy serves, which is on the compiler's path already."""
    try:
        import pybind11
    except ImportError:
        return []
    return [pybind11.get_include()]


def find_toolkit() -> None:
    """torch takes what is above nvcc's folder for the toolkit; in /usr/local/bin there may be a
    script that calls the compiler, with neither headers nor libraries above it."""
    found = cpp_extension.CUDA_HOME
    if found is None or (Path(found) / "include" / "cuda_runtime.h").exists():
        return
    nvcc = shutil.which("nvcc")
    homes = [Path(nvcc).resolve().parents[1]] if nvcc else []
    for home in (*homes, Path("/usr/local/cuda")):
        if (home / "include" / "cuda_runtime.h").exists():
            cpp_extension.CUDA_HOME = str(home)
            return


def name_architectures() -> None:
    """torch builds for the GPUs that it sees. Where it sees none, as in a docker build, it breaks
    down; the binary then holds what the tests compile for, and newer GPUs translate the last."""
    if not os.environ.get("TORCH_CUDA_ARCH_LIST") and torch.cuda.device_count() == 0:
        knows_blackwell = tuple(map(int, torch.version.cuda.split("."))) >= (12, 8)
        known = "8.0;9.0;10.0+PTX" if knows_blackwell else "8.0;9.0+PTX"
        os.environ["TORCH_CUDA_ARCH_LIST"] = known


def extension():
    find_toolkit()
    with_cuda = torch.version.cuda is not None and cpp_extension.CUDA_HOME is not None
    with_cuda &= os.environ.get("FASTRL_BUILD") != "cpu"
    if with_cuda:
        name_architectures()
    cxx = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-Wall"]
    cxx += ["-fvisibility=hidden", f"-DTORCH_TARGET_VERSION={STABLE_ABI}"]
    cxx += ["-g0"]  # Python's own flags have -g: nine tenths of the binary's 42 MB
    # Without contraction a row's bits do not depend on where in a kernel an expression stands.
    nvcc = ["-O3", "-fmad=false", f"-DTORCH_TARGET_VERSION={STABLE_ABI}"]
    sources = ["csrc/registration.cpp", *sorted(map(str, Path("csrc/cpu").glob("*.cpp")))]
    if with_cuda:
        sources += sorted(map(str, Path("csrc/cuda").glob("*.cu")))
    kind = CUDAExtension if with_cuda else CppExtension
    built = kind(
        "fastrl._C",
        sources,
        include_dirs=[str(ROOT / "csrc"), *pybind11_include()],
        define_macros=[("FASTRL_WITH_CUDA", None)] if with_cuda else [],
        extra_compile_args={"cxx": cxx, "nvcc": nvcc} if with_cuda else cxx,
        depends=sorted(str(p) for name in ("*.h", "*.cuh") for p in Path("csrc").rglob(name)),
    )
    built.libraries.remove("torch_python")  # nothing of torch's Python side is called
    if with_cuda and not any((Path(d) / "libcudart.so").exists() for d in library_paths("cuda")):
        built.libraries.remove("cudart")  # a toolkit without it; torch has loaded its own by then
    return built


if platform.system() != "Linux":
    raise SystemExit(
        f"fastrl: expected Linux, got {platform.system()}. Other systems are untested."
    )
require_compiler()

setup(
    ext_modules=[extension()], cmdclass={"build_ext": BuildExtension.with_options(use_ninja=True)}
)
