"""An LSTM language model whose passes are packed: no padding, and each prompt is read once."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

State = tuple[Tensor, Tensor]  # hidden and cell, [layers, B, D] each


class LSTMLanguageModel(nn.Module):
    """Embedding, LSTM and a linear layer to the vocabulary.

    There is no dropout, so training mode and evaluation mode compute the same.

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
        return self.lstm(self._embed(token_ids), state)

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

        device = token_ids.device
        time_major, by_length, rank = (x.to(device) for x in (time_major, by_length, rank))
        state = self.select_state(state, by_length)
        running = int(batch_sizes[0])  # empty sequences stand last and never run
        inputs = PackedSequence(self._embed(token_ids[time_major]), batch_sizes)
        output, final = self.lstm(inputs, tuple(x[:, :running].contiguous() for x in state))
        final = tuple(
            torch.cat([f, x[:, running:]], dim=1) for f, x in zip(final, state, strict=True)
        )
        return output.data[torch.argsort(time_major)], self.select_state(final, rank)

    def prefill(self, prompts: list[Tensor]) -> tuple[Tensor, State]:
        """Read prompts of any lengths, each once: last hidden state [P, D], state."""
        lengths = torch.tensor([0] + [prompt.numel() for prompt in prompts])
        _, state = self.packed_hidden_states(torch.cat(prompts), lengths.cumsum(0))
        return state[0][-1], state

    def decode(self, token_ids: Tensor, state: State) -> tuple[Tensor, State]:
        """Read one more token a row: token_ids [C] -> hidden [C, D], state."""
        hidden, state = self.lstm(self._embed(token_ids.unsqueeze(1)), state)
        return hidden.squeeze(1), state

    def repeat_state(self, state: State, count: int) -> State:
        """Each row `count` times in a row."""
        # expand, not repeat_interleave by index: its backward is a sum in a fixed order.
        hidden, cell = (
            x.unsqueeze(2).expand(-1, -1, count, -1).flatten(1, 2).contiguous() for x in state
        )
        return hidden, cell

    def select_state(self, state: State, rows: Tensor) -> State:
        """The given rows of the state."""
        return state[0].index_select(1, rows), state[1].index_select(1, rows)

    def completion_hidden_states(
        self, prompts: list[Tensor], token_ids: Tensor, cu_seqlens: Tensor
    ) -> Tensor:
        """The hidden states that predict packed completions; each prompt is read once.

        Args:
            prompts: P tensors [P_g] int64, P_g >= 1.
            token_ids: [N] int64, the completions back to back, C = P · G of them: G for the
                first prompt, G for the second, and so on; none is empty.
            cu_seqlens: [C+1] integer.
        Returns:
            hidden: [N, D]; row n has seen the prompt and the completion up to before token n.
        """
        num_completions, num_tokens = cu_seqlens.numel() - 1, token_ids.numel()
        after_prompt, state = self.prefill(prompts)
        count = num_completions // len(prompts)
        state = self.repeat_state(state, count)
        after_prompt = after_prompt.unsqueeze(1).expand(-1, count, -1).flatten(0, 1)

        # A completion's last token predicts nothing: it is not read.
        completion = torch.arange(num_completions + 1, device=token_ids.device)
        is_read = torch.ones_like(token_ids, dtype=torch.bool)
        is_read[cu_seqlens[1:].long() - 1] = False
        after_token, _ = self.packed_hidden_states(
            token_ids[is_read], cu_seqlens - completion, state
        )
        owner = torch.repeat_interleave(completion[:-1], cu_seqlens.diff(), output_size=num_tokens)
        token = torch.arange(num_tokens, device=token_ids.device)
        is_first = token == cu_seqlens[owner]
        source = torch.where(is_first, owner, num_completions + token - 1 - owner)
        return torch.cat([after_prompt, after_token]).index_select(0, source)

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
