"""What the rollout and the trainers ask of a language model."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrl.layout import PackedBatch
from fastrl.models._linear_layers import packed_linear


@dataclass(frozen=True)
class Head:
    """The last layer: logits = scale (hidden weight^T + bias), or softcap tanh of it / softcap.

    Attributes:
        weight: [V, D].
        bias: [V], or None.
        softcap: bound of the logits; not beside a scale.
        scale: factor of the logits.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] -> logits [..., V], in the dtype of the weight under autocast too."""
        with torch.autocast(hidden.device.type, enabled=False):
            logits = F.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        return self._bent(logits)

    def for_sampling(self, rows: int) -> Callable[[Tensor], Tensor]:
        """`logits` in float32, for many calls with up to `rows` rows while the weights stay as
        they are.

        16-bit weights too give float32 sums, as in the ops that learn from what is sampled here:
        logits rounded to 16 bits are those of another policy. On a CPU the weight is copied, into
        a layout that is quicker for few rows.
        """
        dtype, on_cpu = self.weight.dtype, self.weight.is_cpu
        wide = torch.promote_types(dtype, torch.float32)
        if dtype != wide and not on_cpu:
            return self._wide_logits
        bias = None if self.bias is None else self.bias.to(wide)
        weight = self.weight.to(wide)
        product = packed_linear(weight, bias, rows) or functools.partial(
            F.linear, weight=weight, bias=bias
        )

        def logits(hidden: Tensor) -> Tensor:
            with torch.autocast(hidden.device.type, enabled=False):
                return self._bent(product(hidden.to(dtype).to(wide)))

        return logits

    def _wide_logits(self, hidden: Tensor) -> Tensor:
        """Of 16-bit weights on a GPU, without a graph."""
        rows = hidden.reshape(-1, hidden.shape[-1]).to(self.weight.dtype)
        logits = torch.mm(rows, self.weight.t(), torch.float32)
        if self.bias is not None:
            logits += self.bias
        return self._bent(logits).view(*hidden.shape[:-1], -1)

    def _bent(self, logits: Tensor) -> Tensor:
        if self.softcap is not None:
            return torch.tanh(logits / self.softcap) * self.softcap
        return logits if self.scale == 1.0 else logits * self.scale

    def arguments(self, temperature: float) -> dict[str, Any]:
        """What `linear_token_logprobs` and `linear_token_loss` take beside hidden and weight."""
        return {
            "bias": self.bias,
            "softcap": self.softcap,
            "temperature": temperature / self.scale,
        }


class Decoder(Protocol):
    """Rows that are sampled together, each with what it has read so far.

    Prompts are numbered in the order of reading, rows in that of opening. Prompts are opened in
    rising order, and one below the last that was opened is never opened again.
    """

    def read(self, prompts: list[Tensor]) -> Tensor:
        """Read prompts, int64 [P_g] each, once: their last hidden states [P, D]."""
        ...

    def open(self, prompts: list[int]) -> None:
        """One more row behind each of these prompts, after the rows that are there."""
        ...

    def step(self, token_ids: Tensor) -> Tensor:
        """Read one more token a row: token_ids [R] -> hidden [R, D]."""
        ...

    def keep(self, rows: Tensor) -> None:
        """These of the R rows go on, int64 and rising; the others are finished."""
        ...


@runtime_checkable
class PolicyModel(Protocol):
    """A language model that samples with a decoder and scores packed batches.

    `state` is the model's own affair (an LSTM's cell, a cache of keys); others pass it on.
    """

    vocab_size: int
    hidden_dim: int

    @property
    def config(self) -> dict[str, Any]:
        """What `model_from_config` builds the same model from; JSON types only."""
        ...

    @property
    def head(self) -> Head:
        """The last layer, for ops that make its logits by slices."""
        ...

    def hidden_states(self, token_ids: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """token_ids [B, T] -> hidden [B, T, D], and the state after the last token."""
        ...

    def packed_hidden(self, batch: PackedBatch) -> Tensor:
        """hidden [M, D], row m of which predicts batch.target_ids[m]; each token is read once."""
        ...

    def decoder(self, max_rows: int, max_new_tokens: int) -> Decoder:
        """An empty decoder for up to max_rows rows at a time, each of which reads fewer than
        max_new_tokens tokens behind its prompt. The weights stay as they are while it lives."""
        ...
