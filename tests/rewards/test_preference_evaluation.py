"""Accuracy, calibration and cross-validation of preference models."""

import math
import random

import pytest
import torch

from fastrl.models import LSTMLanguageModel
from fastrl.rewards.preference import (
    PreferenceConfig,
    PreferenceModel,
    calibrate,
    cross_validate,
    evaluate_preferences,
)
from fastrl.rewards.preference.calibration import best_factor
from fastrl.rewards.preference.cross_validation import fold_numbers
from fastrl.rewards.preference.evaluation import wilson_interval


def made(seed=0, vocab_size=12):
    torch.manual_seed(seed)
    return PreferenceModel(LSTMLanguageModel(vocab_size, 8, 16))


class Fixed:
    """A model whose scores are the completions' only id, halved."""

    def score(self, prompts, completions):
        assert len(prompts) == len(completions)
        return torch.tensor([ids[0] / 2 for ids in completions], dtype=torch.float64)


def pair(lead, tie=False):
    """One that `Fixed` gives a lead, in halves."""
    both = {"chosen": [lead], "rejected": [0]} if lead > 0 else {"chosen": [0], "rejected": [-lead]}
    return {"prompt": [1], **both, "tie": tie}


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_an_evaluation_by_hand():
    got = evaluate_preferences(Fixed(), [pair(4), pair(2), pair(-2), pair(0), pair(2, tie=True)])
    assert got["pairs"] == 5 and got["ties"] == 1
    assert got["accuracy"] == 2.5 / 4 and got["margin"] == pytest.approx((2 + 1 - 1 + 0) / 4)
    p2, p1 = sigmoid(2), sigmoid(1)
    losses = [-math.log(p2), -math.log(p1), -math.log(1 - p1), math.log(2),
              -0.5 * math.log(p1 * (1 - p1))]  # fmt: skip
    assert got["log_loss"] == pytest.approx(math.fsum(losses) / 5)
    squares = [(1 - p2) ** 2, (1 - p1) ** 2, p1**2, 0.25, (p1 - 0.5) ** 2]
    assert got["brier"] == pytest.approx(math.fsum(squares) / 5)
    # Confidence 0.88 is in the bin of [0.85, 0.9), 0.73 twice in [0.7, 0.75), 0.5 in [0.5, 0.55).
    table = got["reliability"]
    assert [(row["low"], row["count"], row["accuracy"]) for row in table] == [
        (0.5, 1, 0.5), (pytest.approx(0.7), 2, 0.5), (pytest.approx(0.85), 1, 1.0),
    ]  # fmt: skip
    assert [row["confidence"] for row in table] == pytest.approx([0.5, p1, p2])
    assert got["ece"] == pytest.approx((0 + 2 * (p1 - 0.5) + (1 - p2)) / 4)
    one = evaluate_preferences(Fixed(), [pair(4), pair(-2)], bins=1)["reliability"]
    assert [(row["low"], row["high"], row["count"]) for row in one] == [(0.5, 1.0, 2)]


def test_wilsons_interval_is_the_published_one():
    # Newcombe 1998, Statistics in Medicine 17, table I: methods for single proportions.
    for hits, count, low, high in (
        (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):  # fmt: skip
        assert wilson_interval(hits, count) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(0, 0) == (0.0, 1.0)
    only_ties = evaluate_preferences(Fixed(), [pair(1, tie=True)])
    assert math.isnan(only_ties["accuracy"]) and only_ties["accuracy_high"] == 1.0


def test_the_temperature_is_the_best_of_all():
    generator = torch.Generator().manual_seed(0)
    margins = 3 * torch.randn(200, generator=generator, dtype=torch.float64) + 1
    is_tie = torch.rand(200, generator=generator) < 0.1
    count = int((~is_tie).sum())
    right = torch.tensor((count + 1) / (count + 2), dtype=torch.float64)
    targets = torch.where(is_tie, 0.5, right)

    def loss(factor):
        z = factor * margins
        return torch.nn.functional.binary_cross_entropy_with_logits(z, targets)

    best = best_factor(margins, is_tie)
    grid = torch.linspace(0.01, 3, 3000, dtype=torch.float64)
    assert loss(best) <= min(map(loss, grid))
    around = [loss(best * x) for x in (1 - 1e-4, 1, 1 + 1e-4)]
    assert around[1] < around[0] and around[1] < around[2]
    # Where all are right it is finite: logit((n + 1) / (n + 2)) = log(n + 1) for equal margins.
    right = torch.full((9,), 2.0, dtype=torch.float64)
    assert best_factor(right, right < 0) * 2 == pytest.approx(math.log(10), rel=1e-9)
    tiny = best_factor(margins * 1e-6, is_tie) * 1e-6
    assert tiny == pytest.approx(best, rel=1e-9)


def noisy(count, seed, flip=0.25):
    """Pairs of which the one with more 3s was chosen, a quarter of them judged wrong."""
    draw, pairs = random.Random(seed), []
    while len(pairs) < count:
        both = [[draw.randrange(1, 6) for _ in range(5)] for _ in range(2)]
        rejected, chosen = sorted(both, key=lambda ids: ids.count(3))
        if chosen.count(3) > rejected.count(3):
            if draw.random() < flip:
                chosen, rejected = rejected, chosen
            prompt = [draw.randrange(10), draw.randrange(10)]
            pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return pairs


def test_calibration_takes_an_over_confident_model_back(tmp_path):
    from fastrl.rewards.preference import train_preference_model

    model = made()
    config = PreferenceConfig(learning_rate=0.03, epochs=12, pairs_per_step=30)
    train_preference_model(model, noisy(90, 1), config)  # learns the wrong judgements by heart
    held_out, test = noisy(200, 2), noisy(1000, 3)
    before = evaluate_preferences(model, test)
    calibration = calibrate(model, held_out)
    after = evaluate_preferences(model, test)
    assert calibration.temperature > 1.5 and calibration.pairs == 200
    assert after["accuracy"] == before["accuracy"] > 0.6
    assert before["ece"] > 0.12 > 0.06 > after["ece"]
    assert after["log_loss"] < before["log_loss"]
    scores = model.score(
        [p["prompt"] for p in held_out] * 2,
        [p[name] for name in ("chosen", "rejected") for p in held_out],
    )
    assert calibration.offset == pytest.approx(float(scores.mean()), abs=1e-9)
    assert calibration.scale == pytest.approx(float(scores.std()))
    model.save(tmp_path)
    again = PreferenceModel.load(tmp_path)
    assert again.calibration == calibration
    assert calibrate(again, held_out).temperature == pytest.approx(calibration.temperature)


def test_there_is_no_temperature_for_scores_that_lead_the_wrong_way():
    with pytest.raises(ValueError, match="calibrate: expected margins above 0 .* margin of 0"):
        calibrate(made(), noisy(10, 1))
    with pytest.raises(ValueError, match="a mean margin of -1"):
        best_factor(torch.full((3,), -1.0, dtype=torch.float64), torch.zeros(3) > 0)


def by_heart(prompts, copies):
    """Which of two is better depends on the prompt alone, at random: nothing to be generalised."""
    draw, pairs = random.Random(5), []
    for prompt in range(prompts):
        chosen, rejected = draw.sample([[10], [11]], 2)
        ids = [draw.randrange(10) for _ in range(3)] + [prompt % 10, prompt // 10]
        pairs += [{"prompt": ids, "chosen": chosen, "rejected": rejected}] * copies
    draw.shuffle(pairs)
    return pairs


@pytest.fixture(scope="module")
def found():
    seeds = iter(range(9))
    config = PreferenceConfig(learning_rate=0.03, epochs=40, pairs_per_step=32)
    return cross_validate(lambda: made(next(seeds)), by_heart(24, 2), config, folds=3, seed=1)


def test_each_fold_has_a_group_of_pairs():
    assert sorted(fold_numbers("abc", 3, seed=1)) == [0, 1, 2]


def test_no_prompt_is_in_two_folds(found):
    pairs, folds = by_heart(24, 2), {}
    for pair, fold in zip(pairs, found.folds, strict=True):
        folds.setdefault(tuple(pair["prompt"]), set()).add(fold)
    assert len(folds) == 24 and all(len(of) == 1 for of in folds.values())
    assert [found.folds.count(fold) for fold in range(3)] == [16, 16, 16]
    for fold, model in enumerate(found.models):
        learned = [p for p, of in zip(pairs, found.folds, strict=True) if of != fold]
        assert evaluate_preferences(model, learned)["accuracy"] > 0.95  # by heart
    assert found.evaluation["accuracy"] < 0.75  # and of no use elsewhere
    assert found.evaluation["pairs"] == 48


def test_out_of_fold_is_by_the_model_that_has_not_seen_the_prompt(found):
    for index in (0, 5, 40):
        pair, model = found.pairs[index], found.models[found.folds[index]]
        chosen, rejected = model.score([pair["prompt"]] * 2, [pair["chosen"], pair["rejected"]])
        assert found.margins[index] == pytest.approx(float(chosen - rejected), abs=1e-5)
    prompts = [pair["prompt"] for pair in found.pairs] + [[1, 1]]
    scores = found.out_of_fold(prompts * 2, [p["chosen"] for p in found.pairs] + [[10]]
                               + [p["rejected"] for p in found.pairs] + [[11]])  # fmt: skip
    margins = scores[:49] - scores[49:]
    torch.testing.assert_close(margins[:48], found.margins, rtol=0, atol=1e-5)
    new = torch.stack([m.score([[1, 1]], [[10]]) - m.score([[1, 1]], [[11]]) for m in found.models])
    torch.testing.assert_close(margins[48:], new.mean(0), rtol=0, atol=1e-5)
    hits = sum(e["accuracy"] * e["pairs"] for e in found.evaluations)
    assert found.evaluation["accuracy"] == pytest.approx(hits / 48)
    ensemble = found.ensemble(pessimism=1.0)
    assert ensemble.models == found.models and ensemble.pessimism == 1.0


def test_other_groups_may_be_named_and_then_a_prompt_may_leak():
    config = PreferenceConfig(max_steps=1)
    pairs = [p | {"writer": {"name": i % 4}} for i, p in enumerate(by_heart(3, 8))]
    got = cross_validate(made, pairs, config, folds=2, group_by="writer")
    assert all(got.folds[i] == got.folds[i % 4] for i in range(24)) and len(set(got.folds)) == 2
    with pytest.raises(ValueError, match="a prompt's pairs in one fold, got pairs in several"):
        got.out_of_fold([pairs[0]["prompt"]], [[10]])
    model = made()
    for options, make, message in (
        ({"folds": 1}, made, "folds a whole number >= 2, got 1"),
        ({"folds": 5}, made, "at least folds = 5 groups of pairs, got 3"),
        ({"folds": 2, "group_by": "rater"}, made, r"group_by, got no 'rater' in pairs\[0\]"),
        ({"folds": 2}, lambda: model, "a fresh model of each call of make_model"),
    ):
        with pytest.raises(ValueError, match=message):
            cross_validate(make, pairs, config, **options)


def test_the_fold_models_can_be_calibrated_on_their_own_folds():
    seeds = iter(range(9))
    config = PreferenceConfig(learning_rate=0.03, epochs=6, pairs_per_step=30)
    got = cross_validate(lambda: made(next(seeds)), noisy(180, 4), config, folds=3)
    assert 0.6 < got.evaluation["accuracy_low"] < 0.75 < got.evaluation["accuracy_high"] < 0.85
    models = got.ensemble(calibrated=True).models
    assert [m.calibration.pairs for m in models] == [got.folds.count(k) for k in range(3)]
    for fold, model in enumerate(models):
        own = [p for p, of in zip(got.pairs, got.folds, strict=True) if of == fold]
        assert calibrate(model, own).temperature == pytest.approx(
            model.calibration.temperature, rel=1e-6
        )
