"""The kernels of csrc/cuda in the emulator, watched by ThreadSanitizer: each thread of a GPU is one
to it, which only __syncthreads and __syncwarp put in an order with others."""

import pytest

pytestmark = pytest.mark.slow

PLANTED = "tests/emulated/test_emulator.py"
RACES = {
    "test_a_missing_barrier_shows_in_the_numbers": "wants_a_barrier",
    "test_what_a_sanitizer_alone_sees[12-62]": "takes_a_shuffle_for_a_barrier",
    "test_what_a_sanitizer_alone_sees[13-1]": "writes_where_other_blocks_write",
}


@pytest.fixture(scope="module")
def emulate(watched):
    def run(*tests):
        # -s: pytest would keep what the sanitizer says of a test that passes.
        command = ["-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]
        return watched(1, *command, FASTRL_WATCHED="1")

    return run


@pytest.mark.parametrize("test, kernel", RACES.items())
def test_a_planted_race_is_seen(emulate, test, kernel):
    status, printed = emulate(f"{PLANTED}::{test}")
    assert status == 66 and "data race" in printed and f"in {kernel}\n" in printed
    assert "1 passed" in printed


def test_kernels_without_one_pass(emulate):
    status, printed = emulate(f"{PLANTED}::test_good_kernels")
    assert status == 0 and "2 passed" in printed, printed


def test_no_two_threads_meet(emulate):
    """Rows that share a warp, fill a block, and wait for others' chunks. The longest rows, with
    50,000 threads a launch, would take an hour."""
    rows = "packed_rows_of_all_lengths or dense_rows or gaps_longer"
    status, printed = emulate("tests/emulated/test_returns.py", "-k", rows)
    assert status == 0 and "passed" in printed, printed[-20_000:]
