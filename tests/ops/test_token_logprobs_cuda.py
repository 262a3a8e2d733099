"""What only a GPU can show of token_logprobs: streams, graphs, waiting, memory, great sizes."""

import pytest
import torch

import fastrl
from fastrl import reference

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
VOCAB = 50257  # odd, more than one stretch of the vocabulary
A_WHILE = 300_000_000  # cycles: above a tenth of a second, a thousand times what a launch takes


def inputs(rows, vocab=VOCAB, dtype=torch.bfloat16, seed=0):
    """logits, token_ids, and the gradients that come from above."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    options = {"generator": generator, "device": DEVICE}
    logits = torch.randn(rows, vocab, dtype=dtype, **options)
    token_ids = torch.randint(vocab, (rows,), **options)
    return logits, token_ids, torch.randn(rows, **options), torch.randn(rows, **options)


def run(logits, token_ids, g, h, **options):
    """logprobs, entropy and the gradient of the logits, which are not copied."""
    logits = logits.detach().requires_grad_()
    outputs = fastrl.token_logprobs(logits, token_ids, return_entropy=True, **options)
    (grad,) = torch.autograd.grad(outputs, logits, (g, h))
    return *(x.detach() for x in outputs), grad


def assert_same_bits(left, right):
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("inplace", [False, True])
def test_nothing_waits_for_the_gpu(inplace):
    arguments = inputs(16)
    run(*arguments, inplace_backward=inplace)  # compiled before
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(A_WHILE)
        run(*arguments, inplace_backward=inplace)
        assert not torch.cuda.current_stream().query()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_current_stream_is_used():
    old, new = inputs(16, seed=1), inputs(16, seed=2)
    expected = run(*new)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(A_WHILE)
        for x, y in zip(old, new, strict=True):
            x.copy_(y)
        found = run(*old)
    side.synchronize()
    assert_same_bits(found, expected)


def test_a_cuda_graph_replays_with_new_data():
    static = inputs(16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(*static)
    for seed in (1, 2):
        new = inputs(16, seed=seed)
        for x, y in zip(static, new, strict=True):
            x.copy_(y)
        graph.replay()
        assert_same_bits(found, run(*new))


def test_compiled_into_cuda_graphs():
    def loss(x, token_ids):
        logprobs, entropy = fastrl.token_logprobs(x * 2.0, token_ids, return_entropy=True)
        return (logprobs - 0.1 * entropy).sum()

    compiled = torch.compile(loss, fullgraph=True, mode="reduce-overhead")
    for seed in range(4):  # recorded on the way, replayed at last
        logits, token_ids, *_ = inputs(16, seed=seed)
        grads = []
        for function in (compiled, loss):
            x = logits.clone().requires_grad_()
            function(x, token_ids).backward()
            grads.append(x.grad.clone())
        torch.testing.assert_close(*grads)


def test_dynamo_does_not_look_into_the_launcher(monkeypatch):
    from fastrl.kernels import token_logprobs as module

    launch, seen = module.token_logprobs_fwd, []

    def spy(*arguments):
        seen.append(torch.compiler.is_compiling())
        return launch(*arguments)

    monkeypatch.setattr(module, "token_logprobs_fwd", spy)

    def frame(logits, token_ids):
        torch._dynamo.skip_frame()
        return torch.ops.fastrl.token_logprobs_fwd(logits, token_ids, 1.0, -100, True, False)

    logits, token_ids, *_ = inputs(4)
    assert_same_bits(torch.compile(frame)(logits, token_ids), frame(logits, token_ids))
    assert seen == [False, False]


def test_out_of_range_ids_give_nan_and_nothing_else_is_touched():
    around = torch.full((6, VOCAB), 7.0, device=DEVICE)
    logits = around[1:5].normal_()
    token_ids = torch.tensor([VOCAB, -1, 2**40, 3], device=DEVICE)
    g, h = torch.ones(2, 4, device=DEVICE)
    for inplace in (False, True):
        logprobs, _, grad = run(logits, token_ids, g, h, inplace_backward=inplace)
        assert logprobs[:3].isnan().all() and logprobs[3].isfinite()
        assert grad[:3].isnan().all() and grad[3].isfinite().all()
    assert grad.data_ptr() == logits.data_ptr()
    assert (around[[0, 5]] == 7.0).all()


def test_another_number_of_rows_compiles_nothing():
    from fastrl.kernels import _row_states, token_logprobs

    kernels = (
        _row_states._token_logprobs_fwd_kernel,
        _row_states._token_logprobs_merge_kernel,
        token_logprobs._token_logprobs_bwd_kernel,
    )

    def count():
        return [len(k.device_caches[torch.cuda.current_device()][0]) for k in kernels]

    for vocab in (VOCAB, 32000):
        run(*inputs(5, vocab))
        before = count()
        for rows in (1, 2, 16, 33, 1024):
            run(*inputs(rows, vocab))
        logits, *rest = inputs(5 * 7, vocab)
        batch = [x.unflatten(0, (5, 7))[:, :-1] for x in (logits, *rest)]
        run(*batch)
        assert count() == before and all(before)


@pytest.mark.parametrize("vocab", [VOCAB, 65536])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_depends_neither_on_its_batch_nor_on_its_address(dtype, vocab):
    arguments = inputs(700, vocab, dtype)
    together = run(*arguments)
    for row in (1, 350, 698):
        of_row = [x[row] for x in together]
        alone = [x[row].clone() for x in arguments]
        assert_same_bits(run(*alone), of_row)
        for rows in (slice(row, row + 1), slice(row - 1, row + 2), slice(0, row + 1)):
            found = run(*(x[rows] for x in arguments))
            assert_same_bits((x[row - rows.start] for x in found), of_row)
        for shift in (1, 4):
            shifted = torch.empty(vocab + shift, dtype=dtype, device=DEVICE)[shift:]
            assert_same_bits(run(shifted.copy_(arguments[0][row]), *alone[1:]), of_row)


def test_run_to_run_not_a_bit_differs():
    arguments = inputs(300, 151936)
    first = run(*arguments)
    for _ in range(5):
        assert_same_bits(run(*arguments), first)


def test_more_entries_than_an_int32_counts():
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free memory")
    arguments = inputs(16384, 151936)
    assert arguments[0].numel() > 2**31
    together = run(*arguments)
    for row in (0, 2**31 // 151936, 16383):
        alone = [x[row].clone() for x in arguments]
        assert_same_bits(run(*alone), [x[row] for x in together])
    truth = reference.token_logprobs(alone[0].double(), alone[1], return_entropy=True)
    for actual, exact in zip(together, truth, strict=False):
        torch.testing.assert_close(actual[-1].double(), exact, rtol=1e-6, atol=0)


def extra_bytes(arguments, **options):
    run(*arguments, **options)  # compiled before
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(*arguments, **options)
    return torch.cuda.max_memory_allocated() - before


def test_memory():
    """The gradient, and next to nothing beside it."""
    arguments = inputs(256, 151936, torch.float32)
    matrix = arguments[0].nbytes
    assert matrix <= extra_bytes(arguments) <= 1.01 * matrix
    assert extra_bytes(arguments, inplace_backward=True) <= 0.01 * matrix


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_another_device_than_the_current_one():
    arguments = inputs(16)
    there = run(*(x.to("cuda:1") for x in arguments))
    assert torch.cuda.current_device() == 0
    assert all(x.device == torch.device("cuda:1") for x in there)
    for actual, expected in zip(there, run(*arguments), strict=True):
        torch.testing.assert_close(actual.to(DEVICE), expected)
