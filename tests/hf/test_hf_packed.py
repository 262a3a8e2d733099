"""Packed rows, with shared prompts or not, against the same sequences one by one."""

import gc
import re

import pytest
import torch
from hf_models import CONFIGS, VOCAB, assert_equal_gradients, build, build_pair, gradients

from fastrl import PackedBatch, pack_groups
from fastrl.hf import _packing
from fastrl.hf._once import _KNOWN


def tokens(*lengths):
    return [torch.randint(2, VOCAB, (length,)) for length in lengths]


def two_groups():
    """Ragged completions, one of them empty, longer than the windows, and two prompts."""
    return pack_groups(tokens(5, 3), [tokens(4, 7, 0, 2), tokens(3, 1)])


def conversation():
    """Turns that branch twice."""
    return PackedBatch.from_segments(tokens(4, 3, 2, 5, 1, 3), [-1, 0, 1, 1, 0, -1])


def packed_log_probs(model, batch):
    """[M], and the rows of logits that they come from."""
    layout = batch.layout
    positions = layout.position_ids[None]
    logits = model(batch.token_ids[None], position_ids=positions, layout=layout).logits[0]
    rows = logits[batch.predict_index].log_softmax(-1)
    return rows.gather(1, batch.target_ids[:, None])[:, 0], rows


def one_by_one(model, batch):
    """The same from paths of their own, from a root to a leaf."""
    layout, rows = batch.layout, {}
    for target in reversed(batch.target_index.tolist()):
        path = [target]
        while layout.predecessor[path[0]] >= 0:
            path.insert(0, int(layout.predecessor[path[0]]))
        if target not in rows:
            logits = model(batch.token_ids[path][None], use_cache=False).logits[0]
            rows = dict(zip(path[1:], logits, strict=False)) | rows
    rows = torch.stack([rows[target] for target in batch.target_index.tolist()]).log_softmax(-1)
    return rows.gather(1, batch.target_ids[:, None])[:, 0], rows


def check_packed(ours, theirs, batch):
    weights = torch.linspace(-1, 1, len(batch.target_ids)) / len(batch.target_ids)
    expected, expected_rows = one_by_one(theirs, batch)
    expected_gradients = gradients(theirs, expected @ weights)
    found, rows = packed_log_probs(ours, batch)
    torch.testing.assert_close(rows, expected_rows, rtol=0, atol=1e-5)
    assert_equal_gradients(gradients(ours, found @ weights), expected_gradients)


@pytest.mark.parametrize("name", CONFIGS)
def test_shared_prompts_are_one_by_one(name):
    ours, theirs = build_pair(name)
    batch = two_groups()
    check_packed(ours, theirs, batch)
    ours.train()
    for reentrant in (False, True):
        ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            ours.enable_input_require_grads()  # without which it has no gradients at all
        check_packed(ours, theirs, batch)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text", "gpt2"])
def test_trees_are_one_by_one(name):
    check_packed(*build_pair(name), conversation())


OTHERS = dict(n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4)
OTHERS |= dict(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)


def test_codegen_is_exact_or_its_lost_layout_is_noticed():
    """It hands its arguments on since transformers 5.22 or so."""
    try:
        ours = build("codegen", **OTHERS)
        packed_log_probs(ours, two_groups())
    except ValueError as error:
        lost = "a model that hands its arguments on|position_ids in each layer|attn_implementation="
        assert re.match(f"hf: expected ({lost})", str(error))
        return
    check_packed(ours, build("codegen", "sdpa", **OTHERS), two_groups())


def test_layers_without_positions_are_refused():
    """GPT-BigCode hands on its layout, but not what would show whether the two agree."""
    ours = build("gpt_bigcode", **OTHERS)
    with pytest.raises(
        ValueError, match="hf: expected position_ids in each layer, got none in GPT"
    ):
        packed_log_probs(ours, two_groups())


def sequences(*lengths):
    """[1, N] token ids, restarting positions, boundaries."""
    ids = torch.cat(tokens(*lengths))[None]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    return ids, positions, bounds


def each_alone(model, ids, bounds):
    parts = ids[0].tensor_split(bounds[1:-1].long())
    return torch.cat([model(part[None], use_cache=False).logits[0] for part in parts])


@pytest.mark.parametrize("name", CONFIGS)
def test_positions_that_restart_keep_sequences_apart(name):
    """Under sdpa, with the cache that transformers keeps by default, they silently do not."""
    ours, theirs = build_pair(name)
    ids, positions, bounds = sequences(5, 1, 8, 3)
    expected = each_alone(theirs, ids, bounds)
    expected_gradients = gradients(theirs, expected.log_softmax(-1)[:, 5].mean())
    whole = {"attention_mask": torch.ones_like(ids)}
    for arguments in ({"use_cache": False}, {}, whole, {"cu_seq_lens_q": bounds}):
        found = ours(ids, position_ids=positions, **arguments).logits[0]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        found_gradients = gradients(ours, found.log_softmax(-1)[:, 5].mean())
        assert_equal_gradients(found_gradients, expected_gradients)
    mixed = theirs(ids, position_ids=positions, **whole).logits[0]
    assert (mixed - expected).abs().max() > 0.1


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_boundaries_suffice_where_positions_are_relative(name):
    ours, theirs = build_pair(name)
    ids, positions, bounds = sequences(5, 1, 8, 3)
    found = ours(ids, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=8).logits[0]
    torch.testing.assert_close(found, each_alone(theirs, ids, bounds), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shared_positions", [False, True])
def test_rows_may_each_hold_several_sequences(shared_positions):
    ours, theirs = build_pair("qwen3")
    first, second = sequences(5, 1, 8), sequences(*((5, 1, 8) if shared_positions else (2, 9, 3)))
    ids = torch.cat([first[0], second[0]])
    positions = first[1] if shared_positions else torch.cat([first[1], second[1]])
    found = ours(ids, position_ids=positions).logits
    for row, (alone, _, bounds) in zip(found, (first, second), strict=True):
        torch.testing.assert_close(row, each_alone(theirs, alone, bounds), rtol=0, atol=1e-5)


def test_a_layout_is_derived_once_per_forward(monkeypatch):
    """Once for both layers; again for other numbers in the same tensor; and it is not kept."""
    model, derive, derived = build("llama"), _packing._independent, []
    monkeypatch.setattr(_packing, "_independent", lambda *x: derived.append(x) or derive(*x))
    ids, positions, bounds = sequences(5, 8)
    before = len(_KNOWN)
    found = model(ids, position_ids=positions).logits[0]
    assert len(derived) == 1
    model(ids, position_ids=positions)
    assert len(derived) == 1
    positions.copy_(torch.arange(13))
    dense = model(ids, position_ids=positions).logits[0]
    assert len(derived) == 1 and (dense - found).abs().max() > 0.1
    torch.testing.assert_close(dense, model(ids).logits[0], rtol=0, atol=1e-5)
    with torch.inference_mode():  # where tensors have no version
        _, restarting, _ = sequences(5, 8)
        found_again = model(ids, position_ids=restarting).logits[0]
    torch.testing.assert_close(found_again, found, rtol=0, atol=1e-5)
    del positions
    gc.collect()
    assert len(_KNOWN) <= before
