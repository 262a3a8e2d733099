"""A language model with a value for every token."""

from typing import Any

import torch
from torch import Tensor, nn

from fastrl.models._policies import as_policy


class ActorCritic(nn.Module):
    """A value head on the hidden states of a language model, or of another one.

    The value at a token is V(w_1:t), what the critic expects to follow. The head starts at zero,
    so the first advantages are the returns; it is float32 whatever the models are.

    Args:
        language_model: the actor, as `fastrl.models.as_policy` takes it; shared, not copied.
        critic: another such model, whose hidden states the values are read from. None: the
            actor's own, one trunk for both.
    Raises:
        TypeError: a model that is no policy.  ValueError: critic is the language model itself.
    """

    def __init__(self, language_model: Any, critic: Any = None) -> None:
        super().__init__()
        self.language_model: Any = as_policy(language_model)
        self.critic: Any = None if critic is None else as_policy(critic)
        models = [getattr(x, "model", x) for x in (self.language_model, self.critic)]
        if models[0] is models[1]:
            raise ValueError(
                "ActorCritic: expected critic another model than language_model, got the same. "
                "Leave it out to share the trunk."
            )
        device = self.language_model.head.weight.device
        width = (self.language_model if self.critic is None else self.critic).hidden_dim
        self.value_head = nn.Linear(width, 1, device=device, dtype=torch.float32)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    @property
    def config(self) -> dict[str, Any]:
        """The models' configs, with `model_type` "actor_critic" around them."""
        config = {"model_type": "actor_critic", "language_model": self.language_model.config}
        return config if self.critic is None else {**config, "critic": self.critic.config}

    def forward(self, token_ids: Tensor, state: Any = None) -> tuple[Tensor, Tensor, Any]:
        """token_ids [B, T] int64 -> logits [B, T, V], values [B, T], state."""
        if self.critic is None:
            hidden, state = self.language_model.hidden_states(token_ids, state)
            return self.language_model.head.logits(hidden), self.values(hidden), state
        state, critic_state = (None, None) if state is None else state
        hidden, state = self.language_model.hidden_states(token_ids, state)
        seen, critic_state = self.critic.hidden_states(token_ids, critic_state)
        logits = self.language_model.head.logits(hidden)
        return logits, self.values(seen), (state, critic_state)

    def values(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] -> values [...], in the dtype of the value head under autocast too."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.value_head(hidden.to(self.value_head.weight.dtype)).squeeze(-1)
