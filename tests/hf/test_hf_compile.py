"""torch.compile(fullgraph=True): the same numbers, one graph for all layouts, and errors that
appear when the graph runs. The eager backend runs what Dynamo traced, aot_eager its."""

import pytest
import torch
from hf_models import VOCAB, build
from torch._dynamo.exc import Unsupported
from transformers import masking_utils

from fastrl import pack_groups

IDS = torch.arange(2, 11)[None]


def packed(prompts, completions):
    def tokens(length):
        return torch.randint(2, VOCAB, (length,))

    groups = [[tokens(length) for length in group] for group in completions]
    batch = pack_groups([tokens(length) for length in prompts], groups)
    layout = batch.layout
    arguments = dict(position_ids=layout.position_ids[None], layout=layout, use_cache=False)
    return batch.token_ids[None], arguments


def compiled(model, name="eager"):
    """And a list that grows by one per graph."""
    graphs, backend = [], torch._dynamo.lookup_backend(name)
    torch._dynamo.reset()

    def counting(graph, inputs):
        graphs.append(graph)
        return backend(graph, inputs)

    return torch.compile(model, fullgraph=True, backend=counting), graphs


def test_layouts_share_a_graph():
    model = build("llama", num_hidden_layers=1)
    fast, graphs = compiled(model, "aot_eager")
    for shape in (([5, 3], [[4, 2], [3]]), ([4], [[3, 2, 6]]), ([6, 2, 2], [[3], [1], [2, 1]])):
        ids, arguments = packed(*shape)
        found, expected = fast(ids, **arguments).logits, model(ids, **arguments).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        gradients = [torch.autograd.grad(x.std(), model.lm_head.weight) for x in (found, expected)]
        torch.testing.assert_close(*gradients, rtol=0, atol=1e-5)
    assert len(graphs) <= 2  # of the first size, then of any
    arguments["position_ids"] = arguments["position_ids"] + 1
    with pytest.raises(RuntimeError, match="position_ids like layout.position_ids, got others"):
        fast(ids, **arguments)


def test_padding_and_restarts():
    model = build("mistral")
    fast, _ = compiled(model)
    ids = torch.randint(2, VOCAB, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[1, 7:] = 0
    for given in (None, mask):
        found, expected = (
            m(ids, attention_mask=given, use_cache=False).logits for m in (fast, model)
        )
        counts = mask.bool() if given is not None else mask >= 0
        torch.testing.assert_close(found[counts], expected[counts], rtol=0, atol=1e-5)
    mask[0, 6] = 0
    with pytest.raises(RuntimeError, match="padding before or after their tokens, got some betw"):
        fast(ids, attention_mask=mask, use_cache=False)
    with pytest.raises(RuntimeError, match="position_ids that rise by one under torch.compile"):
        fast(ids, position_ids=torch.arange(9)[None] % 5, use_cache=False)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text"])
def test_decoding_with_a_static_cache(name):
    from transformers import CompileConfig

    model, mask = build(name), torch.ones(2, 6, dtype=torch.long)
    ids = torch.randint(2, VOCAB, (2, 6))
    mask[0, :3] = 0
    eager = CompileConfig(fullgraph=True, backend="eager", mode=None)
    eager._compile_all_devices = True
    settings = dict(max_new_tokens=5, do_sample=False, cache_implementation="static")
    torch._dynamo.reset()
    found = model.generate(ids, attention_mask=mask, compile_config=eager, **settings)
    assert hasattr(model, "_compiled_call")
    assert torch.equal(found, model.generate(ids, attention_mask=mask, **settings))


@pytest.mark.parametrize(
    "create, given, error",
    [
        ("create_causal_mask", dict(block_sequence_ids=torch.zeros(1, 9).long()), RuntimeError),
        ("create_causal_mask", dict(or_mask_function=lambda b, h, q, k: q >= k), Unsupported),
        ("create_chunked_causal_mask", {}, Unsupported),
        ("create_bidirectional_mask", {}, Unsupported),
    ],
)
def test_masks_that_are_more_than_causal(create, given, error):
    if not hasattr(masking_utils, "blockwise_overlay") and "block_sequence_ids" in given:
        pytest.skip("transformers has no such mask yet")
    config = build("mistral", attention_chunk_size=4).config
    kept = dict(attention_mask=None, config=config)
    if "bidirectional" not in create:
        kept |= dict(position_ids=torch.arange(9)[None])
        takes_cache = "cache" in masking_utils.create_causal_mask.__code__.co_varnames
        kept |= {"cache" if takes_cache else "past_key_values": None}

    def mask(embeddings):
        getattr(masking_utils, create)(inputs_embeds=embeddings, **kept, **given)
        return embeddings + 1

    fast, _ = compiled(mask)
    with pytest.raises(error, match="hf: expected (causal attention|transformers' own)"):
        fast(torch.zeros(1, 9, 32))
