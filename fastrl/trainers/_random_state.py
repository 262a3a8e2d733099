"""The state of every global random number generator: Python's, numpy's, torch's on each device.

Ours draw from none of them, but a reward function, an outside engine or a module may.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

Tree = dict[str, Any]


def random_state() -> Tree:
    """All states, as a tree for `fastrl.trainers._tree`."""
    version, words, gauss = random.getstate()
    state: Tree = {
        "python": {"version": version, "state": torch.tensor(words), "gauss": gauss},
        "numpy": _numpy_tree(np.random.get_state(legacy=False)),
        "torch": torch.get_rng_state(),
    }
    # Asking for their states would start CUDA, in a run that does without it.
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: Tree) -> None:
    """Set what `random_state` gave.

    The run may go on with other devices: one that the state does not know keeps its generator.
    """
    random.setstate(_python_state(state["python"]))
    np.random.set_state(_numpy_state(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        devices = range(torch.cuda.device_count())
        for device, generator in zip(devices, state.get("cuda", []), strict=False):
            torch.cuda.set_rng_state(generator, device)


def seed_generators(seed: int) -> None:
    """What a reward function may draw from, at a start of its own: Python's, numpy's, torch's."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def keeping_random_state() -> Iterator[None]:
    """Whatever is drawn meanwhile, the generators come back to where they were."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


def check_random_state(state: Tree) -> None:
    """Raise an exception where `set_random_state` would, and change nothing."""
    random.Random().setstate(_python_state(state["python"]))
    numpy_state = _numpy_state(state["numpy"])
    bit_generator = getattr(np.random, numpy_state["bit_generator"])
    np.random.RandomState(bit_generator()).set_state(numpy_state)
    torch.Generator().set_state(state["torch"])


def _python_state(state: Tree) -> tuple[int, tuple[int, ...], float | None]:
    return state["version"], tuple(state["state"].tolist()), state["gauss"]


def _numpy_tree(node: Any) -> Any:
    """Arrays of unsigned words as int64 tensors, dicts as they are."""
    if isinstance(node, dict):
        return {key: _numpy_tree(value) for key, value in node.items()}
    return torch.from_numpy(node.astype(np.int64)) if isinstance(node, np.ndarray) else node


def _numpy_state(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _numpy_state(value) for key, value in node.items()}
    # int64 back to unsigned words, modulo their size
    return node.numpy().astype(np.uint64) if isinstance(node, Tensor) else node
