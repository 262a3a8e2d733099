"""Keys and values of the layers of a transformers model, in buffers that are allocated once."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrl.ops._head import empty_matrix


@dataclass
class LayerCache:
    """One layer's buffers.

    Attributes:
        prompt_key, prompt_value: [places, Hkv, Sp, D], each prompt once.
        key, value: [max_rows, T, Hkv, D], what each row has read behind its prompt; a token's heads
            stand together, so that it is written in one go.
    """

    prompt_key: Tensor
    prompt_value: Tensor
    key: Tensor
    value: Tensor


class KVCache:
    """The buffers of all layers, by the layer's number.

    A layer's come into being with its first keys, whose heads, width, dtype and device they have;
    under autocast they have its dtype, as attention would cast the keys.

    Args:
        max_rows, max_tokens: size of the rows' part.
    """

    def __init__(self, max_rows: int, max_tokens: int) -> None:
        self.layers: dict[int, LayerCache] = {}
        self.max_rows, self.max_tokens = max_rows, max_tokens
        self.places = self.length = 0  # size of the prompts' part

    def layer(self, index: int, key: Tensor) -> LayerCache:
        """Of the layer with keys like key [_, Hkv, _, D]."""
        if index not in self.layers:
            _, heads, _, width = key.shape
            of_prompts = (2, self.places, heads, self.length, width)
            of_rows = (2, self.max_rows, self.max_tokens, heads, width)
            self.layers[index] = LayerCache(*_empty(key, of_prompts), *_empty(key, of_rows))
        return self.layers[index]

    def resize_prompts(self, places: int, length: int, kept: list[int]) -> None:
        """Other sizes of the prompts' part; the kept places go to its start."""
        least = min(length, self.length)
        self.places, self.length = places, length
        for layer in self.layers.values():
            for name in ("prompt_key", "prompt_value"):
                old = getattr(layer, name)
                new = old.new_empty((places, old.shape[1], length, old.shape[3]))
                for place, source in enumerate(kept):
                    new[place, :, :least] = old[source, :, :least]
                setattr(layer, name, new)

    def move_rows(self, sources: Tensor, begin: int, num_tokens: int) -> None:
        """Rows sources [n] go to begin, begin + 1, ...; of each its first tokens."""
        for layer in self.layers.values():
            for cache in (layer.key, layer.value):
                used = cache[:, :num_tokens]
                used[begin : begin + len(sources)] = used.index_select(0, sources)


def _empty(key: Tensor, shape: tuple[int, ...]) -> Tensor:
    """On a CPU from memory that an earlier rollout has used: to find it page by page, as it is
    written to, takes a tenth of a rollout of a small model."""
    return empty_matrix(key, shape[0], math.prod(shape[1:]), _dtype(key)).view(shape)


def _dtype(key: Tensor) -> torch.dtype:
    kind = key.device.type
    if key.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return key.dtype
    return torch.get_autocast_dtype(kind)
