"""Drop-ins for those who have a trainer already: names, arguments and results as in TRL, verl and
TorchRL.

`patch_trl` puts TRL's own under its trainers; the functions can also be imported by name. None of
the three is imported here, or needed for the functions. Theirs can be differentiated again and in
forward mode; ours refuse both, apart from log-probs and entropy in float64.
"""

from fastrl.compat.patch_trl import PatchedTrl, patch_trl
from fastrl.compat.torchrl import (
    generalized_advantage_estimate,
    vec_generalized_advantage_estimate,
    vtrace_advantage_estimate,
)
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
    "generalized_advantage_estimate",
    "logprobs_from_logits",
    "patch_trl",
    "selective_log_softmax",
    "selective_log_softmax_and_entropy",
    "vec_generalized_advantage_estimate",
    "vtrace_advantage_estimate",
]
