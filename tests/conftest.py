import ctypes

import pytest
import torch
from two_ranks import TwoRanks

_M_PERTURB = -6  # of glibc's mallopt


@pytest.fixture(scope="session", autouse=True)
def poisoned_malloc():
    """Bytes of 0xff, which are NaN in every float dtype: torch's own poison, below, does not reach
    what the C++ ops allocate. Nor does this one reach a few hundred bytes from glibc 2.38 on, which
    a thread keeps and hands out again as they are, aligned ones too."""
    process = ctypes.CDLL(None)
    mallopt = getattr(process, "mallopt", None)
    if mallopt is None or hasattr(process, "__tsan_init"):  # a sanitizer's own malloc
        return
    mallopt(_M_PERTURB, 0x100)
    assert torch.empty(5000).isnan().all()


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh tensors hold NaN, so that an output which an op forgets to write is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn_only)


@pytest.fixture(autouse=True)
def shared_gpu():
    """A dozen workers share its memory: none keeps the gigabytes of a test that is over."""
    yield
    if torch.cuda.is_initialized() and torch.cuda.memory_reserved() > 2**30:
        torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def two_ranks():
    """two_ranks.run(__file__, folder): what a file's worker(rank, folder) has saved, by rank."""
    ranks = TwoRanks()
    yield ranks
    ranks.close()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def pytest_terminal_summary(terminalreporter):
    """What a test has recorded for people to read: a heading, and its lines."""
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for heading, lines in report.user_properties:
            terminalreporter.section(heading)
            for line in lines:
                terminalreporter.write_line(line)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With --dist loadfile, processes take one of these folders at a time too: their files share
    what was compiled."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            folder = file.rpartition("/")[0]
            return folder if folder in ("tests/kernels", "tests/emulated") else file

    return Scheduling(config, log)
