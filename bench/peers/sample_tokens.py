"""The sampling of others."""

from collections.abc import Callable

import torch
from torch import Tensor

from bench.case import Arguments, Case, Outputs
from bench.peers.peer import REFERENCE, Peer, compiled


def _multinomial(case: Case, arguments: Arguments) -> Callable[[], Outputs]:
    """softmax and multinomial, and log_softmax for the log-prob; its random numbers are its own, so
    only the log-probs compare."""
    draw = _draw(case)

    def run() -> Outputs:
        scaled, token_ids = draw(arguments["logits"])
        return token_ids[:, 0], scaled.log_softmax(-1).gather(-1, token_ids)[:, 0]

    return run


def _multinomial_alone(case: Case, arguments: Arguments) -> Callable[[], Outputs]:
    draw = _draw(case)
    return lambda: (draw(arguments["logits"])[1][:, 0],)


def _draw(case: Case) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The scaled logits, and ids [rows, 1] drawn from them, as generation libraries do it."""
    temperature = case.options.get("temperature", 1.0)
    top_k, top_p = case.options.get("top_k"), case.options.get("top_p")

    def draw(logits: Tensor) -> tuple[Tensor, Tensor]:
        scaled = logits if temperature == 1 else logits / temperature
        candidates, ids = scaled, None
        if top_k is not None:
            candidates, ids = scaled.topk(top_k, dim=-1)
        elif top_p is not None:
            candidates, ids = scaled.sort(dim=-1, descending=True)
        p = candidates.softmax(-1)
        if top_p is not None:
            p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)
        drawn = torch.multinomial(p, 1)
        return scaled, drawn if ids is None else ids.gather(-1, drawn)

    return draw


def _compiled_sampling(case: Case, arguments: Arguments) -> Callable[[], Outputs]:
    return compiled(_multinomial(case, arguments))


def of(op: str) -> list[Peer]:
    return [
        REFERENCE,
        Peer("torch multinomial", "torch", _multinomial),
        Peer("torch multinomial, no log-prob", "torch", _multinomial_alone),
        Peer("torch.compile", "torch", _compiled_sampling),
    ]
