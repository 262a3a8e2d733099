"""Several preference models as one: their mean, less what they disagree on."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastrl.ops._checks import fail, wrong_type
from fastrl.rewards.preference.model import TOKENS_AT_ONCE, PreferenceModel

_OP = "PreferenceEnsemble"


class PreferenceEnsemble:
    """Scores of K preference models, combined into a cautious one.

        score = mean_k s_k - pessimism std_k s_k,       std with K - 1, and 0 of one member

    After t tokens the same is taken of the members' V_t - V_0; the rises of that are the credit
    of the tokens, which sums to the score.

    Args:
        models: PreferenceModels, each with its own tokenizer and calibration.
        pessimism: how many standard deviations are taken off, >= 0.
    Raises:
        ValueError: no models, or pessimism below 0.  TypeError: another model.
    Reference: Coste et al. 2024, arXiv:2310.02743.
    """

    def __init__(self, models: Sequence[PreferenceModel], *, pessimism: float = 0.0) -> None:
        self.models = list(models)
        if not self.models:
            raise fail(_OP, "models, one at least", "none", "Pass PreferenceModels.")
        for model in self.models:
            if not isinstance(model, PreferenceModel):
                got = type(model).__name__
                raise wrong_type(_OP, "models of PreferenceModel", got, "Wrap or load each one.")
        if not 0 <= pessimism < math.inf:
            raise fail(_OP, "pessimism a number >= 0", pessimism, "Leave it out for the mean.")
        self.pessimism = pessimism

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        max_tokens: int = TOKENS_AT_ONCE,
    ) -> Tensor:
        """The score of each completion, [C] float64; see `PreferenceModel.score`."""
        return self.combined(self.member_scores(prompts, completions, max_tokens=max_tokens))

    def disagreement(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        max_tokens: int = TOKENS_AT_ONCE,
    ) -> Tensor:
        """The standard deviation of the members' scores, [C] float64."""
        return spread(self.member_scores(prompts, completions, max_tokens=max_tokens))

    def values(
        self,
        prompt_ids: Sequence[Any],
        completion_ids: Sequence[Any],
        *,
        max_tokens: int = TOKENS_AT_ONCE,
    ) -> list[Tensor]:
        """The score of each prefix of each completion, [T + 1] float64, 0 before its first token.

        The ids are the same for all members. See `PreferenceModel.values`.
        """
        members = self.member_values(prompt_ids, completion_ids, max_tokens=max_tokens)
        return [self.combined(values) for values in members]

    def member_scores(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        max_tokens: int = TOKENS_AT_ONCE,
    ) -> Tensor:
        """[K, C] float64: the members' own scores."""
        scores = [m.score(prompts, completions, max_tokens=max_tokens) for m in self.models]
        return torch.stack(scores)

    def member_values(
        self,
        prompt_ids: Sequence[Any],
        completion_ids: Sequence[Any],
        *,
        max_tokens: int = TOKENS_AT_ONCE,
    ) -> list[Tensor]:
        """[K, T + 1] float64 of each completion: the members' V_t - V_0."""
        of_members = [
            model.values(prompt_ids, completion_ids, max_tokens=max_tokens) for model in self.models
        ]
        stacked = [torch.stack(rows) for rows in zip(*of_members, strict=True)]
        return [values - values[:, :1] for values in stacked]

    def combined(self, scores: Tensor) -> Tensor:
        """scores [K, ...] of the members -> [...], the ensemble's."""
        mean = scores.mean(0)
        return mean - self.pessimism * spread(scores) if self.pessimism else mean


def spread(scores: Tensor) -> Tensor:
    """The standard deviation over the first axis, with K - 1; 0 of one."""
    return scores.std(0) if len(scores) > 1 else torch.zeros_like(scores[0])
