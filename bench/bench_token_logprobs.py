"""token_logprobs beside its peers: cases/ lists the cases, README.md the figures."""

import pytest

from bench.cases import CASES


@pytest.mark.parametrize("case", CASES["token_logprobs"], ids=lambda case: case.name)
def test_token_logprobs(run_case, case):
    run_case(case)
