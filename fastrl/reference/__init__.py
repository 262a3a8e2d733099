"""What each op means: plain PyTorch, differentiable, correct in float64.

The functions have the names and signatures of `fastrl.ops`, which checks arguments; here they are
taken as valid. Inputs may be strided and have any leading shape; 16-bit inputs are computed in
float32, and float64 stays float64, so `reference.f(x.double())` is the truth that an op is
measured against.
"""

from fastrl.reference.actor_critic_loss import actor_critic_loss
from fastrl.reference.attention import attention
from fastrl.reference.decode_attention import decode_attention
from fastrl.reference.discounted_returns import discounted_returns
from fastrl.reference.gae import gae
from fastrl.reference.group_advantages import group_advantages
from fastrl.reference.kl_penalty import kl_penalty
from fastrl.reference.lambda_returns import lambda_returns
from fastrl.reference.linear_token_logprobs import linear_token_logprobs
from fastrl.reference.linear_token_loss import linear_token_loss
from fastrl.reference.n_step_returns import n_step_returns
from fastrl.reference.policy_gradient_loss import policy_gradient_loss
from fastrl.reference.ppo_loss import ppo_loss
from fastrl.reference.retrace_returns import retrace_returns
from fastrl.reference.sample_tokens import sample_tokens
from fastrl.reference.token_logprobs import token_logprobs
from fastrl.reference.token_stats import token_stats
from fastrl.reference.value_loss import value_loss
from fastrl.reference.vtrace import vtrace
from fastrl.reference.whiten import whiten

__all__ = [
    "actor_critic_loss",
    "attention",
    "decode_attention",
    "discounted_returns",
    "gae",
    "group_advantages",
    "kl_penalty",
    "lambda_returns",
    "linear_token_logprobs",
    "linear_token_loss",
    "n_step_returns",
    "policy_gradient_loss",
    "ppo_loss",
    "retrace_returns",
    "sample_tokens",
    "token_logprobs",
    "token_stats",
    "value_loss",
    "vtrace",
    "whiten",
]
