"""Reward functions that are async, late or interrupted: none holds up the others for long."""

import asyncio
import functools
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from meeting import Meeting

from fastrl.layout import pack_groups
from fastrl.rollout import Rollout
from fastrl.trainers import RewardFunctionError
from fastrl.trainers.prompts import PromptDataset
from fastrl.trainers.scoring import RewardScorer

PROMPTS = PromptDataset([[1, 2]], 8)
BATCH = pack_groups([torch.tensor([1, 2])], [[torch.tensor([3, 4]), torch.tensor([5])]])
ROLLOUT = Rollout(
    batch=BATCH,
    group_ids=torch.tensor([0, 0]),
    ended=torch.tensor([True, True]),
    logprobs=torch.zeros(3),
)


def score(scorer):
    return scorer([PROMPTS[0]], ROLLOUT, PROMPTS, None)


def timed(scorer):
    start = time.monotonic()
    return score(scorer), time.monotonic() - start


def good(completions):
    return [1.0, 2.0]


async def slow(completions, seconds=0.01):
    await asyncio.sleep(seconds)
    return [10.0, 20.0]


def test_async_functions_run_beside_each_other():
    meeting = Meeting(3)

    async def declared(completions):
        await meeting.join()
        return [10.0, 20.0]

    class AsyncJudge:
        async def __call__(self, completions, **_):
            await meeting.join()
            return [100.0, 200.0]

    returns_an_awaitable = functools.partial(lambda f, completions: f(completions), declared)
    scorer = RewardScorer([declared, AsyncJudge(), good, returns_an_awaitable], [1, 1, 1, 1000])
    assert score(scorer).totals.tolist() == [10111, 20222]


def test_async_functions_run_where_a_loop_runs_already():
    scorer = RewardScorer(slow)

    async def notebook():
        return score(scorer)

    assert asyncio.run(notebook()).totals.tolist() == [10, 20]


def test_what_belongs_to_the_loop_can_be_kept():
    """As TRL has it: a connection opened in one step is used in the next."""
    loops = []

    async def judge(completions):
        loops.append(asyncio.get_running_loop())
        return [1.0, 2.0]

    scorer = RewardScorer(judge)
    score(scorer), score(scorer)
    assert loops[0] is loops[1] and not loops[0].is_closed()


def test_the_loops_thread_ends_with_the_scorer():
    before = set(threading.enumerate())
    scorer = RewardScorer(functools.partial(slow, seconds=0.0))
    score(scorer)
    (thread,) = set(threading.enumerate()) - before
    assert thread.daemon
    del scorer
    thread.join(5)
    assert not thread.is_alive()


def test_without_a_timeout_functions_run_in_the_callers_thread():
    threads = []
    score(RewardScorer(lambda completions: threads.append(threading.current_thread()) or [0, 0]))
    assert threads == [threading.current_thread()]


def test_a_hanging_function_is_left_alone_until_it_is_done():
    release, calls = threading.Event(), []

    def hanging(completions):
        calls.append(len(completions))
        release.wait(30)
        return [7.0, 8.0]

    scorer = RewardScorer([hanging, good], timeout=0.5)
    with pytest.warns(RuntimeWarning, match=r"function hanging did not come within timeout = 0.5"):
        scores, seconds = timed(scorer)
    assert 0.5 <= seconds < 20
    assert not scores.is_used.any() and not scores.rewards.any()
    assert scores.metrics["rewards/timeouts"] == 2 and scores.metrics["rewards/bad"] == 0
    assert scores.metrics["rewards/good/mean"] == 1.5

    with pytest.warns(RuntimeWarning, match="hanging were not asked for, as its call of an earlie"):
        scorer._caller.timeout = 20.0  # which a call that waited again would take
        scores, seconds = timed(scorer)
    assert seconds < 10 and scores.metrics["rewards/timeouts"] == 2 and calls == [2]

    release.set()
    assert once_it_is_done(scorer).totals.tolist() == [8, 10] and calls == [2, 2]


def once_it_is_done(scorer):
    """The scores of the first call that finds the late one done."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for _ in range(1000):
            scores = score(scorer)
            if not scores.metrics["rewards/timeouts"]:
                break
            time.sleep(0.01)
    return scores


def test_a_late_async_function_is_cancelled_and_the_others_are_used():
    cancelled = []

    async def late(completions):
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    scorer = RewardScorer([late, slow], timeout=0.5)
    for count in (1, 2):  # cancelled, it is done, so it is called in the next step as well
        with pytest.warns(RuntimeWarning, match="function late did not come within timeout"):
            scores, seconds = timed(scorer)
        assert 0.5 <= seconds < 20 and len(cancelled) == count
        assert scores.metrics["rewards/timeouts"] == 2
        assert scores.columns["slow"] == [10, 20] and not scores.is_used.any()


def test_an_async_function_that_blocks_its_loop_is_left_behind():
    release = threading.Event()

    async def blocking(completions):
        release.wait(30)
        return [1.0, 2.0]

    scorer = RewardScorer([good, blocking], timeout=0.1)
    with pytest.warns(RuntimeWarning, match="function blocking did not come within"):
        score(scorer)
    with pytest.warns(RuntimeWarning, match="function blocking were not asked for"):
        score(scorer)
    release.set()
    assert once_it_is_done(scorer).totals.tolist() == [2, 4]  # in a new loop


@pytest.mark.parametrize("kind", ["sync", "threaded", "async"])
@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt, SystemExit])
def test_errors_pass_from_wherever_a_function_runs(kind, error):
    def plain(completions):
        raise error("it")

    async def coroutine(completions):
        raise error("it")

    function = coroutine if kind == "async" else plain
    later = []
    functions = [function, lambda completions: later.append(1) or [0.0, 0.0]]
    scorer = RewardScorer(functions, timeout=None if kind == "sync" else 5.0)
    if error is KeyError:
        with pytest.raises(RewardFunctionError, match=f"{function.__name__} raised KeyError"):
            score(scorer)
        scorer.errors = "mask"
        with pytest.warns(RuntimeWarning, match="raised KeyError"):
            assert score(scorer).metrics["rewards/errors"] == 2
        return
    scorer.errors = "mask"  # these are no errors of the function
    for _ in range(2):  # and the loop's thread outlives them
        with pytest.raises(error, match="it"):
            score(scorer)
    assert not later or kind == "async"  # nothing is begun after an interrupt


def test_hanging_functions_do_not_keep_the_process():
    program = """
        import sys, time
        sys.path[:0] = ["tests", "tests/trainers"]
        from test_reward_calls import score
        from fastrl.trainers.scoring import RewardScorer

        def hanging(completions):
            time.sleep(600)

        async def blocking(completions):
            time.sleep(600)

        scores = score(RewardScorer([hanging, blocking], timeout=0.1))
        assert scores.metrics["rewards/timeouts"] == 2
        print("done", flush=True)
    """
    folder = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True, text=True, timeout=200, cwd=folder,
    )  # fmt: skip
    assert result.returncode == 0 and result.stdout == "done\n", result.stderr
