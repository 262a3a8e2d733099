"""The cases of every op, each with the reason why it is here: the only place that lists them."""

from bench.case import Case
from bench.cases import attention, decode_attention, linear, returns, token_logprobs

CASES: dict[str, list[Case]] = {
    **returns.CASES,
    **token_logprobs.CASES,
    **linear.CASES,
    **attention.CASES,
    **decode_attention.CASES,
}


def select(ops: list[str], *, quick: bool = False, device: str = "cpu") -> list[Case]:
    """The cases of these ops (none named: of all) for a kind of device, in the lists' order."""
    chosen = ops or list(CASES)
    unknown = [op for op in chosen if op not in CASES]
    if unknown:
        raise ValueError(
            f"bench: expected op in {', '.join(CASES)}, got {unknown[0]}. Name one of these, "
            "or none for all."
        )
    return [
        case
        for op in chosen
        for case in CASES[op]
        if device in case.devices and (not quick or case.quick in (True, device))
    ]
