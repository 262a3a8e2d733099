"""Drop-ins for those who have a trainer already: the names, arguments and results of TRL and verl.

Neither TRL nor verl is imported here, or needed.
"""

from fastrl.compat.trl import (
    ChunkedLogProbFunction,
    entropy_from_logits,
    selective_log_softmax,
    selective_log_softmax_and_entropy,
)
from fastrl.compat.verl import logprobs_from_logits

__all__ = [
    "ChunkedLogProbFunction",
    "entropy_from_logits",
    "logprobs_from_logits",
    "selective_log_softmax",
    "selective_log_softmax_and_entropy",
]
