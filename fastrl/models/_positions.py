"""How many positions a model has: a table of them like GPT-2's, or frequencies that stay."""

from typing import Any

from torch import nn

from fastrl.layout import PackedLayout
from fastrl.ops._checks import fail

_PADDING_ROWS = 2  # OPT's table begins with rows for positions that padding has


def num_positions(trunk: nn.Module) -> int | None:
    """How many positions a model of transformers has; None where any has its meaning, as in plain
    rotary embeddings.

    Of rotary embeddings whose frequencies change beyond a length, that length: there a token's
    hidden state depends on the longest text of the batch, so that what sampling and scoring say of
    it differs.
    """
    config: Any = trunk.config
    text = config.get_text_config()
    limits = [_table_length(trunk, text), *(_steady_length(text, rope) for rope in _ropes(text))]
    return min((limit for limit in limits if limit is not None), default=None)


def _table_length(trunk: nn.Module, config: Any) -> int | None:
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None:
        return None
    tables = [(name, x.weight) for name, x in trunk.named_modules() if isinstance(x, nn.Embedding)]
    for name, table in [*tables, *trunk.named_buffers()]:
        parts = name.split(".")[-2:]  # the last one may be an adapter's
        is_of_positions = any("pos" in part or part == "wpe" for part in parts)
        rows = len(table) if table is not None and table.dim() == 2 else 0
        if is_of_positions and limit <= rows <= limit + _PADDING_ROWS:
            return int(limit)
    return None


def _ropes(config: Any) -> list[dict[str, Any]]:
    """The settings of rotary embeddings, one or one for each type of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [x for x in (rope, *rope.values()) if isinstance(x, dict) and "rope_type" in x]


def _steady_length(config: Any, rope: dict[str, Any]) -> int | None:
    if "dynamic" in rope["rope_type"]:
        return int(config.max_position_embeddings)
    if rope["rope_type"] == "longrope":
        return int(rope["original_max_position_embeddings"])
    return None


def check_positions(op: str, limit: int | None, needed: int, of_what: str) -> None:
    """Raise a ValueError where more positions are needed than the model has."""
    if limit is not None and needed > limit:
        expected = f"{of_what} at most {limit} tokens, as many as the model has positions for"
        raise fail(op, expected, needed, "Shorten them, or take a model of longer texts.")


def longest_path(layout: PackedLayout) -> int:
    """Tokens from a root to the end of its longest path, without a wait for a GPU."""
    ends: list[int] = []
    lengths = layout._host_bounds.diff().tolist()
    for length, parent in zip(lengths, layout._host_prefix.tolist(), strict=True):
        ends.append(length + (ends[parent] if parent >= 0 else 0))
    return max(ends, default=0)
