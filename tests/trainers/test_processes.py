"""Two processes train one model, and get what one process gets."""

import math
import re
import warnings
from datetime import timedelta

import failing_runs
import pytest
import torch
import torch.distributed as dist
from failing_runs import CASES, failure
from paired_runs import PROMPTS, RUNS, STEPS, answer, engine, failing, failing_engine, make, run

from fastrl.layout import PackedBatch, pack_groups
from fastrl.trainers import StopTraining
from fastrl.trainers._exchange import ConnectionLostError, Exchange
from fastrl.trainers._shares import shares


def stopped_by(rank):
    """How many steps a run makes whose callback wants to stop in one of the processes alone."""

    def on_step(record):
        if dist.get_rank() == rank and record["step"] == 2:
            raise StopTraining("enough")

    return len(make("grpo").train(max_steps=STEPS, on_step=on_step))


def worker(rank, folder):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    place, timeout = f"file://{folder}/init", timedelta(seconds=30)
    dist.init_process_group("gloo", place, rank=rank, world_size=2, timeout=timeout)
    groups = [dist.new_group([r]) for r in (0, 1)]
    found = {name: run(name, init=rank) for name in RUNS}
    found["environment"] = run("grpo", environment=answer)
    found["an engine"] = run("grpo", rollout_function=engine)
    found["alone"] = run("grpo", init=rank, group=groups[rank])
    trainer = make("ppo", output_dir=f"{folder}/run", save_every=2)
    trainer.train(max_steps=2)
    found["reward"] = failure(lambda: make("grpo", failing).train(max_steps=1))
    options = {"rollout_function": failing_engine, "prompts_per_step": len(PROMPTS)}
    found["engine"] = failure(lambda: make("grpo", **options).train(max_steps=1))
    found["config"] = failure(lambda: make("grpo", learning_rate=0.1 * (rank + 1)))
    found["stopped"] = [stopped_by(0), stopped_by(1)]
    found["moments"] = [s["exp_avg"].numel() for s in trainer.optimizer.state.values()]
    resumed = make("ppo", init=5).resume(f"{folder}/one")
    resumed.train(max_steps=STEPS)
    found["resumed"] = resumed.model.state_dict()
    for name, (case, *_) in CASES.items():
        found[f"fails: {name}"] = failure(lambda case=case: case(rank, folder))
    found["drawn"] = failing_runs.samples_of_drawn_prompts(rank)
    found["used"] = failing_runs.of_some("is_used")
    found["other weights"] = failing_runs.other_weights(rank)
    found["zero in one"] = failing_runs.zero_in_one(rank)
    found["dropout"] = failing_runs.resumed_with_dropout(rank, folder)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    from two_ranks import TwoRanks

    pytest.importorskip("safetensors")
    folder = tmp_path_factory.mktemp("processes")
    trainer = make("ppo")
    trainer.train(max_steps=1)
    trainer.save(folder / "one")
    two = TwoRanks()
    yield two.run(__file__, folder), folder
    two.close()


def assert_close(actual, expected):
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            if not key.startswith("time/") and key != "tokens_per_second":
                assert_close(actual[key], value)
    elif isinstance(expected, list):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_close(one, other)
    elif isinstance(expected, float | torch.Tensor):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
    else:
        assert actual == expected


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_come_to_what_one_comes_to(ranks, name):
    """From the first one's weights: tokens, rewards, metrics, weights and an evaluation."""
    first, second = (found[name] for found in ranks[0])
    assert first["records"] == second["records"]  # clocks included
    assert all(map(torch.equal, first["weights"].values(), second["weights"].values()))
    assert_close(first, run(name))
    assert_close(second, run(name))


def test_environments_and_engines_are_told_the_same_numbers(ranks):
    assert_close(ranks[0][1]["environment"], run("grpo", environment=answer))
    assert_close(ranks[0][1]["an engine"], run("grpo", rollout_function=engine))


def test_a_group_of_one_trains_by_itself(ranks):
    for rank in (0, 1):
        assert_close(ranks[0][rank]["alone"], run("grpo", init=rank))


def test_a_checkpoint_of_two_goes_on_in_one(ranks):
    trainer = make("ppo").resume(ranks[1] / "run" / "checkpoint")
    assert trainer.step == 2
    trainer.train(max_steps=STEPS)
    assert_close(trainer.model.state_dict(), run("ppo")["weights"])


def test_each_process_keeps_the_moments_of_its_share(ranks):
    """Together they are those of one, and the checkpoint has them all."""
    from safetensors.torch import load_file

    first, second = (found["moments"] for found in ranks[0])
    trainer = make("ppo")
    trainer.train(max_steps=2)
    sizes = [slots["exp_avg"].numel() for slots in trainer.optimizer.state.values()]
    assert sorted(first + second) == sorted(sizes)
    assert max(sum(first), sum(second)) <= max(0.6 * sum(sizes), *sizes)  # one is the most of all
    state = load_file(ranks[1] / "run" / "checkpoint" / "state.safetensors")
    for name, weight in trainer.model.named_parameters():
        for slot, moment in trainer.optimizer.state[weight].items():
            assert_close(state[f"optimizer/moments/{name}/{slot}"], moment)


def test_two_go_on_from_a_checkpoint_of_one(ranks):
    for found in ranks[0]:
        assert_close(found["resumed"], run("ppo")["weights"])


def test_a_lost_connection_is_told_from_other_errors():
    exchange = Exchange(None)
    gone = "[pair.cc:537] Connection closed by peer [127.0.0.1]\nin frame #0"
    with pytest.raises(ConnectionLostError, match=r"no answer from another: .* peer \[127"):
        with exchange._sending():
            raise RuntimeError(gone)
    with pytest.raises(RuntimeError, match="out of memory") as other:
        with exchange._sending():
            raise RuntimeError("out of memory")
    assert not isinstance(other.value, ConnectionLostError)


def test_each_process_goes_on_with_its_own_random_numbers(ranks):
    assert [found["dropout"] for found in ranks[0]] == [True, True]


def test_what_fails_in_one_process_is_an_error_in_both(ranks):
    first, second = ranks[0]
    assert first["reward"].startswith("RewardFunctionError: Trainer: reward function failing")
    assert "process 0 has failed with RewardFunctionError" in second["reward"]
    own, told = sorted([first["engine"], second["engine"]])  # either may have had that prompt
    assert own == "OSError: no such engine"
    assert re.fullmatch(
        r"ProcessFailedError: .*process [01] has failed with OSError: no such .*", told
    )


@pytest.mark.parametrize("name", CASES)
def test_what_goes_wrong_in_one_process_is_told_in_both(ranks, name):
    """And the group goes on to the next case: none has been left behind waiting."""
    for found, expected in zip(ranks[0], CASES[name][1:], strict=True):
        assert str(found[f"fails: {name}"]).startswith(expected)


def test_the_first_process_reads_the_prompts(ranks):
    """Of a dataset that draws, each process would have others."""
    (prompts, rewarded, roots), (second, none, _) = (found["drawn"] for found in ranks[0])
    assert prompts == second == rewarded and prompts[::5] == roots
    assert none == []  # rewards are asked for in the first process


def test_completions_that_one_process_leaves_out_are_left_out(ranks):
    for found in ranks[0]:
        is_used = [not math.isnan(row["reward"]) for row in found["used"]]
        some, every = [index % 2 > 0 for index in range(10)], [True] * 10
        is_first = [4] in [row["prompt"] for row in found["used"][:10]]
        assert is_used == (some + every if is_first else every + some)


def test_weights_that_are_stored_by_their_columns_learn_alike(ranks):
    for found in ranks[0]:
        assert_close(found["other weights"], failing_runs.other_weights())


def test_the_first_process_says_what_is_computed(ranks):
    """An advantage of 0 is not computed, and where it is 0 is a matter of rounding."""
    first, second = (found["zero in one"] for found in ranks[0])
    assert first == second > 0


def test_processes_with_different_configs_are_told(ranks):
    for found in ranks[0]:
        assert "expected the same config in all processes" in found["config"]


def test_all_stop_where_one_wants_to(ranks):
    assert [found["stopped"] for found in ranks[0]] == [[2, 2], [2, 2]]


def batch_of(groups):
    """Prompts of some tokens, with completions of some."""
    ids = [(torch.zeros(p, dtype=torch.int64), c) for p, c in groups]
    return pack_groups(
        [p for p, _ in ids], [[torch.zeros(n, dtype=torch.int64) for n in c] for _, c in ids]
    )


@pytest.mark.parametrize(
    "groups, count, expected",
    [
        ([(4, [2, 2]), (4, [2, 2])], 2, [0, 0, 1, 1]),
        # A prompt is read twice where that is less for the busiest.
        ([(2, [8, 8, 8, 8])], 2, [0, 0, 1, 1]),
        ([(2, [8, 8]), (2, [8, 8]), (2, [8, 8])], 2, [0, 0, 0, 1, 1, 1]),
        ([(40, [8]), (40, [8]), (40, [8])], 2, [0, 1, 1]),
        ([(3, [1])], 3, [1]),
    ],
)
def test_completions_are_shared_out_by_their_tokens(groups, count, expected):
    batch = batch_of(groups)
    every = torch.ones(len(expected), dtype=torch.bool)
    assert shares(batch, every, count).tolist() == expected


def test_what_is_not_computed_counts_for_nothing():
    batch = batch_of([(4, [9, 1, 1]), (4, [1, 1])])
    active = torch.tensor([False, True, True, True, True])
    assert shares(batch, active, 2)[1:].tolist() == [0, 0, 1, 1]


def test_a_tree_of_several_turns_stays_in_one_process():
    turns = [torch.zeros(n, dtype=torch.int64) for n in (2, 3, 9, 9, 2, 3)]
    batch = PackedBatch.from_segments(turns, [-1, 0, 1, 1, -1, 4])
    owners = shares(batch, torch.ones(4, dtype=torch.bool), 2)
    assert len(owners[:3].unique()) == 1 and owners.max() <= 1
