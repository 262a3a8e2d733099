"""What the rollout and the trainers ask of a language model."""

from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class PolicyModel(Protocol):
    """A language model that samples with a state and scores packed completions.

    `state` is the model's own affair (an LSTM's cell, a cache of keys); others pass it on.
    """

    vocab_size: int
    hidden_dim: int

    @property
    def config(self) -> dict[str, Any]:
        """What `model_from_config` builds the same model from; JSON types only."""
        ...

    def lm_head(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] -> logits [..., V]."""
        ...

    def hidden_states(self, token_ids: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """token_ids [B, T] -> hidden [B, T, D], and the state after the last token."""
        ...

    def prefill(self, prompts: list[Tensor]) -> tuple[Tensor, Any]:
        """Read each prompt once: its last hidden state [P, D], and the state after it."""
        ...

    def decode(self, token_ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Read one more token a row: token_ids [C] -> hidden [C, D], and the state after it."""
        ...

    def repeat_state(self, state: Any, count: int) -> Any:
        """Each row of the state `count` times in a row, for the completions of one prompt."""
        ...

    def select_state(self, state: Any, rows: Tensor) -> Any:
        """The given rows of the state; the others are finished."""
        ...

    def completion_hidden_states(
        self, prompts: list[Tensor], token_ids: Tensor, cu_seqlens: Tensor
    ) -> Tensor:
        """The hidden states [N, D] that predict the packed completions' token_ids [N].

        Every prompt has the same number of completions, which stand together and in order.
        """
        ...
