"""`fastrl info`: versions, what is available, and which implementation of each op runs where."""

import argparse
import importlib.metadata
import platform
import shutil

import torch

import fastrl
from fastrl.ops import _binary

OPTIONAL = {
    "train": ("tokenizers", "safetensors", "rich", "matplotlib", "tyro", "tensorboard"),
    "hf": ("transformers",),
    "peft": ("peft",),
    "metrics": ("sacrebleu", "rouge-score"),
    "plot": ("matplotlib",),
    "peers": ("numba", "torchrl", "trl", "liger-kernel", "cut-cross-entropy"),
}
ALSO = ("numpy", "triton")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="fastrl info", description=__doc__)
    parser.parse_args(argv)
    for title, rows in (
        ("versions", versions()),
        ("binary", binary()),
        ("devices", devices()),
        ("extras", extras()),
        ("ops", implementations()),
    ):
        print(f"{title}\n" + "\n".join(f"  {name:<22} {value}" for name, value in rows))
    return 0


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def versions() -> list[tuple[str, str]]:
    return [
        ("fastrl", fastrl.__version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        *((name, version_of(name)) for name in ALSO),
    ]


def binary() -> list[tuple[str, str]]:
    if _binary.module is None:
        remedy = "build it with `pip install --no-build-isolation .`"
        return [("fastrl._C", f"missing ({_binary.missing}); {remedy}")]
    facts = _binary.module.build_facts()
    in_use = _binary.module.simd_level()
    cuda = facts["cuda_architectures"] or "not built (no CUDA toolkit, or a torch without CUDA)"
    return [
        ("compiler", facts["compiler"]),
        ("built with torch", f"{facts['torch']} (ABI: {facts['torch_abi']})"),
        ("instruction sets", f"{', '.join(facts['simd_levels'])}; in use: {in_use}"),
        ("CUDA architectures", cuda),
    ]


def devices() -> list[tuple[str, str]]:
    rows = [("cpu", f"{platform.machine()}, {torch.get_num_threads()} threads")]
    if torch.cuda.is_available():
        rows += [
            (f"cuda:{i}", torch.cuda.get_device_name(i)) for i in range(torch.cuda.device_count())
        ]
    elif torch.version.cuda is None:
        rows.append(("cuda", "no: this torch is built for the CPU alone"))
    else:
        rows.append(("cuda", f"no: torch is built for CUDA {torch.version.cuda}, but finds no GPU"))
    rows.append(("nvcc", shutil.which("nvcc") or "not found"))
    return rows


def extras() -> list[tuple[str, str]]:
    rows = []
    for extra, packages in OPTIONAL.items():
        found = ", ".join(f"{name} {version_of(name)}" for name in packages)
        missing = any(version_of(name) == "not installed" for name in packages)
        rows.append((extra, found + (f'; pip install "fastrl[{extra}]"' if missing else "")))
    return rows


def implementations() -> list[tuple[str, str]]:
    """Each op with what runs it on a CPU and on a GPU, or why nothing does."""
    built = "" if _binary.module is not None else " (not built)"
    rows = []
    for name in sorted(fastrl.ops.__all__):
        if name in _binary.IMPLEMENTATIONS:
            kernels = _binary.IMPLEMENTATIONS[name]
            here = [f"{device}: {kind}{built}" for device, kind in kernels.items()]
            if "cuda" not in kernels:
                here.append(f"cuda: not in this build, use fastrl.reference.{name}")
            text = "; ".join(here)
        else:
            text = f"cpu, cuda: PyTorch, the definition in fastrl.reference.{name}"
        rows.append((name, text))
    return rows
