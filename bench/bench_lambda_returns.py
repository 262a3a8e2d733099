"""lambda_returns beside its peers: cases/ lists the cases, README.md the figures."""

import pytest

from bench.cases import CASES


@pytest.mark.parametrize("case", CASES["lambda_returns"], ids=lambda case: case.name)
def test_lambda_returns(run_case, case):
    run_case(case)
