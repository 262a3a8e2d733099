"""Models on a GPU: our attention against transformers' own, both there."""

import pytest
import torch

from fastrl import PackedBatch

pytest.importorskip("transformers")  # `make gpu` may be without
from hf_models import (  # noqa: E402
    CONFIGS,
    VOCAB,
    assert_equal_gradients,
    build_pair,
    gradients,
    log_probs,
)

pytestmark = pytest.mark.gpu

DEVICE = "cuda"


def pair(name):
    return [model.to(DEVICE) for model in build_pair(name)]


def check(found, atol=5e-5):
    """Log-probs and gradients of ours and of theirs."""
    (ours, our_gradients), (theirs, their_gradients) = found
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)
    assert_equal_gradients(our_gradients, their_gradients, atol=atol)


@pytest.mark.parametrize("name", CONFIGS)
def test_padded_rows(name):
    token_ids = torch.randint(2, VOCAB, (2, 9))
    mask = torch.ones_like(token_ids)
    mask[0, :4] = mask[1, 6:] = 0
    token_ids, mask = (token_ids * mask).to(DEVICE), mask.to(DEVICE)
    counts, found = (mask[:, 1:] & mask[:, :-1]).bool(), []
    for model in pair(name):
        log_p = log_probs(model, token_ids, attention_mask=mask)
        predicted = log_p[:, :-1].gather(2, token_ids[:, 1:, None])[..., 0]
        found.append((log_p[mask.bool()], gradients(model, -predicted[counts].mean())))
    check(found)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss", "gpt2"])
def test_a_shared_prompt(name):
    """A prompt with three completions, against rows that each have a copy of it."""
    lengths = [5, 4, 7, 2]
    tokens = [torch.randint(2, VOCAB, (length,)) for length in lengths]
    batch = PackedBatch.from_segments(tokens, [-1, 0, 0, 0]).to(DEVICE)
    layout, found = batch.layout, []
    ours, theirs = pair(name)
    positions = layout.position_ids[None]
    logits = ours(batch.token_ids[None], position_ids=positions, layout=layout).logits[0]
    of_targets = logits[batch.predict_index].log_softmax(-1)
    log_p = of_targets.gather(1, batch.target_ids[:, None])[:, 0]
    found.append((log_p, gradients(ours, -log_p.mean())))
    rows = []
    for completion in tokens[1:]:
        row = torch.cat([tokens[0], completion]).to(DEVICE)
        log_p = log_probs(theirs, row[None])[0, :-1].gather(1, row[1:, None])[:, 0]
        rows.append(log_p[lengths[0] - 1 :])
    log_p = torch.cat(rows)
    found.append((log_p, gradients(theirs, -log_p.mean())))
    check(found)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_gives_the_same_tokens(cache):
    token_ids = torch.randint(2, VOCAB, (2, 6), device=DEVICE)
    options = dict(do_sample=False, max_new_tokens=5, cache_implementation=cache)
    found = [model.generate(token_ids, **options) for model in pair("mistral")]
    assert found[0].shape == (2, 11) and torch.equal(*found)
