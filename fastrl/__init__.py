"""fastrl: reinforcement learning on language models, fast and exact.

`fastrl.<op>` is `fastrl.ops.<op>`; `fastrl.reference` has the same functions in plain PyTorch.
Models, rewards and trainers stand in `fastrl.models`, `fastrl.rewards` and `fastrl.trainers`,
drop-ins for TRL, verl and torchrl in `fastrl.compat`; each is imported by its name.
"""

from fastrl import hf, ops, reference
from fastrl.layout import PackedBatch, PackedLayout, pack_groups
from fastrl.ops import *  # noqa: F403  (its __all__ is the contract)

__version__ = "0.1.0"

__all__ = ["PackedBatch", "PackedLayout", "hf", "ops", "pack_groups", "reference"]
__all__ += ops.__all__
