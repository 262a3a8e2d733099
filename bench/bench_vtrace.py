"""vtrace beside its peers: cases/ lists the cases, README.md the figures."""

import pytest

from bench.cases import CASES


@pytest.mark.parametrize("case", CASES["vtrace"], ids=lambda case: case.name)
def test_vtrace(run_case, case):
    run_case(case)
