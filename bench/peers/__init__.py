"""Who runs beside us: each named with its version, or listed with the reason why it does not."""

from bench.peers import attention, decode_attention, linear, returns, sample_tokens, token_logprobs
from bench.peers.peer import REFERENCE, Peer, pinned, version_of

_OF = {
    "attention": attention.of,
    "decode_attention": decode_attention.of,
    "linear_token_logprobs": linear.of,
    "linear_token_loss": linear.of,
    "sample_tokens": sample_tokens.of,
    "token_logprobs": token_logprobs.of,
    "token_stats": linear.of,
}

__all__ = ["REFERENCE", "Peer", "of", "pinned", "version_of"]


def of(op: str) -> list[Peer]:
    """Every peer of this op, whether it is installed or not; the definition first."""
    return _OF.get(op, returns.of)(op)
