"""Cross-validation: each judgement is foretold by a model that has not seen its prompt."""

import json
import random
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrl.ops._checks import fail
from fastrl.rewards.preference.calibration import calibrate
from fastrl.rewards.preference.config import PreferenceConfig
from fastrl.rewards.preference.ensemble import PreferenceEnsemble
from fastrl.rewards.preference.evaluation import preference_margins, summary, ties_of
from fastrl.rewards.preference.model import (
    PreferenceModel,
    as_preference_model,
    check_lengths,
)
from fastrl.rewards.preference.pairs import checked_pairs
from fastrl.rewards.preference.training import PreferenceResult, train_preference_model

_OP = "cross_validate"


@dataclass(frozen=True)
class CrossValidation:
    """What `cross_validate` found.

    Attributes:
        models: of each fold, trained on the pairs of all the others.
        results: of each fold, with the records of its training.
        evaluations: of each fold's model on the fold's own pairs, as `evaluate_preferences`.
        evaluation: the same of all pairs together, each with its out-of-fold margin.
        margins: [n] float64, for each pair, in the order given, the chosen completion's score less
            the rejected one's, by the model of its fold, which has not seen its prompt.
        folds: for each pair the number of its fold.
        pairs: the pairs.
    """

    models: list[PreferenceModel]
    results: list[PreferenceResult]
    evaluations: list[dict[str, Any]]
    evaluation: dict[str, Any]
    margins: Tensor
    folds: list[int]
    pairs: list[Mapping[str, Any]]

    def ensemble(self, *, pessimism: float = 0.0, calibrated: bool = False) -> PreferenceEnsemble:
        """The models of all folds as one.

        Args:
            pessimism: see `PreferenceEnsemble`.
            calibrated: fit each model's temperature to the pairs of its own fold first; the
                evaluations here stay those of before.
        Raises:
            ValueError: calibrated, and a model leads the wrong way on its fold.
        """
        if calibrated:
            for fold, model in enumerate(self.models):
                held_out = zip(self.pairs, self.folds, strict=True)
                calibrate(model, [pair for pair, of in held_out if of == fold])
        return PreferenceEnsemble(self.models, pessimism=pessimism)

    def out_of_fold(self, prompts: Sequence[Any], completions: Sequence[Any]) -> Tensor:
        """Scores [C] float64 by models that were not trained on the completion's prompt.

        That is the model of the fold with the prompt's pairs; and the mean of all models for a
        prompt without pairs.

        Args:
            prompts, completions: as `PreferenceModel.score` takes them.
        Raises:
            ValueError: a prompt with pairs in several folds, which every model has seen; lengths
                disagree.
        """
        check_lengths(_OP, prompts, completions)
        encode = self.models[0].encoder.prompt
        seen: dict[Any, set[int]] = {}
        for pair, fold in zip(self.pairs, self.folds, strict=True):
            seen.setdefault(encode(pair["prompt"]), set()).add(fold)
        held_out = [seen.get(encode(prompt), set()) for prompt in prompts]
        if any(len(folds) > 1 for folds in held_out):
            got, remedy = "pairs in several", 'Cross-validate with group_by="prompt".'
            raise fail(_OP, "a prompt's pairs in one fold", got, remedy)
        scores = torch.empty(len(prompts), dtype=torch.float64)
        for choice in {frozenset(folds) for folds in held_out}:
            at = [i for i, folds in enumerate(held_out) if folds == choice]
            chosen = PreferenceEnsemble([self.models[k] for k in choice] or self.models)
            scores[at] = chosen.score([prompts[i] for i in at], [completions[i] for i in at])
        return scores


def cross_validate(
    make_model: Callable[[], Any],
    pairs: Iterable[Any],
    config: PreferenceConfig | None = None,
    *,
    folds: int = 5,
    seed: int = 0,
    tokenizer: Any = None,
    group_by: str = "prompt",
) -> CrossValidation:
    """Train one preference model for each fold of the pairs, on the pairs of the other folds.

    Folds are of about the same number of pairs, and all pairs of a group are in one.

    Args:
        make_model: makes a fresh model for each fold, as `train_preference_model` takes it; what
            it draws at random is its own affair.
        pairs, config, tokenizer: as there.
        folds: how many, >= 2.
        seed: decides which groups are in which fold.
        group_by: the column that says what belongs together.
    Raises:
        ValueError: fewer groups than folds, a missing column, or make_model gave a model twice.
    """
    listed = checked_pairs(_OP, pairs)
    if not isinstance(folds, int) or folds < 2:
        raise fail(_OP, "folds a whole number >= 2", repr(folds), "Leave it out for 5.")
    models = [as_preference_model(_OP, make_model(), tokenizer) for _ in range(folds)]
    if len({id(model.model) for model in models}) < folds:
        remedy = "Build the model inside of make_model."
        raise fail(_OP, "a fresh model of each call of make_model", "an earlier one", remedy)
    of_pairs = fold_numbers(_groups(listed, models[0], group_by), folds, seed)
    results, evaluations = [], []
    margins, is_tie = torch.empty(len(listed), dtype=torch.float64), ties_of(listed)
    for fold, model in enumerate(models):
        rest = [pair for pair, of in zip(listed, of_pairs, strict=True) if of != fold]
        results.append(train_preference_model(model, rest, config))
        at = [index for index, of in enumerate(of_pairs) if of == fold]
        margins[at] = preference_margins(model, [listed[index] for index in at])
        evaluations.append(summary(margins[at], is_tie[at]))
    pooled = summary(margins, is_tie)
    return CrossValidation(models, results, evaluations, pooled, margins, of_pairs, listed)


def fold_numbers(groups: Sequence[Hashable], folds: int, seed: int) -> list[int]:
    """For each pair the number of its fold, from what it shares with others of its group.

    The groups come in random order, each to the fold with the fewest pairs.
    """
    members: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    if len(members) < folds:
        got, remedy = len(members), "Take fewer folds, or pairs of more prompts."
        raise fail(_OP, f"at least folds = {folds} groups of pairs", got, remedy)
    order = list(members.values())
    random.Random(f"{seed}").shuffle(order)
    numbers, sizes = [0] * len(groups), [0] * folds
    for indices in order:
        fold = sizes.index(min(sizes))
        sizes[fold] += len(indices)
        for index in indices:
            numbers[index] = fold
    return numbers


def _groups(
    pairs: Sequence[Mapping[str, Any]], model: PreferenceModel, group_by: str
) -> list[Hashable]:
    """What pairs of one group share: a prompt's ids, however it is written, or a column's JSON."""
    if group_by == "prompt":
        return [model.encoder.prompt(pair["prompt"]) for pair in pairs]
    for index, pair in enumerate(pairs):
        if group_by not in pair:
            got, remedy = f"no {group_by!r} in pairs[{index}]", "Name a column that all pairs have."
            raise fail(_OP, "pairs with the column group_by", got, remedy)
    return [json.dumps(pair[group_by], sort_keys=True, default=repr) for pair in pairs]
