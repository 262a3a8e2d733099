"""linear_token_loss beside its peers: cases/ lists the cases, README.md the figures."""

import pytest

from bench.cases import CASES


@pytest.mark.parametrize("case", CASES["linear_token_loss"], ids=lambda case: case.name)
def test_linear_token_loss(run_case, case):
    run_case(case)
