"""pytest-benchmark over the same cases: `pytest bench/bench_*.py --benchmark-only`."""

from collections.abc import Callable

import pytest
import torch

from bench import table
from bench.case import Case
from bench.environment import describe
from bench.results import Results
from bench.run import Bench
from bench.timing import FULL, Contestant

_RESULTS = pytest.StashKey[Results]()
_DEVICE = torch.device("cpu")


@pytest.fixture(scope="session")
def bench() -> Bench:
    return Bench(_DEVICE, FULL)


@pytest.fixture
def run_case(benchmark, bench, request):
    """Runs a case: our turns on pytest-benchmark's clock, those of the others between them."""

    def run_rounds(
        ours: Contestant, before_round: Callable[[int], None], total: int, device: torch.device
    ) -> list[float]:
        rounds = iter(range(total))
        benchmark.pedantic(ours.launch, setup=lambda: before_round(next(rounds)), rounds=total)
        if benchmark.stats is None:  # --benchmark-disable: one round, and no clock
            pytest.skip("correct; not timed")
        return list(benchmark.stats.stats.data)

    def run(case: Case) -> None:
        result = bench.run(case, run_rounds=run_rounds)
        stash = request.config.stash
        results = stash.setdefault(_RESULTS, Results(describe(_DEVICE), False))
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
