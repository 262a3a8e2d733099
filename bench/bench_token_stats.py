"""token_stats beside its peers: cases/ lists the cases, README.md the figures."""

import pytest

from bench.cases import CASES


@pytest.mark.parametrize("case", CASES["token_stats"], ids=lambda case: case.name)
def test_token_stats(run_case, case):
    run_case(case)
