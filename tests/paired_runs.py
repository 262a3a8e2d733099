"""Small runs that one process makes, or two together, for tests/trainers/test_processes.py."""

import torch

from fastrl.models import ActorCritic, LSTMLanguageModel
from fastrl.trainers import (
    ActorCriticConfig,
    ActorCriticTrainer,
    PolicyGradientConfig,
    PolicyGradientTrainer,
)

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


def make_model(init=0):
    torch.manual_seed(init)
    return LSTMLanguageModel(8, 8, 24, 1)


def make(name, rewards=hits, init=0, group=None, *, model=None, dataset=None, **options):
    is_critic, config = RUNS[name]
    model = make_model(init) if model is None else model
    model = ActorCritic(model) if is_critic else model
    names = ("environment", "rollout_function", "tokenizer", "ops")
    arguments = {n: options.pop(n) for n in names if n in options}
    config_class = ActorCriticConfig if is_critic else PolicyGradientConfig
    trainer = ActorCriticTrainer if is_critic else PolicyGradientTrainer
    config = config_class(**DEFAULTS | {"eos_token_id": 7} | config | options)
    dataset = [torch.tensor(prompt) for prompt in PROMPTS] if dataset is None else dataset
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
