"""What only a GPU can show of attention: tensor cores, descriptors, streams, great sizes."""

import pytest
import torch
from budget import assert_within_budget
from eager_attention import assert_no_worse_than_eager

import fastrl
from fastrl import reference
from fastrl.layout import PackedLayout

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
A_WHILE = 300_000_000  # cycles: above a tenth of a second, a thousand times what a launch takes


def inputs(shape, dtype=torch.bfloat16, seed=0):
    """query, key, value, and the gradients that come from above; shape = (B, Hq, Hkv, T, S, D)."""
    batch, heads, key_heads, T, S, D = shape
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def randn(*sizes, dtype=dtype):
        return torch.randn(sizes, generator=generator, device=DEVICE, dtype=dtype)

    query, grad_output = randn(batch, heads, T, D), randn(batch, heads, T, D)
    key, value = randn(batch, key_heads, S, D), randn(batch, key_heads, S, D)
    return query, key, value, grad_output, randn(batch, heads, T, dtype=torch.float32)


def run(tensors, attention=None, dtype=None, **options):
    """output, lse and the three gradients."""
    *inputs_, grad_output, grad_lse = tensors
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs_]
    outputs = (attention or fastrl.attention)(*leaves, return_lse=True, **options)
    above = [g.to(x.dtype) for g, x in zip((grad_output, grad_lse), outputs, strict=True)]
    grads = torch.autograd.grad(outputs, leaves, above)
    return *(x.detach() for x in outputs), *grads


def layout_of(lengths, prefix):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return PackedLayout(cu_seqlens, torch.tensor(prefix, dtype=torch.int32)).to(DEVICE)


def assert_same_bits(left, right):
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def check(tensors, **options):
    dtype = tensors[0].dtype
    actual = run(tensors, **options)
    eager = run(tensors, reference.attention, **options)
    truth = run(tensors, reference.attention, torch.float64, **options)
    for i, parts in enumerate(zip(actual, eager, truth, strict=True)):
        assert_within_budget(*parts, torch.float32 if i == 1 and dtype == torch.float32 else dtype)


OPTIONS = {
    "causal": {},
    "all keys": {"causal": False},
    "a window": {"window": 200},
    "softcap": {"softcap": 3.0, "scale": -0.2},
    "both": {"window": 130, "softcap": 3.0},
}
GROUPS = ([300, 140, 0, 33, 500, 20, 260], [-1, 0, 0, 0, -1, 4, 4])
TREE = ([64, 3, 328, 5, 250, 0, 90, 130], [-1, 0, 0, 2, 2, -1, 5, 6])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("D", [32, 64, 80, 96, 112, 128, 256, 33])
@pytest.mark.parametrize("name", OPTIONS)
def test_dense(name, D, dtype):
    check(inputs((2, 4, 2, 300, 420, D), dtype), **OPTIONS[name])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("D", [32, 64, 80, 128, 256])
@pytest.mark.parametrize("name", ["causal", "a window", "softcap", "both"])
@pytest.mark.parametrize("forest", [GROUPS, TREE], ids=["groups", "tree"])
def test_packed(forest, name, D, dtype):
    layout = layout_of(*forest)
    N = layout.num_tokens
    check(inputs((1, 4, 2, N, N, D), dtype), layout=layout, **OPTIONS[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_of_keys_and_values_with_a_mean(packed, dtype):
    layout = layout_of([400, 140, 260], [-1, 0, 0])
    query, key, value, grad_output, grad_lse = inputs((1, 4, 2, 800, 800, 64), torch.float32)
    tensors = [x.to(dtype) for x in (query, key + 3, value + 1, grad_output)]
    options = {"layout": layout if packed else None}
    found = run([*tensors, 0 * grad_lse], **options)
    assert_no_worse_than_eager(found[2:], tensors, **options)


@pytest.mark.parametrize("dtype", FLOATS)
def test_keys_that_exist_and_garbage_beside_them(dtype):
    start = torch.tensor([0, 100, 0, 250], device=DEVICE, dtype=torch.int32)
    end = torch.tensor([420, 420, 130, 250], device=DEVICE, dtype=torch.int32)
    j = torch.arange(420, device=DEVICE)
    for options in ({"key_start": start, "key_end": end}, {"key_start": start}):
        outside = (j < start[:, None]) | (j >= options.get("key_end", start * 0 + 420)[:, None])
        tensors = list(inputs((4, 2, 1, 300, 420, 64), dtype))
        check(tensors, **options)
        clean = run(tensors, **options)
        for i in (1, 2):
            tensors[i] = tensors[i].masked_fill(outside[:, None, :, None], float("nan"))
        assert_same_bits(run(tensors, **options), clean)


def test_a_long_loop_is_split():
    """More than 8192 queries see the prompt."""
    layout = layout_of([300] + [1000] * 17, [-1] + [0] * 17)
    N = layout.num_tokens
    tensors = inputs((1, 2, 1, N, N, 64))
    assert len(layout.schedule[3]) > 2  # two of them sum nothing
    actual = run(tensors, layout=layout)
    keep = torch.cat([torch.arange(300), torch.arange(N - 1000, N)]).to(DEVICE)
    pair = layout_of([300, 1000], [-1, 0])
    alone = run([x[:, :, keep] for x in tensors], layout=pair)
    assert_same_bits(alone[:3], [x[:, :, keep] for x in actual[:3]])
    # A key's gradient is the sum over the completions of what each gives alone, less the prompt's.
    exact = torch.zeros(1, 1, 300, 64, device=DEVICE, dtype=torch.float64)
    for s in range(17):
        own = torch.arange(300 + 1000 * s, 1300 + 1000 * s, device=DEVICE)
        both = torch.cat([keep[:300], own])
        parts = [x[:, :, both].clone() for x in tensors]
        if s:
            for g in parts[3:]:
                g[:, :, :300] = 0  # the prompt's own queries count once
        exact += run(parts, reference.attention, torch.float64, layout=pair)[4][:, :, :300]
    error = (actual[4][:, :, :300].double() - exact).abs().max()
    assert error <= 1.6e-2 * exact.abs().max()


@pytest.mark.parametrize("D", [64, 80, 128])
@pytest.mark.parametrize("options", [{}, {"window": 150}, {"softcap": 3.0}], ids=str)
def test_a_row_does_not_depend_on_its_batch_nor_on_its_padding(D, options):
    tensors = inputs((5, 4, 2, 400, 400, D))
    starts = torch.tensor([0, 37, 0, 128, 5], device=DEVICE, dtype=torch.int32)
    together = run(tensors, key_start=starts, **options)
    for row, start in enumerate(starts.tolist()):
        own = [x[row : row + 1] for x in tensors]
        alone = run(own, key_start=starts[row : row + 1], **options)
        assert_same_bits(alone, [x[row : row + 1] for x in together])
        without = run([x[:, :, start:].clone() for x in own], **options)
        assert_same_bits(without, [x[row : row + 1, :, start:] for x in together])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", [{}, {"window": 150}, {"softcap": 3.0}], ids=str)
def test_a_tree_does_not_depend_on_others(dtype, options):
    lengths = [77, *TREE[0], 300, 40]
    layout = layout_of(lengths, [-1, *(p + 1 if p >= 0 else -1 for p in TREE[1]), -1, 9])
    alone = layout_of(*TREE)
    first, N = 77, alone.num_tokens
    tensors = inputs((1, 4, 2, layout.num_tokens, layout.num_tokens, 64), dtype)
    together = run(tensors, layout=layout, **options)
    own = [x[:, :, first : first + N].clone() for x in tensors]
    assert_same_bits(
        run(own, layout=alone, **options), [x[:, :, first : first + N] for x in together]
    )


def test_run_to_run_not_a_bit_differs():
    layout = layout_of([1000] + [700] * 16, [-1] + [0] * 16)
    tensors = inputs((1, 8, 2, layout.num_tokens, layout.num_tokens, 128))
    first = run(tensors, layout=layout)
    for _ in range(5):
        assert_same_bits(run(tensors, layout=layout), first)


LYING = {
    "heads behind tokens": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "a part of a projection": lambda x: torch.cat([x, x], dim=-1)[..., : x.shape[-1]],
    "off 16 bytes": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
    "rows that are not dense": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "broadcast": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("name", LYING)
def test_strides_change_no_bit(name):
    *tensors, grad_lse = inputs((2, 4, 4, 300, 300, 64))
    lying = [LYING[name](x) for x in tensors]
    assert_same_bits(run([*lying, grad_lse]), run([*(x.contiguous() for x in lying), grad_lse]))


def test_more_tiles_than_a_grid_has_in_its_other_axes():
    """4096 rows of 16 heads, and 70 000 tiles of one row."""
    for shape in ((4096, 16, 1, 3, 3, 16), (1, 1, 1, 70_000 * 128, 5, 16)):
        tensors = inputs(shape)
        last = [x[-1:, :, -3:].clone() for x in tensors]
        options = {"causal": False} if shape[3] > shape[4] else {}
        if options:
            last[1:3] = tensors[1:3]
        found, alone = run(tensors, **options), run(last, **options)
        assert_same_bits([x[-1:, :, -3:] for x in found[:3]], alone[:3])


def test_offsets_beyond_an_int32():
    """[1, 2, T, 128] as a part of a projection of 40 heads: the last row begins beyond 2^32."""
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free memory")
    T, heads, D = 2**20, 40, 128
    base = torch.empty(1, T, heads, D, device=DEVICE, dtype=torch.bfloat16)
    query = base[:, :, -2:].normal_().transpose(1, 2)
    assert query.stride(2) * T > 2**32
    output = fastrl.attention(query, query, query, window=64)
    tail = [query[:, :, -300:].clone() for _ in range(3)]
    expected = fastrl.attention(*tail, window=64)
    torch.testing.assert_close(output[:, :, -100:], expected[:, :, -100:], rtol=2e-2, atol=2e-2)


def test_nothing_waits_for_the_gpu():
    layout = layout_of(*GROUPS)
    tensors = inputs((1, 4, 2, layout.num_tokens, layout.num_tokens, 64))
    run(tensors, layout=layout)  # compiled before
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(A_WHILE)
        run(tensors, layout=layout)
        assert not torch.cuda.current_stream().query()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_cuda_graph_replays_with_new_data():
    static = inputs((2, 4, 2, 200, 200, 64))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(static)
    for seed in (1, 2):
        new = inputs((2, 4, 2, 200, 200, 64), seed=seed)
        for x, y in zip(static, new, strict=True):
            x.copy_(y)
        graph.replay()
        assert_same_bits(found, run(new))


def test_another_batch_compiles_nothing():
    from fastrl.kernels import _attention_keys, _attention_queries

    kernels = [
        _attention_queries._attention_fwd_kernel,
        _attention_queries._attention_rows_kernel,
        _attention_queries._attention_dq_kernel,
        _attention_keys._attention_dkdv_kernel,
    ]

    def count():
        return [len(k.device_caches[torch.cuda.current_device()][0]) for k in kernels]

    def both(batch, T, lengths):
        run(inputs((batch, 4, 2, T, T, 64)))
        layout = layout_of(lengths, [-1] + [0] * (len(lengths) - 1))
        run(inputs((1, 4, 2, layout.num_tokens, layout.num_tokens, 64)), layout=layout)

    both(3, 500, [100, 20])
    before = count()
    for batch, T, lengths in ((1, 16, [5]), (2, 1, [129, 128, 0, 7]), (16, 1000, [8192] * 3)):
        both(batch, T, lengths)
    assert count() == before and all(before)


def test_memory_is_that_of_the_results():
    """No scores of all queries by all keys: 64 MiB a head here."""
    tensors = inputs((1, 8, 8, 4096, 4096, 64))
    run(tensors)  # compiled before
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(tensors)
    assert torch.cuda.max_memory_allocated() - before <= 8 * tensors[0].nbytes
