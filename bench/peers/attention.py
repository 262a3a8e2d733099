"""The attention of others: torch's own, by back end, and FlexAttention."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.case import Arguments, Case, Implementation, Outputs, Unavailable
from bench.peers.peer import REFERENCE, Peer, compiled_reference, on_cuda

_BACK_ENDS = {
    "flash": "FLASH_ATTENTION",
    "cuDNN": "CUDNN_ATTENTION",
    "efficient": "EFFICIENT_ATTENTION",
    "math": "MATH",
}


def _sdpa(back_end: str) -> Implementation:
    """A mask is made once, outside of the clock; where is_causal says it all, none is made."""

    def build(case: Case, arguments: Arguments) -> Callable[[], Outputs]:
        if "softcap" in case.options:
            raise Unavailable("has no softcap")
        if back_end in ("cuDNN", "efficient"):
            on_cuda(arguments["query"])
        kernel = importlib.import_module("torch.nn.attention")
        chosen = getattr(kernel.SDPBackend, _BACK_ENDS[back_end])
        query, key, value = (arguments[k] for k in ("query", "key", "value"))
        options: dict[str, Any] = {"enable_gqa": query.shape[1] != key.shape[1]}
        if _is_plainly_causal(case, arguments):
            options["is_causal"] = True
        elif _hides_keys(case, arguments):
            options["attn_mask"] = visible(case, arguments)
        attend = torch.nn.functional.scaled_dot_product_attention

        def run() -> Outputs:
            with kernel.sdpa_kernel(chosen):
                return (attend(query, key, value, **options),)

        return run

    return build


class _DeterministicInBackward(torch.autograd.Function):
    """attend(*inputs). Whatever its backward pass raises, what comes later is not deterministic."""

    @staticmethod
    def forward(ctx: Any, attend: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        torch.use_deterministic_algorithms(False)
        with torch.enable_grad():
            ctx.inputs = [x.detach().requires_grad_() for x in inputs]
            ctx.output = attend(*ctx.inputs)
        return ctx.output.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # which nobody asks for here
        try:
            return None, *torch.autograd.grad(ctx.output, ctx.inputs, grad, allow_unused=True)
        finally:
            torch.use_deterministic_algorithms(False)


def _deterministic_flash(case: Case, arguments: Arguments) -> Callable[[], Outputs]:
    """The backward pass without atomic additions, as ours is: the same bits in each run."""
    if case.mode == "forward":
        raise Unavailable("differs in its backward pass alone")
    if not _is_plainly_causal(case, arguments):
        raise Unavailable("takes no mask")
    on_cuda(arguments["query"])
    names, plain = ("query", "key", "value"), _sdpa("flash")
    plain(case, arguments)  # says what else it cannot do

    def attend(*inputs: Tensor) -> Tensor:
        return plain(case, arguments | dict(zip(names, inputs, strict=True)))()[0]

    given = [arguments[name] for name in names]
    return lambda: (_DeterministicInBackward.apply(attend, *given),)


def _is_plainly_causal(case: Case, arguments: Arguments) -> bool:
    """Square and causal, with nothing else to hide."""
    same = arguments["query"].shape[2] == arguments["key"].shape[2]
    return _is_causal(case) and same and not {"layout", "key_end"} & set(arguments) and (
        "window" not in case.options
    )  # fmt: skip


def _is_causal(case: Case) -> bool:
    return case.options.get("causal", True)


def _hides_keys(case: Case, arguments: Arguments) -> bool:
    one_query = arguments["query"].shape[2] == 1
    alone = not {"layout", "key_end"} & set(arguments) and "window" not in case.options
    return not (alone and (one_query or not _is_causal(case)))


def _rule(case: Case, arguments: Arguments) -> Callable[..., Tensor]:
    """Whether query i of row b sees key j, in the form that FlexAttention takes."""
    window = case.options.get("window")
    layout, key_end = arguments.get("layout"), arguments.get("key_end")
    device = arguments["query"].device
    num_queries, num_keys = arguments["query"].shape[2], arguments["key"].shape[2]
    if layout is not None:
        until, position = layout.visible_until, layout.position_ids
        if window is None:
            return lambda b, h, i, j: (j <= i) & (i < until[j])
        return lambda b, h, i, j: (j <= i) & (i < until[j]) & (position[i] - window < position[j])
    end = torch.full((case.shape[0],), num_keys, device=device) if key_end is None else key_end
    if not _is_causal(case):
        return lambda b, h, i, j: j < end[b]
    if window is None:
        return lambda b, h, i, j: j <= end[b] - num_queries + i
    return lambda b, h, i, j: (
        (j <= end[b] - num_queries + i) & (end[b] - num_queries + i - window < j)
    )


def visible(case: Case, arguments: Arguments) -> Tensor:
    """[B, 1, T, S] bool."""
    query, key = arguments["query"], arguments["key"]
    device = query.device
    b = torch.arange(query.shape[0], device=device)[:, None, None]
    i = torch.arange(query.shape[2], device=device)[None, :, None]
    j = torch.arange(key.shape[2], device=device)[None, None, :]
    mask = _rule(case, arguments)(b, 0, i, j)
    return mask.expand(query.shape[0], query.shape[2], key.shape[2])[:, None].contiguous()


def _flex(case: Case, arguments: Arguments) -> Callable[[], Outputs]:
    """Compiled, with its block mask made once, outside of the clock."""
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    query, key, value = (arguments[k] for k in ("query", "key", "value"))
    options: dict[str, Any] = {"enable_gqa": query.shape[1] != key.shape[1]}
    if _hides_keys(case, arguments):
        rows = query.shape[0] if "key_end" in arguments else None
        options["block_mask"] = flex.create_block_mask(
            _rule(case, arguments), rows, None, query.shape[2], key.shape[2], query.device
        )
    if (softcap := case.options.get("softcap")) is not None:
        options["score_mod"] = lambda score, *_: softcap * torch.tanh(score / softcap)
    attend = torch.compile(flex.flex_attention, dynamic=False)
    return lambda: (attend(query, key, value, **options),)


def _copies(case: Case, arguments: Arguments) -> Callable[[], Outputs]:
    """What trainers do without layouts: the prompt once for each of its completions, which end in
    padding where they differ in length; through flash, which needs no mask for that. Making the
    copies is timed: their gradients must be added up, too."""
    layout = arguments.get("layout")
    if layout is None or "window" in case.options or "softcap" in case.options:
        raise Unavailable("is for shared prompts alone")
    prompt, lengths = _depth_one(layout)
    rows, longest = len(lengths), max(lengths)
    query, key, value = (arguments[k] for k in ("query", "key", "value"))
    is_token = torch.arange(longest) < torch.tensor(lengths)[:, None]
    # What stands in the padding is seen by no token before it; its own results are left out.
    padded = (is_token.flatten().cumsum(0) - 1 + prompt).to(query.device)
    tokens = is_token.flatten().nonzero()[:, 0].to(query.device)
    is_ragged = not bool(is_token.all())
    kernel = importlib.import_module("torch.nn.attention")

    def copies(x: Tensor) -> Tensor:  # [1, H, N, D] -> [C, H, prompt + longest, D]
        own = x[0].index_select(1, padded) if is_ragged else x[0, :, prompt:]
        each = own.unflatten(1, (rows, longest)).transpose(0, 1)
        return torch.cat([x[:, :, :prompt].expand(rows, -1, -1, -1), each], dim=2)

    def run() -> Outputs:
        gqa = query.shape[1] != key.shape[1]
        with kernel.sdpa_kernel(kernel.SDPBackend.FLASH_ATTENTION):
            out = torch.nn.functional.scaled_dot_product_attention(
                copies(query), copies(key), copies(value), is_causal=True, enable_gqa=gqa
            )
        own = out[:, :, prompt:].transpose(0, 1).flatten(1, 2)
        own = own.index_select(1, tokens) if is_ragged else own
        return (torch.cat([out[0, :, :prompt], own], dim=1)[None],)

    return run


def _depth_one(layout: Any) -> tuple[int, list[int]]:
    """Lengths of the one prompt and of its completions."""
    bounds, prefix = layout.cu_seqlens.tolist(), layout.prefix.tolist()
    if prefix[0] != -1 or any(p != 0 for p in prefix[1:]):
        raise Unavailable("is for one prompt and its completions")
    lengths = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
    return lengths[0], lengths[1:]


def of(op: str) -> list[Peer]:
    return [
        REFERENCE,
        *(Peer(f"torch SDPA, {name}", "torch", _sdpa(name)) for name in _BACK_ENDS),
        Peer("torch SDPA, flash, deterministic", "torch", _deterministic_flash),
        Peer("torch SDPA, a copy of the prompt each", "torch", _copies),
        Peer("torch FlexAttention", "torch", _flex),
        Peer("torch.compile", "torch", compiled_reference),
    ]
