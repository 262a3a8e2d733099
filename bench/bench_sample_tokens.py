"""sample_tokens beside its peers: cases/ lists the cases, README.md the figures."""

import pytest

from bench.cases import CASES


@pytest.mark.parametrize("case", CASES["sample_tokens"], ids=lambda case: case.name)
def test_sample_tokens(run_case, case):
    run_case(case)
