"""Every CUDA file compiles for every architecture that we ship, without a GPU or a CUDA torch."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import fastrl

CSRC = Path(fastrl.__file__).parent.parent / "csrc"
CUDA_FILES = sorted(CSRC.rglob("*.cu"))
ARCHITECTURES = (80, 90, 100)
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


def faults(source: Path, folder: Path) -> list[str]:
    """Warnings, which are errors, and what a function keeps on its stack, where spilled registers
    go: a line each."""
    include = Path(torch.__file__).parent / "include"
    command = ["nvcc", "-c", str(source), "-o", str(folder / "out.o"), "-std=c++17", "-O3"]
    command += ["-fmad=false", "-Werror", "all-warnings", STABLE_ABI, f"-I{include}", f"-I{CSRC}"]
    command += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    command += ["-Xptxas", "-v", "--threads", "0"]
    out = subprocess.run(command, capture_output=True, text=True)
    if out.returncode != 0:
        return [out.stderr]
    usage = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    found = re.findall(rf"Function properties for (\S+)\s+({usage})", out.stderr)
    # ptxas is silent about a file without device code, and must have been understood otherwise.
    assert out.stderr.count("bytes stack frame") == len(found)
    assert found or not re.search(r"__(global|device)__|LAUNCH_SCANS|<<<", source.read_text())
    return [f"{name}: {line}" for name, line, *numbers in found if any(map(int, numbers))]


@needs_nvcc
@pytest.mark.parametrize("source", CUDA_FILES, ids=lambda p: str(p.relative_to(CSRC)))
def test_cuda_sources_compile_without_warnings_or_spills(source, tmp_path):
    assert not faults(source, tmp_path)


def test_every_cuda_file_is_compiled():
    """Headers by way of the files that include them."""
    assert CUDA_FILES
    sources = [*CUDA_FILES, *CSRC.rglob("*.cuh"), *CSRC.glob("cuda/*.h")]
    included = "".join(path.read_text() for path in sources)
    for header in CSRC.rglob("*.cuh"):
        assert re.search(rf'#include "[\w/]*\b{re.escape(header.name)}"', included)


# A thread holds 64 numbers: too many where two blocks of 1024 threads are to share the registers.
SPILLS = """
__global__ void __launch_bounds__({threads}, {blocks}) sums(const float* x, float* out) {{
  float held[64];
  for (int i = 0; i < 64; ++i) held[i] = x[64 * threadIdx.x + i];
  __syncthreads();
  for (int i = 0; i < 64; ++i) out[64 * threadIdx.x + i] = held[63 - i] * held[i];
}}
"""
WARNS = "__global__ void idle() { int unused = 3; }"


@needs_nvcc
def test_a_planted_spill_is_caught(tmp_path):
    source = tmp_path / "planted.cu"
    source.write_text(SPILLS.format(threads=1024, blocks=2))
    assert "spill stores" in " ".join(faults(source, tmp_path))
    source.write_text(SPILLS.format(threads=128, blocks=1))
    assert not faults(source, tmp_path)


@needs_nvcc
def test_a_planted_warning_is_caught(tmp_path):
    source = tmp_path / "planted.cu"
    source.write_text(WARNS)
    assert "never referenced" in " ".join(faults(source, tmp_path))
