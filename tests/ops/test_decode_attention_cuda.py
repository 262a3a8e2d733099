"""What only a GPU can show of decode_attention: streams, graphs, waiting, memory, great sizes."""

import pytest
import torch
from decode_inputs import inputs

import fastrl
from fastrl import reference

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
A_WHILE = 300_000_000  # cycles: above a tenth of a second
OF_A_ROW = ("query", "key", "value", "key_start", "key_end")
OF_A_PREFIX = ("prefix_key", "prefix_value", "prefix_end")


def large(batch=48, dtype=torch.bfloat16, seed=0, width=128, prefixes=3):
    return inputs(
        DEVICE, batch, (8, 2), keys=1500, width=width, prefixes=prefixes, shared=1200, dtype=dtype,
        seed=seed,
    )  # fmt: skip


def run(arguments, **options):
    return fastrl.decode_attention(**arguments, return_lse=True, **options)


def assert_same_bits(left, right):
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_nothing_waits_for_the_gpu():
    arguments = large()
    run(arguments)  # compiled before
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(A_WHILE)
        run(arguments)
        assert not torch.cuda.current_stream().query()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_cuda_graph_decodes_step_after_step():
    """The caller's cache and bounds change in place; the graph stays."""
    static = large()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(static)
    for seed in (1, 2, 3):
        for x, y in zip(static.values(), large(seed=seed).values(), strict=True):
            x.copy_(y)
        graph.replay()
        assert_same_bits(found, run(static))
        assert found[0].isfinite().all()


def test_the_current_stream_is_used():
    old, new = large(seed=1), large(seed=2)
    expected = run(new)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(A_WHILE)
        for x, y in zip(old.values(), new.values(), strict=True):
            x.copy_(y)
        found = run(old)
    side.synchronize()
    assert_same_bits(found, expected)


@pytest.mark.parametrize("width", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_row_depends_neither_on_the_others_nor_on_who_shares_its_prefix(dtype, width):
    arguments = large(200, dtype, width=width)
    together = run(arguments)
    rows = arguments["prefix_cu_rows"].tolist()
    for p in range(3):
        for b in {rows[p], rows[p + 1] - 1} & {*range(rows[p], rows[p + 1])}:
            alone = {k: arguments[k][b : b + 1].clone() for k in OF_A_ROW}
            alone |= {k: arguments[k][p : p + 1].clone() for k in OF_A_PREFIX}
            assert_same_bits((x[0] for x in run(alone)), (x[b] for x in together))


def test_run_to_run_not_a_bit_differs():
    arguments = large()
    first = run(arguments)
    for _ in range(5):
        assert_same_bits(run(arguments), first)


def test_another_batch_or_another_step_compiles_nothing():
    from fastrl.kernels import decode_attention as module

    kernels = (module._decode_attention_chunk_kernel, module._decode_attention_merge_kernel)

    def count():
        return [len(k.device_caches[torch.cuda.current_device()][0]) for k in kernels]

    run(large())
    before = count()
    for batch, prefixes in ((1, 2), (16, 2), (33, 5), (200, 17)):
        run(large(batch, prefixes=prefixes))
        run(inputs(DEVICE, batch, (8, 2), keys=77, width=128, prefixes=prefixes, shared=9,
                   dtype=torch.bfloat16))  # fmt: skip
    assert count() == before and all(before)


def test_many_prefixes():
    """More than a program looks at in a few steps, most of them without rows."""
    arguments = inputs(DEVICE, 300, (4, 2), keys=9, width=64, prefixes=2000, shared=6)
    truth = {k: x.double() if x.is_floating_point() else x for k, x in arguments.items()}
    expected = reference.decode_attention(**truth)
    torch.testing.assert_close(run(arguments)[0].double(), expected, rtol=1e-5, atol=1e-5)


def test_more_entries_than_an_int32_counts():
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free memory")
    batch, room = 72, 2**18
    cache = torch.zeros(batch, 1, room, 128, dtype=torch.bfloat16, device=DEVICE)
    assert cache.numel() > 2**31
    query = torch.randn(batch, 4, 1, 128, dtype=torch.bfloat16, device=DEVICE)
    cache[-1, :, -300:] = torch.randn(300, 128, dtype=torch.bfloat16, device=DEVICE)
    start = torch.full((batch,), room - 300, dtype=torch.int32, device=DEVICE)
    output = fastrl.decode_attention(query, cache, cache, key_start=start)
    assert (output[:-1] == 0).all()
    last = cache[-1:, :, -300:].clone()
    assert torch.equal(output[-1:], fastrl.decode_attention(query[-1:], last, last))


def test_memory_is_that_of_the_partial_sums():
    arguments = inputs(
        DEVICE, 64, (32, 8), keys=8192, width=128, dtype=torch.bfloat16, bounds=("key_end",)
    )
    run(arguments)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(arguments)
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= 0.03 * 2 * arguments["key"].nbytes


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_another_device_than_the_current_one():
    arguments = large()
    there = run({k: x.to("cuda:1") for k, x in arguments.items()})
    assert torch.cuda.current_device() == 0
    assert all(x.device == torch.device("cuda:1") for x in there)
    assert_same_bits((x.to(DEVICE) for x in there), run(arguments))
