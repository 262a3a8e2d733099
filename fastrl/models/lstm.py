"""An LSTM language model whose passes are packed: no padding, and each prompt is read once."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastrl._paths import offsets, ranges
from fastrl._segments import depths
from fastrl._transfer import on_device
from fastrl.layout import PackedBatch
from fastrl.models.protocol import Head

State = tuple[Tensor, Tensor]  # hidden and cell, [layers, B, D] each


class LSTMLanguageModel(nn.Module):
    """Embedding, LSTM and a linear layer to the vocabulary.

    There is no dropout, so training mode and evaluation mode compute the same, gradients included.

    Args:
        vocab_size: number of token ids, V.
        embed_dim: width of the embedding.
        hidden_dim: width of each LSTM layer, D.
        num_layers: number of LSTM layers.
    Raises:
        ValueError: a size is below 1.  TypeError: a size is not an int.
    """

    def __init__(
        self, vocab_size: int, embed_dim: int, hidden_dim: int, num_layers: int = 1
    ) -> None:
        super().__init__()
        self._config = {
            "vocab_size": vocab_size,
            "embed_dim": embed_dim,
            "hidden_dim": hidden_dim,
            "num_layers": num_layers,
        }
        for name, size in self._config.items():
            if not isinstance(size, int) or isinstance(size, bool):
                raise TypeError(
                    f"LSTMLanguageModel: expected {name} int, got {type(size).__name__}. "
                    "Pass a whole number."
                )
            if size < 1:
                raise ValueError(
                    f"LSTMLanguageModel: expected {name} >= 1, got {size}. Pass a positive size."
                )
        self.vocab_size = vocab_size
        self.hidden_dim = hidden_dim
        self.num_layers = num_layers
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.lstm = nn.LSTM(embed_dim, hidden_dim, num_layers, batch_first=True)
        self.lm_head = nn.Linear(hidden_dim, vocab_size)

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that build this model again, with its `model_type`."""
        return {"model_type": "lstm", **self._config}

    @property
    def head(self) -> Head:
        """The last layer."""
        return Head(self.lm_head.weight, self.lm_head.bias)

    def forward(self, token_ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Logits of the next token after each token.

        Args:
            token_ids: [B, T] int64.
            state: what an earlier call returned, to go on from there; None starts anew.
        Returns:
            logits: [B, T, V].
            state: after the last token, to be passed to the next call.
        Raises:
            ValueError: shape, or an id outside [0, V) on the CPU.  TypeError: not int64.
        """
        hidden, state = self.hidden_states(token_ids, state)
        return self.lm_head(hidden), state

    def hidden_states(self, token_ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """`forward` without the last layer: token_ids [B, T] -> hidden [B, T, D], state."""
        if token_ids.dim() != 2 or token_ids.numel() == 0:
            raise ValueError(
                "LSTMLanguageModel: expected token_ids [B, T] with B >= 1 and T >= 1, got "
                f"{tuple(token_ids.shape)}. Add a batch axis, and drop empty rows."
            )
        if state is not None:
            self._check_state(state, token_ids.shape[0])
        return self._run(self._embed(token_ids), state)

    def packed_hidden_states(
        self, token_ids: Tensor, cu_seqlens: Tensor, state: State | None = None
    ) -> tuple[Tensor, State]:
        """Hidden states of ragged sequences that stand back to back, without padding.

        Args:
            token_ids: [N] int64.
            cu_seqlens: [S+1] integer; sequence s is token_ids[cu_seqlens[s]:cu_seqlens[s+1]],
                and may be empty.
            state: [layers, S, D] twice, one for each sequence; None starts anew.
        Returns:
            hidden: [N, D].
            state: after each sequence's own last token.
        """
        lengths = cu_seqlens.diff().to("cpu", torch.int64)
        num_sequences = lengths.numel()
        if state is None:
            zeros = self.lm_head.weight.new_zeros(self.num_layers, num_sequences, self.hidden_dim)
            state = (zeros, zeros)
        # torch's packed order: time first, and at each time the longest sequences first.
        by_length = torch.argsort(lengths, descending=True, stable=True)
        rank = torch.argsort(by_length)
        sequence = torch.repeat_interleave(torch.arange(num_sequences), lengths)
        position = torch.arange(sequence.numel()) - (lengths.cumsum(0) - lengths)[sequence]
        time_major = torch.argsort(position * num_sequences + rank[sequence])
        batch_sizes = torch.bincount(position)
        if batch_sizes.numel() == 0:
            return self.lm_head.weight.new_zeros(0, self.hidden_dim), state

        orders = time_major, torch.argsort(time_major), by_length, rank
        time_major, packed, by_length, rank = on_device(orders, token_ids.device)
        state = _selected(state, by_length)
        running = int(batch_sizes[0])  # empty sequences stand last and never run
        inputs = PackedSequence(self._embed(token_ids[time_major]), batch_sizes)
        output, final = self._run(inputs, tuple(x[:, :running].contiguous() for x in state))
        final = tuple(
            torch.cat([f, x[:, running:]], dim=1) for f, x in zip(final, state, strict=True)
        )
        return output.data[packed], _selected(final, rank)

    def packed_hidden(self, batch: PackedBatch) -> Tensor:
        """The hidden states that predict a packed batch's targets; each token is read once.

        Args:
            batch: trees of any depth.
        Returns:
            hidden: [M, D]; row m has seen all that comes before target m.
        """
        layout, device = batch.layout, batch.token_ids.device
        starts, parents = layout._host_bounds[:-1], layout._host_prefix
        lengths = _lengths_read(batch)
        depth = torch.tensor(depths(parents), dtype=torch.int64)
        place = torch.empty_like(starts)  # of each segment's state among those of its depth
        row = torch.empty(layout.num_tokens, dtype=torch.int64)  # of each token that is read
        hidden, num_read, state = [self.lm_head.weight.new_zeros(0, self.hidden_dim)], 0, None
        for level in range(int(depth.max()) + 1 if len(depth) else 0):
            segments = (depth == level).nonzero().squeeze(1)
            place[segments] = torch.arange(len(segments))
            tokens = ranges(starts[segments], lengths[segments])
            above, read = on_device([place[parents[segments]], tokens], device)
            if state is not None:
                # Indexing, not index_select: its backward is a sum in a fixed order everywhere.
                state = state[0][:, above], state[1][:, above]
            here, state = self.packed_hidden_states(
                batch.token_ids[read], offsets(lengths[segments]), state
            )
            row[tokens] = torch.arange(num_read, num_read + len(tokens))
            hidden.append(here)
            num_read += len(tokens)
        (predicting,) = on_device([row[batch._host_predict_index]], device)
        return torch.cat(hidden)[predicting]

    def decoder(self, max_rows: int, max_new_tokens: int) -> "LSTMDecoder":
        """See `fastrl.models.PolicyModel`; nothing here is as large as the limits allow."""
        return LSTMDecoder(self)

    def _run(self, inputs: Any, state: tuple[Tensor, ...] | None) -> Any:
        # cuDNN's backward pass refuses what ran in evaluation mode.
        self.lstm.training = torch.is_grad_enabled()
        return self.lstm(inputs, state)

    def _embed(self, token_ids: Tensor) -> Tensor:
        if token_ids.dtype != torch.int64:
            raise TypeError(
                f"LSTMLanguageModel: expected token_ids int64, got {token_ids.dtype}. "
                "Convert them with .long()."
            )
        try:
            return self.embedding(token_ids)
        except IndexError as error:
            raise ValueError(
                f"LSTMLanguageModel: expected token_ids in [0, {self.vocab_size}), got ids from "
                f"{int(token_ids.min())} to {int(token_ids.max())}. "
                "Use the tokenizer that the model was built for."
            ) from error

    def _check_state(self, state: State, batch: int) -> None:
        expected = (self.num_layers, batch, self.hidden_dim)
        if any(tuple(x.shape) != expected for x in state):
            got = " and ".join(str(tuple(x.shape)) for x in state)
            raise ValueError(
                f"LSTMLanguageModel: expected state [layers, B, D] = {expected} twice, got {got}. "
                "Pass the state that the last call returned, for the same rows."
            )


class LSTMDecoder:
    """`fastrl.models.Decoder` of an LSTM: a row's past is a state of fixed size."""

    def __init__(self, model: LSTMLanguageModel) -> None:
        self.model = model
        zeros = model.lm_head.weight.new_zeros(model.num_layers, 0, model.hidden_dim)
        self._prompts: State = (zeros, zeros)
        self._num_forgotten = 0  # prompts before these, whose rows are all open
        self._rows: State = (zeros, zeros)

    def read(self, prompts: list[Tensor]) -> Tensor:
        lengths = torch.tensor([0] + [prompt.numel() for prompt in prompts])
        _, state = self.model.packed_hidden_states(torch.cat(prompts), lengths.cumsum(0))
        self._prompts = _joined(self._prompts, state)
        return state[0][-1]

    def open(self, prompts: list[int]) -> None:
        if not prompts:
            return
        passed = prompts[0] - self._num_forgotten
        self._prompts = self._prompts[0][:, passed:], self._prompts[1][:, passed:]
        self._num_forgotten = prompts[0]
        passed_by = [prompt - self._num_forgotten for prompt in prompts]
        (numbers,) = on_device([torch.tensor(passed_by)], self._rows[0].device)
        self._rows = _joined(self._rows, _selected(self._prompts, numbers))

    def step(self, token_ids: Tensor) -> Tensor:
        embedded = self.model._embed(token_ids.unsqueeze(1))
        hidden, self._rows = self.model._run(embedded, self._rows)
        return hidden.squeeze(1)

    def keep(self, rows: Tensor) -> None:
        self._rows = _selected(self._rows, rows)


def _selected(state: State, rows: Tensor) -> State:
    return state[0].index_select(1, rows), state[1].index_select(1, rows)


def _joined(one: State, other: State) -> State:
    return torch.cat([one[0], other[0]], 1), torch.cat([one[1], other[1]], 1)


def _lengths_read(batch: PackedBatch) -> Tensor:
    """[S]: tokens of each segment without those at its end that predict nothing."""
    bounds, parents = batch.layout._host_bounds, batch.layout._host_prefix
    lengths = bounds.diff()
    predict_index = batch._host_predict_index
    segment = torch.bucketize(predict_index, bounds[1:], right=True)
    needed = torch.zeros_like(lengths)
    needed.scatter_reduce_(0, segment, predict_index - bounds[segment] + 1, "amax")
    is_continued = torch.zeros_like(lengths, dtype=torch.bool)
    is_continued[parents[parents >= 0]] = True
    return torch.where(is_continued, lengths, needed)
