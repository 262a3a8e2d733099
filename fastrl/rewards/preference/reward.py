"""Preference models as a reward function, for whole completions or for each of their tokens."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrl.ops._checks import fail
from fastrl.rewards.preference.ensemble import PreferenceEnsemble, spread
from fastrl.rewards.preference.model import TOKENS_AT_ONCE, PreferenceModel
from fastrl.rewards.preference.texts import Encoder, is_chat, same_tokenizer

_OP = "PreferenceReward"


class PreferenceReward:
    """The score of one or several preference models, as reward functions give it.

    With immediate=False a float for each completion; with immediate=True one for each of its ids,
    which sum to the score: the rise from prefix to prefix. The ids are scored as they are where
    they are those of the models' tokenizer (`tokenizer` has the same vocabulary, or no model has
    one); else the text is encoded anew, with the models' end token behind it. The models are read
    only; they stay where they are.

    Args:
        model: a PreferenceModel, a PreferenceEnsemble, a folder of `PreferenceModel.save`, or a
            list of models and folders: an ensemble.
        immediate: see above; the ids have to be those of the models' tokenizer.
        tokenizer: the policy's; also that of a model without one.
        pessimism: standard deviations of the members' scores that are taken off their mean.
        normalize: bring each member's scores to mean 0 and deviation 1 on the completions that it
            was calibrated with, by its calibration's offset and scale. With immediate=True the
            offset stands at the first token, where it is the same whatever the token.
        name: what metrics call it; that of the members' mean standard deviation, logged where
            there are several, is "<name>/disagreement".
        device: where models of folders are put.
        max_tokens: most tokens in one pass of a model.
    Raises:
        ValueError: immediate=True with models of another tokenizer; normalize=True with a model
            that was never calibrated; a broken folder; pessimism of an ensemble given twice.
        TypeError: something else than models and folders.
    """

    def __init__(
        self,
        model: Any,
        *,
        immediate: bool = False,
        tokenizer: Any = None,
        pessimism: float = 0.0,
        normalize: bool = False,
        name: str = "preference",
        device: str | torch.device = "cpu",
        max_tokens: int = TOKENS_AT_ONCE,
    ) -> None:
        self.ensemble = _ensemble(model, tokenizer, pessimism, device)
        self.immediate, self.normalize, self.max_tokens = immediate, normalize, max_tokens
        self.tokenizer, self.__name__ = tokenizer, name
        # Whether the policy's ids are the models'; None: not known where they have a tokenizer.
        tokenizers = [m.tokenizer for m in self.ensemble.models if m.tokenizer is not None]
        self._ids_fit: bool | None = True
        if tokenizers:
            fits = tokenizer is not None
            self._ids_fit = all(same_tokenizer(x, tokenizer) for x in tokenizers) if fits else None
        if immediate and self._ids_fit is False:
            raise self._other_ids("another one")
        if normalize and not all(m.calibration.pairs for m in self.ensemble.models):
            remedy = "Call calibrate(model, held-out pairs) before."
            raise fail(_OP, "calibrated models with normalize=True", "one that is not", remedy)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        *,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float] | list[list[float]]:
        """Rewards of a batch; see `PreferenceModel.score` for the errors.

        Raises:
            ValueError: immediate=True, completions of text, and no tokenizer was given that says
                whether their ids are the models'.
        """
        # Without a tokenizer both are ids.
        are_ids = not any(isinstance(c, str) or is_chat(c) for c in completions)
        if self._ids_fit or are_ids:
            values = self._prefix_scores(prompts, completion_ids)
            totals = torch.stack([x[:, -1] for x in values], 1) if values else None
        elif self.immediate:
            raise self._other_ids("None")
        else:
            values, totals = [], self._text_scores(prompts, completions)
        if totals is None:
            return []
        if log_metric is not None and len(totals) > 1:
            log_metric(f"{self.__name__}/disagreement", float(spread(totals).mean()))
        if not self.immediate:
            return self.ensemble.combined(totals).tolist()
        return [self.ensemble.combined(x).diff().tolist() for x in values]

    def _prefix_scores(
        self, prompts: Sequence[Any], completion_ids: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        """[K, T + 1] each: what the members give 0, 1, ..., T ids of each completion."""
        first = self.ensemble.models[0]
        tokenizer = self.tokenizer if first.tokenizer is None else first.tokenizer
        encode = Encoder(tokenizer, first.encoder.vocab_size, None).prompt
        values = self.ensemble.member_values(
            [encode(prompt) for prompt in prompts], completion_ids, max_tokens=self.max_tokens
        )
        if self.normalize:
            offset, scale = self._offset_and_scale()
            for x in values:
                x[:, 1:] -= offset
                x /= scale
        return values

    def _text_scores(self, prompts: Sequence[Any], completions: Sequence[Any]) -> Tensor:
        """[K, C]."""
        scores = self.ensemble.member_scores(prompts, completions, max_tokens=self.max_tokens)
        if not self.normalize:
            return scores
        offset, scale = self._offset_and_scale()
        return (scores - offset) / scale

    def _offset_and_scale(self) -> tuple[Tensor, Tensor]:
        """[K, 1] each."""
        known = [model.calibration for model in self.ensemble.models]
        numbers = [[[x.offset], [x.scale]] for x in known]
        offset, scale = torch.tensor(numbers, dtype=torch.float64).unbind(1)
        return offset, scale

    def _other_ids(self, got: str) -> ValueError:
        remedy = "Pass the policy's tokenizer=, give both the same one, or set immediate=False."
        return fail(_OP, "tokenizer to be the models' own with immediate=True", got, remedy)


def _ensemble(
    given: Any, tokenizer: Any, pessimism: float, device: str | torch.device
) -> PreferenceEnsemble:
    if isinstance(given, PreferenceEnsemble):
        if pessimism and given.pessimism:
            got, remedy = f"{pessimism} beside the ensemble's", "Set one of them."
            raise fail(_OP, "pessimism given once", got, remedy)
        return PreferenceEnsemble(given.models, pessimism=pessimism or given.pessimism)
    is_one = isinstance(given, str | Path) or not isinstance(given, Sequence)
    models = [
        PreferenceModel.load(x, tokenizer=tokenizer, device=device)
        if isinstance(x, str | Path)
        else x
        for x in ([given] if is_one else given)
    ]
    return PreferenceEnsemble(models, pessimism=pessimism)
