"""decode_attention beside its peers: cases/ lists the cases, README.md the figures."""

import pytest

from bench.cases import CASES


@pytest.mark.parametrize("case", CASES["decode_attention"], ids=lambda case: case.name)
def test_decode_attention(run_case, case):
    run_case(case)
