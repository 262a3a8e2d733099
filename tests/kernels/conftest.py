import sys
from pathlib import Path

import pytest

# So that the modules beside this file import each other, here and in the interpreter's process.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def interpreted():
    """interpreted(module, function, *arguments): that launcher, its kernels in Triton's
    interpreter."""
    pytest.importorskip("triton")
    from interpreter import Interpreter

    with Interpreter() as interpreter:
        yield interpreter


@pytest.fixture(scope="session")
def recorded():
    """By architecture: what every call in launches.py makes Triton compile, without doubles."""
    pytest.importorskip("triton")
    import ahead_of_time
    from launches import launches

    return {
        arch: list(
            {
                request.identity: request
                for launch in launches()
                for request in ahead_of_time.record(arch, launch.function, *launch.arguments)
            }.values()
        )
        for arch in ahead_of_time.ARCHITECTURES
    }


@pytest.fixture(scope="session")
def compiled(recorded):
    """Every configuration for sm_90; for the others, of each kernel the one that takes most, and
    those that are theirs alone."""
    import ahead_of_time

    found = ahead_of_time.compile_all(recorded[90])
    largest = {}
    for kernel in found:
        held = largest.get(kernel.name)
        if held is None or kernel.takes > held.takes:
            largest[kernel.name] = kernel
    wanted = {kernel.request.key for kernel in largest.values()}
    wanted |= {r.key for arch in (80, 100) for r in recorded[arch]} - {r.key for r in recorded[90]}
    others = [r for arch in (80, 100) for r in recorded[arch] if r.key in wanted]
    return found + ahead_of_time.compile_all(others)
