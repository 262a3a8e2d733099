"""What users call: the contract's functions, checked and fast, on the tensors' own device.

The tensor's device chooses the implementation through torch's dispatcher; there is no flag and no
silent fallback. `fastrl.reference` has the same names and signatures in plain PyTorch. What has a
kernel can be differentiated once, in reverse mode; where more is asked it says so.
"""

from fastrl.ops.actor_critic_loss import actor_critic_loss
from fastrl.ops.attention import attention
from fastrl.ops.decode_attention import decode_attention
from fastrl.ops.discounted_returns import discounted_returns
from fastrl.ops.gae import gae
from fastrl.ops.group_advantages import group_advantages
from fastrl.ops.kl_penalty import kl_penalty
from fastrl.ops.lambda_returns import lambda_returns
from fastrl.ops.linear_token_logprobs import linear_token_logprobs
from fastrl.ops.linear_token_loss import linear_token_loss
from fastrl.ops.n_step_returns import n_step_returns
from fastrl.ops.policy_gradient_loss import policy_gradient_loss
from fastrl.ops.ppo_loss import ppo_loss
from fastrl.ops.retrace_returns import retrace_returns
from fastrl.ops.sample_tokens import sample_tokens
from fastrl.ops.token_logprobs import token_logprobs
from fastrl.ops.token_stats import token_stats
from fastrl.ops.value_loss import value_loss
from fastrl.ops.vtrace import vtrace
from fastrl.ops.whiten import whiten

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
