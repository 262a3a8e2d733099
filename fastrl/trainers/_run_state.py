"""What a run remembers beside weights, optimizer and random state."""

from typing import Any

from fastrl.trainers._attachments import Attachments
from fastrl.trainers.schedules import EntropyController, KLController
from fastrl.trainers.scoring import RewardScorer

# Of a checkpoint: numbers, and parts with a state_dict.
_COUNTERS = ("step", "bad_steps", "skipped_updates", "num_tokens")
_PARTS = ("kl", "entropy", "scorer")


class RunState:
    """How far a run has come.

    Attributes:
        step, skipped_updates: so far.
        bad_steps: in a row.
        num_tokens: read and written by the policy so far.
    """

    step: int = 0
    bad_steps: int = 0
    skipped_updates: int = 0
    num_tokens: int = 0
    kl: KLController
    entropy: EntropyController
    scorer: RewardScorer
    attachments: Attachments

    def state_dict(self) -> dict[str, Any]:
        state = {name: getattr(self, name) for name in _COUNTERS}
        state |= {name: getattr(self, name).state_dict() for name in _PARTS}
        if attached := self.attachments.state_dict():
            state["attachments"] = attached
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in _COUNTERS:
            setattr(self, name, state[name])
        for name in _PARTS:
            getattr(self, name).load_state_dict(state[name])
        if "attachments" in state:
            self.attachments.load_state_dict(state["attachments"])
