"""Training of preference models: what is known to be the optimum, and what goes wrong."""

import math
import random

import pytest
import torch

from fastrl.models import ActorCritic, LSTMLanguageModel
from fastrl.rewards.preference import (
    PreferenceConfig,
    PreferenceModel,
    evaluate_preferences,
    train_preference_model,
)

LIKED = 3
A = {"prompt": [1, 2], "chosen": [4], "rejected": [5]}
B = {"prompt": [6], "chosen": [7], "rejected": [8]}


def made(seed=0, vocab_size=10, hidden_dim=16, values=0.0):
    torch.manual_seed(seed)
    model = PreferenceModel(LSTMLanguageModel(vocab_size, 8, hidden_dim))
    torch.nn.init.normal_(model.model.value_head.weight, std=values)
    return model


def more_of_one(count, seed):
    """Pairs of which the one with more of LIKED was chosen."""
    draw, pairs = random.Random(seed), []
    while len(pairs) < count:
        prompt = [draw.randrange(10) for _ in range(3)]
        both = [[draw.randrange(1, 6) for _ in range(draw.randint(4, 8))] for _ in range(2)]
        rejected, chosen = sorted(both, key=lambda ids: ids.count(LIKED))
        if chosen.count(LIKED) > rejected.count(LIKED):
            pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return pairs


def trained(pairs, *, values=0.0, steps=100, **config):
    """Scores of each pair, chosen and rejected, at what is all but the optimum."""
    model = made(values=values)
    config = {"learning_rate": 0.1, "lr_schedule": "linear", "max_grad_norm": None} | config
    train_preference_model(model, pairs, PreferenceConfig(max_steps=steps, **config))
    scores = model.score(
        [pair["prompt"] for pair in pairs] * 2,
        [pair[name] for name in ("chosen", "rejected") for pair in pairs],
    )
    return scores.view(2, -1).T.tolist()


@pytest.mark.parametrize("token_loss", ["last", "mean"])
def test_it_learns_which_token_is_liked(token_loss):
    config = PreferenceConfig(
        learning_rate=0.02, epochs=3, pairs_per_step=32, token_loss=token_loss, warmup_steps=3
    )
    result = train_preference_model(
        made(), more_of_one(400, 1), config, eval_pairs=more_of_one(200, 2)
    )
    assert result.accuracy > 0.9
    first, last = result.records[0], result.records[-1]
    assert first["loss"] == pytest.approx(math.log(2)) and first["accuracy"] == 0.5
    assert first["learning_rate"] == pytest.approx(0.02 / 3) and last["learning_rate"] == 0.02
    assert last["loss"] < 0.4 and last["accuracy"] > 0.85 and last["margin"] > 1
    assert len(result.records) == 3 * 13 and result.skipped == 0
    # The credit stands where the liked token stands.
    (values,) = result.model.values([[1, 2, 0]], [[1, LIKED, 2, LIKED, 4, 5]])
    credit = values.diff().tolist()
    assert min(credit[1], credit[3]) > max(credit[0], credit[2], credit[4], credit[5])


def test_a_margin_is_what_the_scores_lead_by():
    """With smoothing e the optimum is finite: a lead of m + logit(1 - e)."""
    logit = math.log(0.9 / 0.1)
    pairs = [A, B | {"margin": 3.0}]
    leads = [c - r for c, r in trained(pairs, label_smoothing=0.1)]
    assert leads == pytest.approx([logit, logit + 3], abs=0.05)
    leads = [c - r for c, r in trained(pairs, label_smoothing=0.1, margin=1.0)]
    assert leads == pytest.approx([logit + 1, logit + 1], abs=0.05)


def test_a_tie_is_half_a_judgement_for_either_side():
    """Judged once and tied once, the chosen one is better with probability 3/4."""
    tie = A | {"tie": True, "margin": 5.0}  # a tie has no margin
    leads = [c - r for c, r in trained([A, tie])]
    assert leads == pytest.approx([math.log(3)] * 2, abs=0.02)
    leads = [c - r for c, r in trained([A, tie], ties="drop", label_smoothing=0.1)]
    assert leads == pytest.approx([math.log(9)] * 2, abs=0.02)


def test_centering_holds_the_mean_score_at_zero():
    sums = {
        c: [sum(both) for both in trained([A, B], values=1.0, centering=c, label_smoothing=0.1)]
        for c in (0.0, 1.0)
    }
    assert max(map(abs, sums[1.0])) < 0.02 < 0.2 < max(map(abs, sums[0.0]))


def test_all_prefixes_teach_early_tokens():
    """One token decides at once; what follows says nothing, and is the same in both."""
    draw = random.Random(0)
    tails = [[draw.randrange(5, 10) for _ in range(8)] for _ in range(64)]
    pairs = [{"prompt": [0], "chosen": [LIKED, *t], "rejected": [4, *t]} for t in tails]
    early = {}
    for token_loss in ("last", "mean"):
        model = made()
        config = PreferenceConfig(
            learning_rate=0.03, max_steps=40, token_loss=token_loss, label_smoothing=0.1
        )
        train_preference_model(model, pairs, config)
        liked, other = model.score([[0], [0]], [[LIKED], [4]]).tolist()
        early[token_loss] = liked - other
    assert early["mean"] == pytest.approx(math.log(9), abs=0.4)
    assert abs(early["last"] - math.log(9)) > 2 * abs(early["mean"] - math.log(9))


def test_the_seed_decides_all():
    def run(seed, **options):
        model = made()
        config = PreferenceConfig(learning_rate=0.02, pairs_per_step=16, seed=seed, **options)
        records = train_preference_model(model, more_of_one(64, 1), config).records
        return [r["loss"] for r in records], list(model.model.state_dict().values())

    losses, weights = run(0)
    again, same = run(0)
    assert again == losses and all(map(torch.equal, weights, same))
    assert run(1)[0] != losses
    cut, near = run(0, micro_batch_tokens=40)
    assert cut == pytest.approx(losses, rel=1e-4)
    for one, other in zip(weights, near, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_each_epoch_has_every_pair_once_and_a_prompts_pairs_in_a_row(monkeypatch):
    from fastrl.rewards.preference import training

    seen, inner = [], training.gradients

    def gradients(model, pairs, *rest):
        seen.append(pairs)
        return inner(model, pairs, *rest)

    monkeypatch.setattr(training, "gradients", gradients)
    pairs = [
        {"prompt": [p], "chosen": [p, i], "rejected": [i]} for i in range(3) for p in range(1, 6)
    ]
    train_preference_model(made(), pairs, PreferenceConfig(epochs=2, pairs_per_step=6))
    assert [len(step) for step in seen] == [6, 6, 3] * 2
    epochs = [[(p.prompt[0], *p.chosen) for step in half for p in step] for half in
              (seen[:3], seen[3:])]  # fmt: skip
    for epoch in epochs:
        assert sorted(epoch) == sorted((p["prompt"][0], *p["chosen"]) for p in pairs)
        assert [epoch[i][0] for i in (0, 1, 2)] == [epoch[0][0]] * 3
        assert len({epoch[i][0] for i in range(0, 15, 3)}) == 5
    assert epochs[0] != epochs[1]


def test_what_is_frozen_stays_and_a_used_calibration_is_dropped():
    from fastrl.rewards.preference import Calibration

    model = made()
    model.calibration = Calibration(temperature=3.0)
    before = {n: x.clone() for n, x in model.model.state_dict().items()}
    config = PreferenceConfig(max_steps=3, learning_rate=0.1, freeze_trunk=True, weight_decay=0.1)
    result = train_preference_model(model, [A, B], config)
    changed = {n for n, x in model.model.state_dict().items() if not torch.equal(x, before[n])}
    assert changed == {"value_head.weight"} and result.calibration == Calibration()
    assert all(x.requires_grad for x in model.model.parameters())
    model.model.requires_grad_(False)
    with pytest.raises(ValueError, match="a model with weights to train, got frozen ones"):
        train_preference_model(model, [A], config)


def test_a_language_model_is_wrapped_and_an_actor_critic_is_trained_in_place():
    own = ActorCritic(LSTMLanguageModel(10, 4, 6))
    head = own.language_model.lm_head.weight.clone()
    result = train_preference_model(own, [A], PreferenceConfig(max_steps=2))
    assert result.model.model is own and own.value_head.weight.abs().sum() > 0
    assert torch.equal(own.language_model.lm_head.weight, head)  # no loss sees it
    result = train_preference_model(LSTMLanguageModel(10, 4, 6), [A])
    assert len(result.records) == 1 and result.accuracy is None


def test_of_an_adapter_its_own_weights_alone_are_trained():
    from hf_models import build
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
    model = PreferenceModel(get_peft_model(build("llama"), lora))
    before = {n: x.clone() for n, x in model.model.state_dict().items()}
    config = PreferenceConfig(max_steps=20, learning_rate=0.03, token_loss="mean")
    result = train_preference_model(model, [A, B], config, eval_pairs=[A, B])
    changed = {n for n, x in model.model.state_dict().items() if not torch.equal(x, before[n])}
    assert "value_head.weight" in changed and len(changed) == 1 + 2 * 2 * 2
    assert all("lora_" in name for name in changed - {"value_head.weight"})
    assert result.accuracy == 1 and result.evaluation["margin"] > 1


def test_steps_that_are_not_finite_are_left_out_and_several_in_a_row_raise():
    model, calls = made(values=1.0), []
    with torch.no_grad():
        model.trunk.embedding.weight[9] = math.nan
    bad = {"prompt": [9], "chosen": [1], "rejected": [2]}
    before = [x.clone() for x in model.model.parameters()]
    with pytest.raises(FloatingPointError, match="within max_bad_steps = 3 steps, got loss nan"):
        train_preference_model(
            model, [bad], PreferenceConfig(epochs=9, max_bad_steps=3), on_step=calls.append
        )
    assert [record["skipped"] for record in calls] == [1, 1]
    for one, other in zip(model.model.parameters(), before, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    config = PreferenceConfig(epochs=4, pairs_per_step=1, max_bad_steps=2 * 4, learning_rate=0.05)
    result = train_preference_model(model, [bad, A], config)
    assert result.skipped == 4 and len(result.records) == 8
    assert evaluate_preferences(model, [A])["accuracy"] == 1


def test_broken_pairs_and_settings_are_errors():
    for pairs, error, message in (
        ([], ValueError, "pairs, one at least, got none"),
        ([[1, 2]], TypeError, r"pairs\[0\] a dict, got list"),
        ([A, {"prompt": [1], "chosen": [2]}], ValueError, r"pairs\[1\].*got no 'rejected'"),
        ([A | {"margin": -1.0}], ValueError, r'pairs\[0\]\["margin"\] a number >= 0, got -1.0'),
        ([A | {"tie": "yes"}], TypeError, r"pairs\[0\]\[\"tie\"\] true or false, got 'yes'"),
        ([A | {"prompt": []}], ValueError, r"pairs\[0\] prompt of at least one token"),
        ([A | {"chosen": [77]}], ValueError, r"pairs\[0\] chosen with ids in \[0, 10\)"),
    ):
        with pytest.raises(error, match=message):
            train_preference_model(made(), pairs)
    with pytest.raises(ValueError, match='pairs beside ties with ties="drop"'):
        train_preference_model(made(), [A | {"tie": True}], PreferenceConfig(ties="drop"))
    with pytest.raises(ValueError, match="the model's tokenizer, got another one"):
        train_preference_model(made(), [A], tokenizer=object())
    for setting in (
        {"epochs": 0}, {"max_steps": -1}, {"pairs_per_step": 1.0}, {"learning_rate": 0.0},
        {"margin": math.nan}, {"centering": -0.1}, {"label_smoothing": 0.5}, {"ties": "skip"},
        {"token_loss": "all"}, {"freeze_trunk": "no"}, {"max_grad_norm": 0}, {"seed": True},
        {"micro_batch_tokens": 0}, {"lr_schedule": "step"}, {"epochs": None},
    ):  # fmt: skip
        (name,) = setting
        with pytest.raises(ValueError, match=f"PreferenceConfig: expected {name} .*got"):
            PreferenceConfig(**setting)
    given = PreferenceConfig(margin=1.0, max_steps=3)
    assert PreferenceConfig(**given.to_dict()) == given


def test_schedules_end_where_they_say():
    rates = {
        name: [
            PreferenceConfig(lr_schedule=name, learning_rate=1.0, warmup_steps=2).learning_rate_at(
                step, 6
            )
            for step in range(6)
        ]
        for name in ("constant", "linear", "cosine")
    }
    assert rates["constant"] == [0.5, 1, 1, 1, 1, 1]
    assert rates["linear"] == [0.5, 1, 1, 0.75, 0.5, 0.25]
    assert rates["cosine"][2:] == pytest.approx(
        [0.5 * (1 + math.cos(math.pi * x)) for x in (0, 0.25, 0.5, 0.75)]
    )
