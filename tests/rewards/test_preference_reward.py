"""Preference models as reward functions, alone and in ensembles."""

import math

import pytest
import torch

from fastrl.models import LSTMLanguageModel
from fastrl.rewards.preference import (
    Calibration,
    PreferenceEnsemble,
    PreferenceModel,
    PreferenceReward,
)
from fastrl.trainers import PolicyGradientConfig, PolicyGradientTrainer
from fastrl.trainers.scoring import RewardScorer

PROMPTS = [[1, 2], [1, 2], [3]]
IDS = [[4, 5, 6], [7], [4, 4, 4, 4]]


class Digits:
    """A tokenizer of single digits, which knows no special tokens."""

    eos_token_id = 0

    def __init__(self, shift=0):
        self.shift = shift

    def encode(self, text):
        return [int(c) + self.shift for c in text]

    def decode(self, ids):
        return "".join(str(i - self.shift) for i in ids)

    def get_vocab(self):
        return {str(i): i + self.shift for i in range(10)}


def made(seed=0, tokenizer=None, vocab_size=10):
    torch.manual_seed(seed)
    model = PreferenceModel(LSTMLanguageModel(vocab_size, 4, 6), tokenizer)
    torch.nn.init.normal_(model.model.value_head.weight)
    return model


def test_an_ensemble_is_the_mean_less_the_disagreement():
    members = [made(seed) for seed in range(3)]
    scores = torch.stack([member.score(PROMPTS, IDS) for member in members])
    ensemble = PreferenceEnsemble(members, pessimism=2.0)
    torch.testing.assert_close(ensemble.score(PROMPTS, IDS), scores.mean(0) - 2 * scores.std(0))
    torch.testing.assert_close(ensemble.disagreement(PROMPTS, IDS), scores.std(0))
    for values, score, ids in zip(
        ensemble.values(PROMPTS, IDS), ensemble.score(PROMPTS, IDS), IDS, strict=True
    ):
        assert values[0] == 0 and len(values) == len(ids) + 1
        assert float(values[-1]) == pytest.approx(float(score), abs=1e-12)
        for t in range(len(ids) + 1):  # each prefix has the score that it has by itself
            prompt = PROMPTS[IDS.index(ids)]
            alone = float(ensemble.score([prompt], [ids[:t]]))
            assert float(values[t]) == pytest.approx(alone, abs=1e-5)
    lone = PreferenceEnsemble(members[:1], pessimism=2.0)
    assert torch.equal(lone.score(PROMPTS, IDS), scores[0])
    assert torch.equal(lone.disagreement(PROMPTS, IDS), torch.zeros(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="models, one at least, got none"):
        PreferenceEnsemble([])
    with pytest.raises(ValueError, match="pessimism a number >= 0, got -1"):
        PreferenceEnsemble(members, pessimism=-1)
    with pytest.raises(TypeError, match="models of PreferenceModel, got LSTM"):
        PreferenceEnsemble([members[0].trunk])


@pytest.mark.parametrize("count", [1, 3])
def test_immediate_rewards_sum_to_the_score(count, tmp_path):
    members = [made(seed) for seed in range(count)]
    folders = [str(tmp_path / str(k)) for k in range(count)]
    for member, folder in zip(members, folders, strict=True):
        member.save(folder)
    given = folders[0] if count == 1 else folders
    logged = {}
    whole = PreferenceReward(given, pessimism=0.5)(PROMPTS, IDS, IDS, log_metric=logged.__setitem__)
    ensemble = PreferenceEnsemble(members, pessimism=0.5)
    assert whole == ensemble.score(PROMPTS, IDS).tolist()
    each = PreferenceReward(given, pessimism=0.5, immediate=True)(PROMPTS, IDS, IDS)
    assert [len(rewards) for rewards in each] == [3, 1, 4]
    assert [math.fsum(rewards) for rewards in each] == pytest.approx(whole, abs=1e-12)
    if count == 1:
        assert logged == {} and [math.fsum(rewards) for rewards in each] == whole  # exactly
    else:
        expected = float(ensemble.disagreement(PROMPTS, IDS).mean())
        assert logged == {"preference/disagreement": pytest.approx(expected)}


def test_normalized_scores_have_the_calibrations_mean_and_deviation():
    members = [made(seed) for seed in range(2)]
    with pytest.raises(ValueError, match="calibrated models with normalize=True, got one"):
        PreferenceReward(members, normalize=True)
    members[0].calibration = Calibration(temperature=2.0, offset=0.5, scale=4.0, pairs=8)
    members[1].calibration = Calibration(temperature=0.5, offset=-1.0, scale=0.5, pairs=8)
    one, other = (member.score(PROMPTS, IDS) for member in members)
    expected = ((one - 0.5) / 4 + (other + 1) / 0.5) / 2
    got = PreferenceReward(members, normalize=True)(PROMPTS, IDS, IDS)
    assert got == pytest.approx(expected.tolist())
    each = PreferenceReward(members, normalize=True, immediate=True)(PROMPTS, IDS, IDS)
    assert [math.fsum(rewards) for rewards in each] == pytest.approx(expected.tolist())
    plain = PreferenceReward(members, immediate=True)
    later = [x / 4 / 2 for x in members[0].values([[1, 2]], [[4, 5, 6]])[0].diff().tolist()]
    rest = [x / 0.5 / 2 for x in members[1].values([[1, 2]], [[4, 5, 6]])[0].diff().tolist()]
    assert each[0][1:] == pytest.approx([a + b for a, b in zip(later, rest, strict=True)][1:])
    assert plain(PROMPTS, IDS, IDS)[0][0] != each[0][0]  # the offset stands there


def test_scores_of_texts_are_normalized_as_those_of_ids_are():
    members, text, written = [made(k, Digits()) for k in range(2)], ["12", "3"], ["456", "7"]
    members[0].calibration = Calibration(temperature=2.0, offset=0.5, scale=4.0, pairs=8)
    members[1].calibration = Calibration(temperature=0.5, offset=-1.0, scale=0.5, pairs=8)
    one, other = (member.score(text, written) for member in members)
    got = PreferenceReward(members, normalize=True)(text, written, [[0], [0]])
    assert got == pytest.approx((((one - 0.5) / 4 + (other + 1) / 0.5) / 2).tolist())


def test_ids_are_taken_where_they_are_the_models_own_and_text_elsewhere():
    own, text = made(tokenizer=Digits()), ["12", "12", "3"]
    written = ["456", "7", "4444"]
    by_ids = made().score(PROMPTS, IDS).tolist()
    by_text = own.score(text, written).tolist()
    assert by_text == own.score(PROMPTS, [[*ids, 0] for ids in IDS]).tolist() != by_ids
    # Of the same vocabulary: the ids as the policy wrote them, cut short or not.
    assert PreferenceReward(own, tokenizer=Digits())(text, written, IDS) == by_ids
    assert PreferenceReward(made(), tokenizer=Digits())(text, written, IDS) == by_ids
    # Of another, or one that is not known.
    for tokenizer in (Digits(3), None):
        reward = PreferenceReward(own, tokenizer=tokenizer)
        other_ids = [[i + 3 for i in ids] for ids in IDS]
        assert reward(text, written, other_ids) == by_text
    chat = [[{"role": "assistant", "content": t}] for t in written]
    assert PreferenceReward(own)(text, chat, IDS) == by_text
    assert PreferenceReward(own)(PROMPTS, IDS, IDS) == by_ids  # ids without a tokenizer


def test_ids_of_another_tokenizer_have_no_immediate_reward():
    own = made(tokenizer=Digits())
    with pytest.raises(ValueError, match="the models' own with immediate=True, got another one"):
        PreferenceReward([made(), own], tokenizer=Digits(3), immediate=True)
    reward = PreferenceReward(own, immediate=True)
    with pytest.raises(ValueError, match="with immediate=True, got None"):
        reward(["12"], ["456"], [[4, 5, 6]])
    rewards = PreferenceReward(own, immediate=True, tokenizer=Digits())(["12"], ["456"], [[4, 5]])
    assert math.fsum(rewards[0]) == own.score([[1, 2]], [[4, 5]]).item()
    assert PreferenceReward(own)([], [], []) == []


def test_pessimism_stands_in_one_place():
    members = [made(seed) for seed in range(2)]
    cautious = PreferenceEnsemble(members, pessimism=1.0)
    expected = cautious.score(PROMPTS, IDS).tolist()
    assert PreferenceReward(cautious)(PROMPTS, IDS, IDS) == expected
    assert PreferenceReward(PreferenceEnsemble(members), pessimism=1.0)(PROMPTS, IDS, IDS) == (
        expected
    )
    with pytest.raises(ValueError, match="pessimism given once"):
        PreferenceReward(cautious, pessimism=0.5)


@pytest.mark.parametrize("immediate", [False, True])
def test_a_trainer_learns_from_it_and_leaves_it_alone(immediate):
    members = [made(seed) for seed in range(2)]
    for member in members:
        member.model.train()
    reward = PreferenceReward(
        members, immediate=immediate, tokenizer=Digits(), pessimism=0.5, name="judge"
    )
    before = [x.clone() for m in members for x in m.model.parameters()]
    torch.manual_seed(3)
    config = PolicyGradientConfig(
        prompts_per_step=2, completions_per_prompt=8, max_new_tokens=4, max_steps=30,
        learning_rate=0.03, gamma=1.0, baseline="rloo", eos_token_id=0,
    )  # fmt: skip
    trainer = PolicyGradientTrainer(
        LSTMLanguageModel(10, 8, 16), reward, ["12", "3"], config, tokenizer=Digits()
    )
    records = trainer.train()
    assert all(r["rewards/judge/mean"] == pytest.approx(r["reward"]) for r in records)
    assert all(r["judge/disagreement"] > 0 for r in records)
    first, last = (sum(r["reward"] for r in part) / 5 for part in (records[:5], records[-5:]))
    assert last > first + 0.2
    after = [x for m in members for x in m.model.parameters()]
    assert all(map(torch.equal, before, after))
    assert all(x.grad is None and x.requires_grad for x in after)
    assert all(m.model.training and not RewardScorer(reward).state_dict() for m in members)
