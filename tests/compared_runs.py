"""What runs are compared by, and reward functions with random numbers and a memory."""

import random

import numpy as np
import torch


def noise():
    """A number for which every global generator draws."""
    return random.gauss(0, 1) + np.random.randn() + float(torch.rand(()))


class Counting:
    """A reward function that changes from call to call; `reward(ids, calls)` of each completion."""

    def __init__(self, reward):
        self.calls, self.reward = 0, reward

    def __call__(self, completion_ids, **_):
        self.calls += 1
        return [self.reward(ids, self.calls) for ids in completion_ids]

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]


def seed_all(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def weights_of(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def without_times(records):
    return [{k: v for k, v in r.items() if "time" not in k and "second" not in k} for r in records]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}
