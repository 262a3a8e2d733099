"""Two processes train one model, and get what one process gets."""

import re
import warnings

import pytest
import torch
import torch.distributed as dist

from fastrl.layout import PackedBatch, pack_groups
from fastrl.models import ActorCritic, LSTMLanguageModel
from fastrl.trainers import (
    ActorCriticConfig,
    ActorCriticTrainer,
    PolicyGradientConfig,
    PolicyGradientTrainer,
    StopTraining,
)
from fastrl.trainers._shares import shares

PROMPTS = [[1, 2, 3], [4], [2, 5], [6, 0, 1, 1]]
STEPS = 3
# By name: whether there is a critic, and what the config has beside the defaults below.
RUNS = {
    "grpo": (False, {"algorithm": "grpo", "kl_coef": 0.1, "micro_batch_tokens": 12}),
    "one prompt": (False, {"prompts_per_step": 1, "gamma": 0.9, "entropy_coef": 0.01}),
    "gspo": (False, {"algorithm": "gspo", "epochs": 2, "prompts_per_step": 2}),
    "ppo": (True, {"algorithm": "ppo", "epochs": 2, "minibatches": 2, "whiten_advantages": True}),
    "vtrace": (True, {"algorithm": "vtrace", "replay_size": 2, "replay_per_step": 1}),
}
DEFAULTS = {"prompts_per_step": 3, "completions_per_prompt": 5, "max_new_tokens": 6, "seed": 3}


def hits(prompts, completion_ids, **_):
    """1 for each token that is the one wanted there; the longer a completion, the less."""
    return [
        [float(token == (prompt[-1] + t) % 5) / len(ids) for t, token in enumerate(ids)]
        for prompt, ids in zip(prompts, completion_ids, strict=True)
    ]


def answer(index, prompt_ids, completion_ids):
    """What depends on the number of the completion in the step."""
    return [index % 6, 6] if len(completion_ids) < 3 else None


def make(name, rewards=hits, init=0, group=None, **options):
    is_critic, config = RUNS[name]
    torch.manual_seed(init)
    model = LSTMLanguageModel(8, 8, 24, 1)
    model = ActorCritic(model) if is_critic else model
    arguments = {n: options.pop(n) for n in ("environment", "rollout_function") if n in options}
    config_class = ActorCriticConfig if is_critic else PolicyGradientConfig
    trainer = ActorCriticTrainer if is_critic else PolicyGradientTrainer
    config = config_class(**DEFAULTS | {"eos_token_id": 7} | config | options)
    dataset = [torch.tensor(prompt) for prompt in PROMPTS]
    return trainer(model, rewards, dataset, config, process_group=group, **arguments)


def run(name, **options):
    """What a run of some steps has come to."""
    trainer = make(name, **options)
    records = trainer.train(max_steps=STEPS)
    evaluation = trainer.evaluate(PROMPTS, completions_per_prompt=2)
    return {
        "weights": trainer.model.state_dict(),
        "records": records,
        "samples": trainer.samples(),
        "evaluation": evaluation,
    }


def failure(function):
    try:
        function()
    except (OSError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def failing(**_):
    raise OSError("no reward today")


def engine(prompts, seeds, **_):
    """What depends on the seeds, with completions of none and of some tokens."""
    of_prompt = [seeds[5 * i : 5 * i + 5] for i in range(len(prompts))]
    ids = [[[seed % 7, seed % 5, 7][: seed % 4] for seed in some] for some in of_prompt]
    return {"completion_ids": ids, "logprobs": [[[-2.0] * len(row) for row in g] for g in ids]}


def failing_engine(prompts, **options):
    if [4] in prompts:
        raise OSError("no such engine")
    return engine(prompts, **options)


def stopped_by(rank):
    """How many steps a run makes whose callback wants to stop in one of the processes alone."""

    def on_step(record):
        if dist.get_rank() == rank and record["step"] == 2:
            raise StopTraining("enough")

    return len(make("grpo").train(max_steps=STEPS, on_step=on_step))


def worker(rank, folder):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", f"file://{folder}/init", rank=rank, world_size=2)
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
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    from two_ranks import TwoRanks

    folder = tmp_path_factory.mktemp("processes")
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


def test_what_fails_in_one_process_is_an_error_in_both(ranks):
    first, second = ranks[0]
    assert first["reward"].startswith("RewardFunctionError: Trainer: reward function failing")
    assert "process 0 has failed with RewardFunctionError" in second["reward"]
    own, told = sorted([first["engine"], second["engine"]])  # either may have had that prompt
    assert own == "OSError: no such engine"
    assert re.fullmatch(r"RuntimeError: .*process [01] has failed with OSError: no such .*", told)


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
