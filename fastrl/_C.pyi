"""The compiled module; csrc/registration.cpp."""

from typing import TypedDict

class BuildFacts(TypedDict):
    compiler: str
    torch: str
    torch_abi: str
    cuda_architectures: str
    simd_levels: list[str]

def build_facts() -> BuildFacts: ...
def simd_level() -> str: ...
def select_simd_level(name: str) -> bool: ...
def release_memory() -> None: ...
