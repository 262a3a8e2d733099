"""The log-probabilities of others, from hidden states.

For `linear_token_loss` the policy-gradient loss of the case is put behind them.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.case import Arguments, Case, Outputs, Unavailable
from bench.peers.peer import REFERENCE, Peer, as_tuple, compiled_reference, on_cuda

Call = Callable[[], Outputs]


def _with_loss(build: Callable[[Case, Arguments], Call]) -> Callable[[Case, Arguments], Call]:
    def built(case: Case, arguments: Arguments) -> Call:
        call = build(case, arguments)
        if case.op != "linear_token_loss":
            return call
        loss_fn = arguments["loss_fn"]
        rows = torch.arange(len(arguments["token_ids"]), device=arguments["hidden"].device)

        def with_loss() -> Outputs:
            logprobs = call()[0]
            return loss_fn(logprobs, logprobs, rows).sum(), logprobs.detach()

        return with_loss

    return built


def _refuse(case: Case, *unknown: str, entropy: bool) -> None:
    """What has no entropy is given to forward passes as such."""
    if given := [name for name in unknown if name in case.options]:
        raise Unavailable(f"has no {', '.join(given)}")
    if not entropy and case.mode != "forward" and case.options.get("return_entropy"):
        raise Unavailable("has no entropy to differentiate")


def _tensors(arguments: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    return arguments["hidden"], arguments["weight"], arguments["token_ids"]


@_with_loss
def _eager(case: Case, arguments: Arguments) -> Call:
    """What a training script writes; it has no entropy, and is given to forward passes as such."""
    _refuse(case, "softcap", "temperature", entropy=False)
    hidden, weight, token_ids = _tensors(arguments)

    def run() -> Outputs:
        logits = torch.nn.functional.linear(hidden, weight).float()
        return (logits.log_softmax(-1).gather(-1, token_ids[:, None])[:, 0],)

    return run


@_with_loss
def _torch_fused(case: Case, arguments: Arguments) -> Call:
    _refuse(case, "softcap", "temperature", entropy=False)
    function: Any = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if function is None:
        raise Unavailable("this torch has none: it came with 2.13")
    options = torch.nn.LinearCrossEntropyOptions()
    hidden, weight, token_ids = _tensors(arguments)
    return lambda: (-function(hidden, weight, token_ids, reduction="none", options=options),)


@_with_loss
def _trl_chunked(case: Case, arguments: Arguments) -> Call:
    """As TRL's GRPO calls it; of the further statistics, only what the case asks for."""
    function = importlib.import_module("trl.kernels").ChunkedLogProbFunction
    chunk = importlib.import_module("trl.trainer.utils")._CHUNKED_LOGPROB_CHUNK_SIZE
    hidden, weight, token_ids = _tensors(arguments)
    temperature, softcap = case.options.get("temperature", 1.0), case.options.get("softcap")
    asked: tuple[str, ...] = ("entropy",) if case.options.get("return_entropy") else ()
    if case.op == "token_stats":
        asked = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")

    def run() -> Outputs:
        outputs = function.apply(
            hidden, weight, None, token_ids, temperature, chunk, softcap, 1.0, asked
        )
        return tuple(x for x in outputs if x is not None)

    return run


@_with_loss
def _liger_fused(case: Case, arguments: Arguments) -> Call:
    _refuse(case, "temperature", entropy=False)
    on_cuda(arguments["hidden"])
    functional = importlib.import_module("liger_kernel.transformers.functional")
    hidden, weight, token_ids = _tensors(arguments)
    softcap = case.options.get("softcap")

    def run() -> Outputs:
        loss = functional.liger_fused_linear_cross_entropy(
            hidden, weight, token_ids, reduction="none", softcap=softcap, accum_dtype=torch.float32
        )
        return (-loss.float(),)

    return run


@_with_loss
def _liger_scaled(case: Case, arguments: Arguments) -> Call:
    _refuse(case, "softcap", entropy=True)
    module = importlib.import_module("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    apply = module.LigerFusedLinearScaledCrossEntropyFunction.apply
    hidden, weight, token_ids = _tensors(arguments)
    temperature = case.options.get("temperature", 1.0)
    entropy = bool(case.options.get("return_entropy"))

    def run() -> Outputs:
        outputs = as_tuple(
            apply(hidden, weight, token_ids, temperature=temperature, return_entropy=entropy)
        )
        return (-outputs[0], *outputs[1:])

    return run


@_with_loss
def _cce(case: Case, arguments: Arguments) -> Call:
    """Its kernels on a GPU; on the CPU it compiles the plain form, and says so by its own name."""
    _refuse(case, "temperature", entropy=False)
    function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    hidden, weight, token_ids = _tensors(arguments)
    options = {
        "softcap": case.options.get("softcap"),
        "impl": "cce" if hidden.device.type == "cuda" else "torch_compile",
    }
    return lambda: (-function(hidden, weight, token_ids, reduction="none", **options).float(),)


def of(op: str) -> list[Peer]:
    if op == "token_stats":  # nobody else has them all
        return [REFERENCE, Peer("TRL ChunkedLogProbFunction", "trl", _trl_chunked)]
    return [
        REFERENCE,
        Peer("torch linear + log_softmax + gather", "torch", _eager),
        Peer("torch linear_cross_entropy", "torch", _torch_fused),
        Peer("TRL ChunkedLogProbFunction", "trl", _trl_chunked),
        Peer("Liger fused_linear_cross_entropy", "liger-kernel", _liger_fused),
        Peer("Liger fused_linear_scaled_cross_entropy", "liger-kernel", _liger_scaled),
        Peer("CCE linear_cross_entropy", "cut-cross-entropy", _cce),
        Peer("torch.compile", "torch", compiled_reference),
    ]
