"""Hidden states and heads of the cases of linear_token_logprobs, linear_token_loss and
token_stats."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.case import Arguments, Case, Outputs, Workload
from bench.workloads.pieces import BLOCK, SEED, in_blocks, size_in_bytes, whole
from bench.workloads.token_logprobs import likely
from fastrl import reference

_LEARNED = ("hidden", "weight")


@dataclass(frozen=True)
class PolicyGradient:
    """loss_fn of linear_token_loss: - advantage * log-prob."""

    advantages: Tensor

    def __call__(self, logprobs: Tensor, entropy: Tensor, rows: Tensor) -> Tensor:
        return -self.advantages[rows] * logprobs


def make_hidden(case: Case, device: torch.device) -> Arguments:
    """shape: (rows, D, V). Logits of variance 1; every second row leans towards its token."""
    rows, width, vocab = case.shape
    generator = torch.Generator(device).manual_seed(SEED)
    weight = torch.randn(vocab, width, generator=generator, device=device) * width**-0.5
    hidden = torch.randn(rows, width, generator=generator, device=device)
    token_ids = torch.randint(vocab, (rows,), generator=generator, device=device)
    boost = 20 * likely(rows, torch.Generator().manual_seed(SEED)).to(device)
    hidden += boost[:, None] * weight[token_ids]
    arguments: Arguments = {
        "hidden": hidden.to(case.dtype),
        "weight": weight.to(case.dtype),
        "token_ids": token_ids,
    }
    if case.op == "linear_token_loss":
        advantages = torch.randn(rows, generator=generator, device=device)
        arguments["loss_fn"] = PolicyGradient(advantages)
    return arguments


def linear_bytes(case: Case, arguments: Arguments) -> int:
    """Forward: hidden, weight and ids in, a log-prob (and an entropy) a row out. Backward: these
    in again, the gradients out."""
    sizes = {name: size_in_bytes(arguments[name]) for name in _LEARNED}
    matrices = sum(sizes.values())
    outputs = 4 * (2 if case.options.get("return_entropy") else 1)
    outputs = {"linear_token_loss": 8, "token_stats": 17}.get(case.op, outputs)
    forward = matrices + (8 + outputs) * case.shape[0]
    backward = forward + matrices - sum(sizes[name] for name in case.frozen)
    return {"forward": forward, "backward": backward, "both": forward + backward}[case.mode]


def linear_flops(case: Case, arguments: Arguments) -> int:
    """One product forward, and one backward for each of hidden and weight that is learned; who
    computes the logits again does more than counted."""
    rows, width, vocab = case.shape
    backward = len(_LEARNED) - len(case.frozen)
    products = {"forward": 1, "backward": backward, "both": 1 + backward}[case.mode]
    return 2 * rows * width * vocab * products


def linear_definition(case: Case, arguments: Arguments) -> Outputs:
    """fastrl.reference, for some rows at a time."""
    hidden, weight, token_ids = (arguments[k] for k in ("hidden", "weight", "token_ids"))
    has_loss = case.op == "linear_token_loss"
    options = {"return_entropy": True} if has_loss else case.options
    function: Any = reference.linear_token_logprobs
    if case.op == "token_stats":
        function = reference.token_stats

    def rows(start: int, x: Tensor, ids: Tensor) -> Outputs:
        outputs = function(x, weight, ids, **options)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    outputs = in_blocks(rows, [hidden, token_ids], max(1, BLOCK // len(weight)), axis=0)
    if not has_loss:
        return outputs
    loss = arguments["loss_fn"](*outputs, torch.arange(len(hidden), device=hidden.device)).sum()
    return loss, *(x.detach() for x in outputs)


def _one_a_row(case: Case) -> tuple[int, ...]:
    return case.shape[:1]


def _scalar(case: Case) -> tuple[int, ...]:
    return ()


def _product(case: Case) -> tuple[int, int, int]:
    return case.shape[0], case.shape[1], case.shape[2]


WORKLOADS = {
    "linear_token_logprobs": Workload(
        make_hidden, linear_bytes, _LEARNED, whole, linear_definition,
        upstream_shape=_one_a_row, count_flops=linear_flops, product_shape=_product,
    ),
    "linear_token_loss": Workload(
        make_hidden, linear_bytes, _LEARNED, whole, linear_definition,
        upstream_shape=_scalar, count_flops=linear_flops, product_shape=_product, learns_from=1,
    ),
    "token_stats": Workload(
        make_hidden, linear_bytes, (), whole, linear_definition,
        upstream_shape=_one_a_row, count_flops=linear_flops, product_shape=_product,
    ),
}  # fmt: skip
