"""Drop-ins for those who have a trainer already: the names, arguments and results of TRL and verl.

`patch_trl` puts TRL's own under its trainers; the functions can also be imported by name. Neither
TRL nor verl is imported here, or needed for the functions.
"""

from fastrl.compat.patch_trl import PatchedTrl, patch_trl
from fastrl.compat.trl import (
    ChunkedLogProbFunction,
    entropy_from_logits,
    selective_log_softmax,
    selective_log_softmax_and_entropy,
)
from fastrl.compat.verl import compute_gae_advantage_return, logprobs_from_logits

__all__ = [
    "ChunkedLogProbFunction",
    "PatchedTrl",
    "compute_gae_advantage_return",
    "entropy_from_logits",
    "logprobs_from_logits",
    "patch_trl",
    "selective_log_softmax",
    "selective_log_softmax_and_entropy",
]
