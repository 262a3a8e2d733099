"""What goes wrong in one of two processes that train together, for test_processes.py."""

import random
from dataclasses import replace

import torch
from paired_runs import PROMPTS, engine, hits, make, make_model
from torch import nn

from fastrl.layout import pack_groups
from fastrl.rollout import Rollout
from fastrl.trainers.over_optimization import OverOptimizationMonitor


def failure(function):
    """The error that a function has ended with, in words."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def fails(*_, **__):
    raise OSError("it has failed")


def callback(rank, folder):
    make("grpo").train(max_steps=1, on_step=fails if rank == 0 else ())


def evaluation_of_one(rank, folder):
    trainer = make("grpo")
    evaluate = lambda record: trainer.evaluate(PROMPTS)  # noqa: E731
    trainer.train(max_steps=1, on_step=evaluate if rank == 0 else ())


def learning(rank, folder):
    trainer = make("grpo")
    if rank == 1:
        read = trainer.policy.packed_hidden
        trainer.policy.packed_hidden = lambda x: fails() if torch.is_grad_enabled() else read(x)
    trainer.train(max_steps=1)


def reference(rank, folder):
    trainer = make("grpo")
    if rank == 1:
        trainer.reference.packed_hidden = fails
    trainer.train(max_steps=1)


def making(rank, folder):
    make("grpo", dataset=[] if rank == 1 else None)


def making_late(rank, folder):
    """Where the others have nothing more to say."""
    make("grpo", hits if rank == 0 else [])


def frozen_weight(rank, folder):
    model = make_model()
    model.embedding.weight.requires_grad_(rank == 0)
    make("grpo", model=model)


def end_of_text(rank, folder):
    class Tokenizer:
        eos_token_id = 5 + rank

        def decode(self, ids):
            return ""

    make("grpo", tokenizer=Tokenizer(), eos_token_id="auto")


def rollout_function(rank, folder):
    make("grpo", rollout_function=engine if rank == 1 else None)


def number_of_steps(rank, folder):
    make("grpo").train(max_steps=rank + 1)


def log_that_cannot_be_sent(rank, folder):
    def reward(completion_ids, log_extra, **_):
        log_extra("notes", [lambda: None for _ in completion_ids])
        return [0.0] * len(completion_ids)

    make("grpo", reward).train(max_steps=1)


def missing_checkpoint(rank, folder):
    resumed(f"{folder}/one" if rank == 0 else f"{folder}/none")


def another_checkpoint(rank, folder):
    resumed(f"{folder}/{('one', 'run/checkpoint')[rank]}")


def resumed(path):
    """Resume, and if that fails, be what was there before."""
    trainer = make("ppo", init=5)
    before = [weight.clone() for weight in trainer.parameters]
    try:
        trainer.resume(path)
    finally:
        assert trainer.step == 0 and all(map(torch.equal, before, trainer.parameters))


def rewards_of_some(rank, folder):
    of_some("rewards")


def part_of_a_dataset(rank, folder):
    make("grpo").evaluate(PROMPTS[rank::2])


def weights_of_one(rank, folder):
    trainer = make("grpo")
    if rank == 0:
        nn.init.zeros_(trainer.parameters[0])
    trainer.train(max_steps=1)


def optimizer(rank, folder):
    trainer = make("grpo")
    if rank == 1:
        trainer.optimizer.register_step_pre_hook(fails)
    trainer.train(max_steps=1)


def moment(rank, folder):
    trainer = make("grpo")
    trainer.train(max_steps=1)
    if rank == 1:
        state = next(iter(trainer.optimizer.state.values()))
        state["exp_avg"].view(-1)[0] = float("inf")
    trainer.save(f"{folder}/never")


def monitor(rank, folder):
    trainer = make("grpo")
    held_out = [[a, b] for a in range(6) for b in range(6)]
    watching = OverOptimizationMonitor(trainer, hits, held_out, seed=rank)
    trainer.attach("monitor", watching)
    trainer.train(max_steps=1)


# By name: what fails, and the errors in both processes.
_FAILED = "ProcessFailedError: Trainer: process {} has failed with {}"
_ELSEWHERE = "RuntimeError: Trainer: expected all processes to do the same, got process {} at {}"
_SAME = "ValueError: Trainer: expected the same {} in all processes, got {}"
CASES = {
    "callback": (callback, "OSError: it has failed", _FAILED.format(0, "OSError: it has failed")),
    "evaluation": (
        evaluation_of_one,
        _ELSEWHERE.format(0, "the check of dataset and process 1 at callbacks"),
        _ELSEWHERE.format(1, "callbacks and process 0 at the check of dataset"),
    ),
    "learning": (learning, _FAILED.format(1, "OSError: it has failed"), "OSError: it has failed"),
    "reference": (reference, _FAILED.format(1, "OSError: it has failed"), "OSError: it has failed"),
    "making": (making, _FAILED.format(1, "ValueError: Trainer: expected dataset"), "ValueError: "),
    "late": (making_late, _FAILED.format(1, "ValueError: Trainer: expected rew"), "ValueError: "),
    "frozen": (frozen_weight, *2 * [_SAME.format("model", "embedding.weight ('torch.float32', ")]),
    "eos": (end_of_text, *2 * [_SAME.format("arguments", "eos_token_ids (5,) and (6,)")]),
    "engine": (
        rollout_function, *2 * [_SAME.format("arguments", "rollout_function False and True")]
    ),
    "steps": (number_of_steps, *2 * [_SAME.format("step and max_steps", "(0, 1) and (0, 2)")]),
    "log": (
        log_that_cannot_be_sent, "AttributeError: Can't", _FAILED.format(0, "AttributeError: Can't")
    ),
    "optimizer": (optimizer, _FAILED.format(1, "OSError: it has failed"), "OSError: it has failed"),
    "moment": (moment, *2 * ["TrainingDivergedError: PolicyGradientTrainer: expected finite wei"]),
    "no checkpoint": (
        missing_checkpoint, _FAILED.format(1, "ValueError: resume"), "ValueError: resume: expected"
    ),
    "checkpoints": (another_checkpoint, *2 * [_SAME.format("checkpoint", "step 1 and 2")]),
    "part": (part_of_a_dataset, *2 * [_SAME.format("dataset", "(2, ")]),
    "weights": (weights_of_one, *2 * [_SAME.format("weights", "embedding.weight ")]),
    "monitor": (monitor, *2 * [_SAME.format("OverOptimizationMonitor", "seed 0 and 1")]),
    "rewards": (
        rewards_of_some, *2 * ["ValueError: rollout_function: expected rewards in the Rollouts of"]
    ),
}  # fmt: skip


class Dropping:
    """A rollout function whose Rollouts have one of their parts for the prompt [4] alone."""

    def __init__(self, name):
        self.name = name

    def __call__(self, prompts, seeds, **options):
        ids = engine(prompts, seeds, **options)["completion_ids"]
        batch = pack_groups(
            [torch.tensor(prompt) for prompt in prompts],
            [[torch.tensor(row, dtype=torch.int64) for row in rows] for rows in ids],
        )
        count, size = len(batch.completion_segments), len(batch.target_ids)
        rollout = Rollout(
            batch=batch,
            group_ids=torch.arange(len(prompts)).repeat_interleave(5),
            ended=torch.ones(count, dtype=torch.bool),
            logprobs=torch.full((size,), -2.0),
            rewards=torch.linspace(0, 1, size),
            is_used=torch.arange(count) % 2 > 0,
        )
        return rollout if [4] in prompts else replace(rollout, **{self.name: None})


def of_some(name):
    """The samples of a run whose rollout function has the name for some prompts alone."""
    trainer = make("grpo", rollout_function=Dropping(name), prompts_per_step=len(PROMPTS))
    trainer.train(max_steps=1)
    return trainer.samples()


class Drawn:
    """Prompts that Python's random numbers draw."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return [random.randrange(7), index]


def samples_of_drawn_prompts(rank):
    """The prompts as they are reported, as rewards are told of them, and as they were read."""
    random.seed(rank)
    rewarded = []

    def reward(prompts, completion_ids, **_):
        rewarded.extend(prompts)
        return hits(prompts, completion_ids)

    trainer = make("grpo", reward, dataset=Drawn())
    trainer.train(max_steps=1)
    batch = trainer.last_samples._rollout.batch
    roots = [ids.tolist() for ids in batch.layout.unpack(batch.token_ids)[::6]]
    return [row["prompt"] for row in trainer.samples()], rewarded, roots


def other_weights(rank=0):
    """What a step makes of a weight that is stored by its columns."""
    model = make_model()
    model.scale = nn.Parameter(torch.linspace(-1, 1, 12).view(4, 3).t())
    model.register_buffer("row", torch.full((1, 1), 1.0 + rank).expand(3, 4))
    model.register_buffer("empty", torch.empty(0))
    read = model.packed_hidden
    slopes = torch.tensor([1.0, -1, 1, 1, -1, -1, 1, -1, 1, 1, 1, -1]).view(3, 4)
    model.packed_hidden = lambda batch: (
        read(batch) * (1 + (model.scale * slopes * model.row).sum() / 12)
    )
    trainer = make("grpo", model=model, kl_coef=0.0, learning_rate=0.1)
    trainer.train(max_steps=2)
    return {"scale": model.scale.detach().clone(), "row": model.row.clone()}


def resumed_with_dropout(rank, folder):
    """Whether a run with dropout goes on to the same bits, each process with its own numbers."""

    def run_of(steps, seed, path=None):
        model = make_model()
        dropout, read = nn.Dropout(0.3), model.packed_hidden
        model.dropout, model.packed_hidden = dropout, lambda batch: dropout(read(batch))
        trainer = make("grpo", model=model, dropout=True)
        torch.manual_seed(seed)
        trainer = trainer if path is None else trainer.resume(path)
        trainer.train(max_steps=steps)
        return trainer

    whole, first = run_of(2, seed=rank), run_of(1, seed=rank)
    first.save(f"{folder}/dropout")
    second = run_of(2, seed=5, path=f"{folder}/dropout")
    return all(map(torch.equal, whole.parameters, second.parameters))


def zero_in_one(rank):
    """The gradient where the first process's advantages are not 0 and the other's are."""
    trainer = make("grpo", kl_coef=0.0)
    form = trainer.advantages

    def advantages(rollout, known):
        known = form(rollout, known)
        rounded = torch.full_like(known.advantages, 1e-9 if rank == 0 else 0.0)
        return replace(known, advantages=rounded)

    trainer.advantages = advantages
    return trainer.train(max_steps=1)[0]["grad_norm"]
