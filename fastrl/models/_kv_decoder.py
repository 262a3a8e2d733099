"""Decoding with the layers of a transformers model: a prompt is read once, for all its rows.

A finished row leaves every matrix product at once. In the cache it stays, as a row without keys of
its own, until a fifth of the rows are such or their room is needed: to move is dear, to skip is
not.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastrl import ops
from fastrl._transfer import on_device
from fastrl.layout import PackedLayout
from fastrl.models._kv_cache import KVCache
from fastrl.models._kv_prompts import Prompts
from fastrl.models._linear_layers import PackedLayers
from fastrl.ops._checks import fail
from fastrl.ops.decode_attention import decode_known, decode_step

_TOKENS_AT_A_TIME = 16384  # of prompts that are read together; bounds the layers' activations
_OTHER_MODEL = "Its caches cannot be kept by layer: take another model."


class KVDecoder:
    """`fastrl.models.Decoder` of a transformers model on fastrl's attention.

    It is also what the attention function calls in each layer (`fastrl.hf._attention.Decoding`).

    Args:
        trunk: the model below its head.
        max_rows: most rows at a time.
        max_new_tokens: each row reads fewer than these.
    Raises:
        ValueError: layers of the model share caches, or do not say which layer they are.
    """

    def __init__(self, trunk: nn.Module, max_rows: int, max_new_tokens: int) -> None:
        whole: Any = trunk.config
        config = whole.get_text_config()  # one part of it in models that see images too
        if getattr(config, "num_kv_shared_layers", 0):
            got = f"num_kv_shared_layers {config.num_kv_shared_layers}"
            raise fail("decoder", "a cache of its own in each layer", got, _OTHER_MODEL)
        self._trunk, self._num_layers = trunk, config.num_hidden_layers
        self._cache = KVCache(max_rows, max(max_new_tokens - 1, 1))
        self._layers = PackedLayers(trunk, max_rows)
        self._device = next(trunk.parameters()).device
        self._prompts = Prompts()
        self._where: tuple[Tensor, Tensor] | None = None  # place and position of what is being read
        self._stored: list[int] = []  # the layers that have stored it

        self._owners: list[int] = []  # the prompt of each row of the cache
        none = torch.zeros(0, dtype=torch.int64, device=self._device)
        # Of the rows that run: where they stand, how much they have read, and behind how much.
        self._rows = self._num_read = self._prompt_length = none
        self._runs = self._key_end = none.int()  # of each row of the cache: 1 or 0, and its keys
        self._most_read = 0  # bound of all _num_read
        self._prefixes: dict[str, Any] | None = None  # of the rows; None where they have changed
        self._in_use: dict[int, tuple[Tensor, ...]] = {}  # what of each layer's buffers
        self._accepted: set[int] = set()  # layers whose buffers in use have been checked
        self._numbers: dict[int, Any] = {}  # of each layer's attention, once it has made a step
        self._written = none  # where, of the rows' buffers, this step writes
        self._no_mask = none.view(1, 1, 1, 0)  # transformers makes none beside one of four axes

    @property
    def most_keys(self) -> int:
        return self._cache.length + self._cache.max_tokens

    @torch.no_grad()
    def read(self, prompts: list[Tensor]) -> Tensor:
        lengths = [len(prompt) for prompt in prompts]
        if self._prompts.are_full(lengths, self._cache.places, self._cache.length):
            kept = self._prompts.move_to_the_start(self._owners)
            self._cache.resize_prompts(*self._prompts.sizes(lengths, self._cache.places), kept)
        place = self._prompts.add(lengths)
        self._prefixes = None
        hidden, begin = [], 0
        while begin < len(prompts):
            end, num_tokens = begin + 1, lengths[begin]
            while end < len(prompts) and num_tokens + lengths[end] <= _TOKENS_AT_A_TIME:
                num_tokens, end = num_tokens + lengths[end], end + 1
            hidden.append(self._read_packed(prompts[begin:end], place + begin))
            begin = end
        return torch.cat(hidden)

    def _read_packed(self, prompts: list[Tensor], place: int) -> Tensor:
        bounds = torch.tensor([0] + [len(prompt) for prompt in prompts]).cumsum(0)
        roots = torch.full((len(prompts),), -1, dtype=torch.int32)
        layout = PackedLayout(bounds.int(), roots).to(self._device)
        self._where = layout.segment_ids + place, layout.position_ids
        self._stored.clear()
        with self._layers.in_use():
            output = self._trunk(
                input_ids=torch.cat(prompts)[None],
                position_ids=layout.position_ids[None],
                token_positions=layout.position_ids[None],
                use_cache=False,
                layout=layout,
                decoding=self,
            )
        self._where = None
        if sorted(self._stored) != list(range(self._num_layers)):
            expected = f"keys from each of {self._num_layers} layers, once"
            raise fail("decoder", expected, f"those of layers {self._stored}", _OTHER_MODEL)
        (last,) = on_device([bounds[1:] - 1], self._device)
        return output.last_hidden_state[0, last]

    def store(self, module: nn.Module, key: Tensor, value: Tensor) -> None:
        """Of the attention function: keys and values [1, Hkv, N, D] of the prompts being read."""
        index = getattr(module, "layer_idx", None)
        if index is None:
            where = type(module).__name__
            raise fail("decoder", f"layer_idx in {where}", "none", _OTHER_MODEL)
        self._stored.append(index)
        layer = self._cache.layer(index, key)
        assert self._where is not None
        place, position = self._where
        for cache, x in ((layer.prompt_key, key), (layer.prompt_value, value)):
            cache[place, :, position] = x[0].transpose(0, 1).to(cache.dtype)

    @torch.no_grad()
    def open(self, prompts: list[int]) -> None:
        if not prompts:
            return
        if len(self._owners) + len(prompts) > self._cache.max_rows:
            self._compact()
        begin, count = len(self._owners), len(prompts)
        if begin + count > self._cache.max_rows:
            limit = f"at most max_rows = {self._cache.max_rows} rows"
            raise fail("decoder", limit, begin + count, "Open fewer.")
        self._owners += prompts
        numbers = torch.tensor([self._prompts.length_of(prompt) for prompt in prompts])
        (lengths,) = on_device([numbers], self._device)
        new = torch.arange(begin, begin + count, device=self._device)
        self._prompts.last_opened = prompts[-1]
        self._rows = torch.cat([self._rows, new])
        self._num_read = torch.cat([self._num_read, torch.zeros_like(new)])
        self._prompt_length = torch.cat([self._prompt_length, lengths])
        self._key_end = torch.cat([self._key_end, torch.zeros_like(new).int()])
        self._runs = torch.cat([self._runs, torch.ones_like(new).int()])
        self._prefixes = None

    @torch.no_grad()
    def step(self, token_ids: Tensor) -> Tensor:
        if self._most_read == self._cache.max_tokens:
            self._find_room()
        if self._prefixes is None:
            self._settle()
        self._key_end += self._runs
        self._written = self._rows * self._cache.max_tokens + self._num_read
        self._most_read += 1
        with self._layers.in_use():
            output = self._trunk(
                input_ids=token_ids[:, None],
                position_ids=(self._prompt_length + self._num_read)[:, None],
                attention_mask=self._no_mask,
                use_cache=False,
                decoding=self,
            )
        self._num_read += 1
        return output.last_hidden_state[:, 0]

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **numbers: Any
    ) -> tuple[Tensor, Tensor]:
        """Of the attention function: one token a row, [R, H, 1, D] each, into the cache."""
        index: int = module.layer_idx  # type: ignore[assignment]
        flat_key, flat_value, own_key, own_value, *prompts = self._in_use[index]
        dtype = own_key.dtype
        for cache, x in ((flat_key, key), (flat_value, value)):
            cache.index_copy_(0, self._written, x.reshape(len(x), -1).to(dtype))
        query = query.to(dtype)
        all_run = len(query) == len(own_key)
        if not all_run:
            some = query.new_zeros((len(own_key), *query.shape[1:]))
            query = some.index_copy_(0, self._rows, query)
        assert self._prefixes is not None
        given = {
            "key_end": self._key_end,
            "prefix_key": prompts[0],
            "prefix_value": prompts[1],
            **self._prefixes,
            **numbers,
        }
        if index in self._accepted:
            output, lse = decode_known(query, own_key, own_value, **given)
        else:
            output, lse = ops.decode_attention(query, own_key, own_value, return_lse=True, **given)
        self._accepted.add(index)
        self._numbers[index] = numbers
        if all_run:
            return output, lse
        return output.index_select(0, self._rows), lse.index_select(0, self._rows)

    def knows(self, index: int) -> bool:
        """Whether the layer has told the numbers of its attention, in a step of its own code."""
        return index in self._numbers

    def attend_projected(self, index: int, projected: Tensor, *angles_and_norms: Any) -> Tensor:
        """Of a quick block, where `knows`: what `attend` does, and what the layer does before it;
        see `decode_step`."""
        _, _, own_key, own_value, *prompts = self._in_use[index]
        assert self._prefixes is not None
        caches = (self._rows, own_key, own_value, self._key_end, *prompts)
        of_prompts, numbers = self._prefixes.values(), self._numbers[index]
        return decode_step(projected, *angles_and_norms, *caches, *of_prompts, **numbers)

    @torch.no_grad()
    def keep(self, rows: Tensor) -> None:
        self._rows = self._rows[rows]
        self._num_read, self._prompt_length = self._num_read[rows], self._prompt_length[rows]
        if len(self._rows) < 0.8 * len(self._owners):
            self._compact()
        else:
            self._runs = torch.zeros_like(self._runs).index_fill_(0, self._rows, 1)
            self._key_end *= self._runs

    def _compact(self) -> None:
        """Close the gaps that finished rows have left."""
        rows = self._rows.tolist()
        begin = next((i for i, row in enumerate(rows) if i != row), len(rows))
        most = min(self._most_read, self._cache.max_tokens)
        self._cache.move_rows(self._rows[begin:], begin, most)
        self._owners = [self._owners[row] for row in rows]
        self._rows = torch.arange(len(rows), device=self._device)
        self._key_end, self._runs = self._num_read.int(), torch.ones_like(self._rows).int()
        self._most_read = 0 if not rows else self._most_read
        self._prefixes = None

    def _find_room(self) -> None:
        """The bound as it is without the rows that are gone. A step too many is the error that
        attention would raise, before the keys have been written to where there is no room."""
        self._most_read, most = int(self._num_read.max()), self._cache.max_tokens
        if self._most_read == most:
            remedy = "key_end counts the keys of its cache."
            raise fail("decode_attention", f"key_end in [0, {most}]", most + 1, remedy)

    def _settle(self) -> None:
        """What attention is told of the prompts, once after a change of rows or prompts."""
        self._prompts.forget_leading(self._owners)
        places, *numbers = self._prompts.in_use(self._owners)
        of_prompts = [torch.tensor(x, dtype=torch.int32) for x in numbers]
        lengths, bounds = on_device(of_prompts, self._device)
        self._prefixes = {"prefix_end": lengths, "prefix_cu_rows": bounds}
        rows = slice(len(self._owners))
        self._accepted.clear()
        for index, x in self._cache.layers.items():
            flat = (x.key.flatten(0, 1).flatten(1), x.value.flatten(0, 1).flatten(1))
            own = (x.key[rows].transpose(1, 2), x.value[rows].transpose(1, 2))
            self._in_use[index] = *flat, *own, x.prompt_key[places], x.prompt_value[places]
