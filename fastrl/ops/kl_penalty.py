"""Estimators of the KL divergence: checks, and the one definition in fastrl.reference."""

from torch import Tensor

from fastrl import reference
from fastrl.ops import _checks


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, *, estimator: str = "k3") -> Tensor:
    op = "kl_penalty"
    _checks.float_tensor(op, "logprobs", logprobs)
    _checks.like(op, "ref_logprobs", ref_logprobs, "logprobs", logprobs)
    _checks.one_of(op, "estimator", estimator, ("k1", "k2", "k3"))
    return reference.kl_penalty(logprobs, ref_logprobs, estimator=estimator)


kl_penalty.__doc__ = reference.kl_penalty.__doc__
