"""pytest-benchmark over the same cases: `pytest bench/bench_*.py --benchmark-only`."""

from collections.abc import Callable

import pytest
import torch

from bench import table
from bench.case import Case
from bench.environment import describe
from bench.results import Results
from bench.run import Bench
from bench.timing import FULL, Contestant, synchronize

_RESULTS = pytest.StashKey[Results]()


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="cpu, or cuda[:i]")


@pytest.fixture(scope="session")
def bench(request) -> Bench:
    device = torch.device(request.config.getoption("--device"))
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    return Bench(device, FULL)


@pytest.fixture
def run_case(benchmark, bench, request):
    """Runs a case: our turns on pytest-benchmark's clock, those of the others between them."""

    def run_rounds(
        ours: Contestant, before_round: Callable[[int], None], total: int, device: torch.device
    ) -> list[float]:
        rounds = iter(range(total))

        def setup() -> None:
            before_round(next(rounds))
            synchronize(device)

        def launch() -> None:
            ours.launch()
            synchronize(device)

        benchmark.pedantic(launch, setup=setup, rounds=total)
        if benchmark.stats is None:  # --benchmark-disable: one round, and no clock
            pytest.skip("correct; not timed")
        return list(benchmark.stats.stats.data)

    def run(case: Case) -> None:
        if bench.device.type not in case.devices:
            pytest.skip(f"a size for {', '.join(case.devices)} alone")
        result = bench.run(case, run_rounds=run_rounds)
        stash = request.config.stash
        results = stash.setdefault(_RESULTS, Results(describe(bench.device), False))
        results.cases.append(result)
        assert result.wrong is None, result.wrong
        if result.ours is None:
            pytest.skip(result.missing[0]["reason"])
        # pytest-benchmark's own column is the time of `launches` launches.
        benchmark.extra_info.update(vars(result.ours), counted_bytes=result.counted_bytes)

    return run


def pytest_terminal_summary(terminalreporter, config):
    results = config.stash.get(_RESULTS, None)
    if results is not None:
        terminalreporter.ensure_newline()
        table.show(results)
