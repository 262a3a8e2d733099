"""The sampling of others."""

from collections.abc import Callable

import torch

from bench.case import Arguments, Case, Outputs
from bench.peers.peer import REFERENCE, Peer, compiled


def _multinomial(case: Case, arguments: Arguments) -> Callable[[], Outputs]:
    """softmax and multinomial; its random numbers are its own, so only the log-probs compare."""
    logits = arguments["logits"]
    temperature = case.options.get("temperature", 1.0)
    top_k, top_p = case.options.get("top_k"), case.options.get("top_p")

    def run() -> Outputs:
        scaled = logits / temperature
        candidates, ids = scaled, None
        if top_k is not None:
            candidates, ids = scaled.topk(top_k, dim=-1)
        p = candidates.softmax(-1)
        if top_p is not None:
            p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)
        drawn = torch.multinomial(p, 1)
        token_ids = drawn if ids is None else ids.gather(-1, drawn)
        return token_ids[:, 0], scaled.log_softmax(-1).gather(-1, token_ids)[:, 0]

    return run


def _compiled_sampling(case: Case, arguments: Arguments) -> Callable[[], Outputs]:
    return compiled(_multinomial(case, arguments))


def of(op: str) -> list[Peer]:
    return [
        REFERENCE,
        Peer("torch multinomial", "torch", _multinomial),
        Peer("torch.compile", "torch", _compiled_sampling),
    ]
