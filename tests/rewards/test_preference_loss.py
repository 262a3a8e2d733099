"""The packed loss of pairs and its gradients, against padded passes of eager PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from hf_models import VOCAB, build

from fastrl.models import LSTMLanguageModel
from fastrl.rewards.preference import PreferenceConfig, PreferenceModel
from fastrl.rewards.preference.pairs import encoded_pairs
from fastrl.rewards.preference.training import gradients

PAIRS = [
    {"prompt": [1, 2, 3], "chosen": [5, 6, 7], "rejected": [5, 6], "margin": 0.7},
    {"prompt": [4], "chosen": [8], "rejected": [9, 9, 2, 3], "tie": True, "margin": 2.0},
    {"prompt": [1, 2, 3], "chosen": [5, 6], "rejected": [2], "margin": 0.2},
    {"prompt": [7, 7], "chosen": [], "rejected": [3, 8]},
    {"prompt": [7, 7], "chosen": [6, 1, 1, 1, 1], "rejected": [3, 8]},
]
CONFIGS = {
    "plain": {},
    "last": {"centering": 0.3, "label_smoothing": 0.1},
    "mean": {"centering": 0.3, "label_smoothing": 0.1, "token_loss": "mean"},
    "constant margin": {"margin": 1.3, "token_loss": "mean"},
}


def made(kind, dtype):
    torch.manual_seed(0)
    backbone = LSTMLanguageModel(VOCAB, 4, 6, 2) if kind == "lstm" else build(kind)
    model = PreferenceModel(backbone)
    torch.nn.init.normal_(model.model.value_head.weight)
    model.model.to(dtype)
    return model


def padded_values(values_of, sequences):
    """Values [B, T] of sequences that are padded on the right, in one eager pass."""
    rows = [torch.tensor(ids) for ids in sequences]
    return values_of(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True))


def eager_loss(values_of, config):
    """The mean loss of PAIRS as it is written down, one pair and one prefix at a time."""
    total = 0.0
    for pair in PAIRS:
        prompt, both = pair["prompt"], (pair["chosen"], pair["rejected"])
        values = padded_values(values_of, [prompt + ids for ids in both])[:, len(prompt) - 1 :]
        longest = max(map(len, both))
        prefixes = range(1, longest + 1) if config.token_loss == "mean" else [longest]
        is_tie = pair.get("tie", False)
        margin = pair.get("margin", 0.0) if config.margin is None else config.margin
        target = torch.tensor(0.5 if is_tie else 1 - config.label_smoothing, dtype=values.dtype)
        losses = []
        for t in prefixes:
            chosen, rejected = (
                row[min(t, len(ids))] - row[0] for row, ids in zip(values, both, strict=True)
            )
            lead = chosen - rejected - (0.0 if is_tie else margin)
            loss = F.binary_cross_entropy_with_logits(lead, target)
            losses.append(loss + config.centering * (chosen + rejected) ** 2)
        total = total + torch.stack(losses).mean()
    return total / len(PAIRS)


def packed(model, config):
    trained = [x for x in model.model.parameters()]
    pairs = encoded_pairs("test", PAIRS, model.encoder)
    loss, margins = gradients(model, pairs, config, trained)
    return loss, margins, {n: x.grad for n, x in model.model.named_parameters()}


def assert_same_gradients(ours, named, rtol, atol):
    compared = 0
    for name, expected in named.items():
        if expected is None:
            assert ours[name] is None
            continue
        torch.testing.assert_close(ours[name], expected, rtol=rtol, atol=atol)
        compared += bool(expected.abs().max() > 1e-3)
    assert compared > 5


@pytest.mark.parametrize("name", CONFIGS)
def test_an_lstms_loss_and_gradients_are_those_of_eager_pytorch(name):
    model = made("lstm", torch.float64)
    for max_tokens in (None, 1, 12):
        config = PreferenceConfig(**CONFIGS[name], micro_batch_tokens=max_tokens)
        loss, margins, ours = packed(model, config)
        model.model.zero_grad()
        expected = eager_loss(lambda ids: model.model(ids)[1], config)
        expected.backward()
        assert loss == pytest.approx(expected.item(), rel=1e-12)
        theirs = {n: x.grad for n, x in model.model.named_parameters()}
        assert_same_gradients(ours, theirs, rtol=1e-9, atol=1e-12)
        scores = model.score(
            [pair["prompt"] for pair in PAIRS] * 2,
            [pair[key] for key in ("chosen", "rejected") for pair in PAIRS],
        )
        torch.testing.assert_close(margins, scores[:5] - scores[5:], rtol=1e-10, atol=1e-12)
        assert not margins.requires_grad  # they are kept for a whole epoch


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_transformers_loss_and_gradients_are_those_of_eager_pytorch(kind):
    # In float64 but for what Llama's norms compute in float32.
    model = made(kind, torch.float64)
    theirs, head = build(kind, "sdpa").double(), model.model.value_head

    def values_of(ids):
        trunk = theirs.base_model
        return head(trunk(input_ids=ids, use_cache=False).last_hidden_state).squeeze(-1)

    for max_tokens in (None, 12):
        config = PreferenceConfig(**CONFIGS["mean"], micro_batch_tokens=max_tokens)
        loss, _, ours = packed(model, config)
        head.zero_grad()
        theirs.zero_grad()
        expected = eager_loss(values_of, config)
        expected.backward()
        assert loss == pytest.approx(expected.item(), rel=1e-6)
        named = {f"language_model.model.{n}": x.grad for n, x in theirs.named_parameters()}
        assert_same_gradients(
            ours, named | {"value_head.weight": head.weight.grad}, rtol=1e-5, atol=5e-6
        )


def test_pairs_of_one_prompt_are_packed_together_and_others_are_cut():
    from fastrl.rewards.preference.loss import pair_passes

    model = made("lstm", torch.float32)
    pairs = encoded_pairs("test", PAIRS, model.encoder)
    (whole,) = pair_passes(pairs, None, model.device)
    assert whole.items == [0, 2, 1, 3, 4]
    # Prompts 3 + 1 + 2; completions 5 6 7 | 5 6 | 2 || 8 | 9 9 2 3 || nothing | 3 8 | 6 1 1 1 1,
    # each once and with one token more.
    assert whole.batch.layout.num_tokens == 6 + 4 + 3 + 2 + 2 + 5 + 1 + 3 + 6
    parts = pair_passes(pairs, 12, model.device)
    assert [part.items for part in parts] == [[0, 2], [1], [3, 4]]
    assert [part.batch.layout.num_tokens for part in parts] == [12, 8, 12]
    alone = pair_passes(pairs, 1, model.device)
    assert [part.items for part in alone] == [[0], [2], [1], [3], [4]]


def test_a_frozen_trunk_has_no_graph_and_the_same_head_gradient():
    model = made("lstm", torch.float64)
    _, _, whole = packed(model, PreferenceConfig())
    head = model.model.value_head.weight
    pairs = encoded_pairs("test", PAIRS, model.encoder)
    expected = whole["value_head.weight"].clone()
    gradients(model, pairs, PreferenceConfig(freeze_trunk=True), [head])
    assert torch.equal(head.grad, expected)
    with pytest.raises(RuntimeError, match="does not require grad"):
        head.requires_grad_(False)
        gradients(model, pairs, PreferenceConfig(freeze_trunk=True), [head])
