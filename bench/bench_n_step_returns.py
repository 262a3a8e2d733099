"""n_step_returns beside its peers: cases/ lists the cases, README.md the figures."""

import pytest

from bench.cases import CASES


@pytest.mark.parametrize("case", CASES["n_step_returns"], ids=lambda case: case.name)
def test_n_step_returns(run_case, case):
    run_case(case)
