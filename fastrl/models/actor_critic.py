"""A language model with a value for every token."""

from typing import Any

from torch import Tensor, nn

from fastrl.models.protocol import PolicyModel


class ActorCritic(nn.Module):
    """A value head on the hidden states of a language model.

    The value at a token is V(w_1:t), what the critic expects to follow. The head starts at zero,
    so the first advantages are the returns.

    Args:
        language_model: the actor, for example `LSTMLanguageModel`; it is shared, not copied.
    Raises:
        TypeError: language_model lacks what a policy needs (`fastrl.models.PolicyModel`).
    """

    critic = None

    def __init__(self, language_model: nn.Module) -> None:
        super().__init__()
        if not isinstance(language_model, PolicyModel) or isinstance(language_model, ActorCritic):
            raise TypeError(
                "ActorCritic: expected language_model with the methods of "
                f"fastrl.models.PolicyModel, got {type(language_model).__name__}. "
                "Pass an LSTMLanguageModel, or a model with these methods."
            )
        self.language_model: Any = language_model
        self.value_head = nn.Linear(language_model.hidden_dim, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    @property
    def config(self) -> dict[str, Any]:
        """The language model's config, with `model_type` "actor_critic" around it."""
        return {"model_type": "actor_critic", "language_model": self.language_model.config}

    def forward(self, token_ids: Tensor, state: Any = None) -> tuple[Tensor, Tensor, Any]:
        """token_ids [B, T] int64 -> logits [B, T, V], values [B, T], state."""
        hidden, state = self.language_model.hidden_states(token_ids, state)
        return self.language_model.lm_head(hidden), self.values(hidden), state

    def values(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] -> values [...]."""
        return self.value_head(hidden).squeeze(-1)
