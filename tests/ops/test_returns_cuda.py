"""What only a GPU can show of the returns: that what the emulator runs is what the GPU does, at
sizes that fill it, under torch.compile, on other streams and devices."""

import pytest
import torch
from budget import TOLERANCE, assert_within_budget
from emulated.returns import FLOATS, OPS, OPTIONS, arguments, in_double
from torch import library

import fastrl
from fastrl import reference

pytestmark = pytest.mark.gpu

A_WHILE = 300_000_000  # cycles: above a tenth of a second
# Around 4 steps of a thread, 32 lanes, 128 steps of a warp and 2048 of a block; and empty ones.
LENGTHS = [0, 1, 3, 4, 5, 31, 32, 33, 0, 127, 128, 129, 255, 256, 257, 1023, 1024, 1025, 2047, 2048]
LENGTHS += [2049, 4100, 0]
EVERY = [(op, option) for op in OPS for option in OPTIONS]


def packed(lengths=LENGTHS):
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    return (int(bounds[-1]),), bounds


def on_gpu(given, device="cuda"):
    return {k: x.to(device) if isinstance(x, torch.Tensor) else x for k, x in given.items()}


def call(op, given, namespace=fastrl):
    found = getattr(namespace, op)(**given)
    return found if isinstance(found, tuple) else (found,)


def check(op, given, dtype=torch.float32):
    truth, eager = call(op, in_double(given), reference), call(op, given, reference)
    for x, e, t in zip(call(op, on_gpu(given)), eager, truth, strict=True):
        assert_within_budget(x.cpu(), e, t, dtype)


def assert_same_bits(left, right):
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("op, option", EVERY)
def test_packed_rows_of_all_lengths(op, option):
    shape, bounds = packed()
    check(op, arguments(op, shape, option, cu_seqlens=bounds))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", OPS)
def test_other_dtypes(op, dtype):
    shape, bounds = packed([700, 3, 2100, 128])
    for option in ("mask", "everything"):
        check(op, arguments(op, shape, option, dtype, bounds), dtype)


@pytest.mark.parametrize("op, option", EVERY)
def test_gradients_are_those_of_the_reference(op, option):
    shape, bounds = packed([0, 1, 5, 150, 0, 128, 2200])
    given = arguments(op, shape, option, torch.float64, bounds)
    names = [n for n in ("rewards", *FLOATS[op], "bootstrap_value", "next_values") if n in given]
    found = []
    for namespace, device in ((reference, "cpu"), (fastrl, "cuda")):
        moved = on_gpu(given, device)
        leaves = {n: moved[n].nan_to_num(0.5).requires_grad_() for n in names}
        outputs = call(op, moved | leaves, namespace)
        generator = torch.Generator().manual_seed(1)
        loss = sum((x * torch.randn(x.shape, generator=generator).to(x)).sum() for x in outputs)
        found.append(torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True))
    for name, truth, x in zip(names, *found, strict=True):
        torch.testing.assert_close(x.cpu(), truth, rtol=1e-11, atol=1e-11, msg=name)


@pytest.mark.parametrize("length", [1, 27, 128, 129, 1000, 2048, 4099, 30_000])
@pytest.mark.parametrize("op, option", [(op, o) for op in OPS for o in ("mask", "everything")])
def test_a_row_gives_the_same_bits_in_every_layout(op, option, length):
    shape = (3, length)
    given = on_gpu(arguments(op, shape, option))
    expected = call(op, given)
    per_step = {k for k, x in given.items() if isinstance(x, torch.Tensor) and x.shape == shape}

    def moved(layout):
        return {k: layout(x) if k in per_step else x for k, x in given.items()}

    assert_same_bits(call(op, moved(lambda x: x.t().contiguous().t())), expected)
    assert_same_bits(
        call(op, moved(lambda x: torch.nn.functional.pad(x, (1, 2))[:, 1:-2])), expected
    )
    flat = moved(lambda x: x.reshape(-1))
    flat["cu_seqlens"] = torch.arange(4, dtype=torch.int32, device="cuda") * length
    assert_same_bits([x.reshape(shape) for x in call(op, flat)], expected)
    for row in range(3):
        rows = per_step | {"bootstrap_value"}
        alone = {k: x[row : row + 1] if k in rows else x for k, x in given.items()}
        assert_same_bits(call(op, alone), [x[row : row + 1] for x in expected])


@pytest.mark.parametrize("op", OPS)
def test_runs_agree_where_many_blocks_wait_for_each_other(op):
    """Rows of up to a million steps, beside short ones, again and again."""
    shape, bounds = packed([1_000_000, 3, 700_000, 0, 2048, *([300] * 1000), 40_000])
    given = on_gpu(arguments(op, shape, "mask", cu_seqlens=bounds))
    expected = call(op, given)
    for _ in range(20):
        assert_same_bits(call(op, given), expected)


@pytest.mark.parametrize("steps", [100_000, 1_100_000])
def test_long_rows_keep_their_digits(steps):
    generator = torch.Generator().manual_seed(0)
    rewards = torch.rand(1, steps, generator=generator)
    found = fastrl.discounted_returns(rewards.cuda(), gamma=0.9999)[0].double().cpu()
    truth, x = [], 0.0
    for reward in reversed(rewards[0].double().tolist()):
        x = reward + 0.9999 * x
        truth.append(x)
    truth = torch.tensor(truth[::-1], dtype=torch.float64)
    assert ((found - truth) / truth).abs().max() < 1e-6


def test_a_batch_that_fills_the_gpu():
    """The shapes that are timed, against the scan of the same numbers in double."""
    for shape in ((8192, 2048), (1, 1_048_576), (8192, 128)):
        x = torch.randn(3, *shape, device="cuda")
        options = {"gamma": 0.99, "gae_lambda": 0.95, "next_values": x[2]}
        options["terminated"] = torch.rand(shape, device="cuda") < 0.01
        single = fastrl.gae(x[0], x[1], **options)
        options["next_values"] = options["next_values"].double()
        double = fastrl.gae(x[0].double(), x[1].double(), **options)
        for a, b in zip(single, double, strict=True):
            assert (a - b).abs().max() < TOLERANCE[torch.float32] * b.abs().max()


@pytest.mark.parametrize("op", OPS)
def test_opcheck_and_compile(op):
    given = on_gpu(arguments(op, (3, 300), "everything"))

    def function(rewards):
        return call(op, given | {"rewards": rewards})

    assert_same_bits(
        torch.compile(function, fullgraph=True)(given["rewards"]), function(given["rewards"])
    )
    tensors = [given[name] for name in ("rewards", *FLOATS[op])]
    path = [given["terminated"], given["truncated"], given["mask"], None, None, None, 0.9, 0.8]
    further = {"n_step_returns": [3], "vtrace": [1.0, 1.0, True], "retrace_returns": [1.0, True]}
    library.opcheck(
        getattr(torch.ops.fastrl, op).default,
        (*tensors, None, given["next_values"], *path, *further.get(op, [])),
    )


def test_the_current_stream_is_waited_for():
    stream = torch.cuda.Stream()
    rewards = torch.zeros(4, 5000, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(A_WHILE)
        rewards.fill_(1.0)
        returns = fastrl.discounted_returns(rewards, gamma=1.0)
    stream.synchronize()
    assert torch.equal(returns[:, 0], torch.full((4,), 5000.0, device="cuda"))


def test_a_graph_replays_long_rows():
    rewards = torch.ones(2, 9000, device="cuda")
    fastrl.discounted_returns(rewards, gamma=1.0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        returns = fastrl.discounted_returns(rewards, gamma=1.0)
    for value in (1.0, 2.0, 3.0):
        rewards.fill_(value)
        graph.replay()
        assert returns[:, 0].tolist() == [9000 * value] * 2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one():
    given = arguments("gae", (3, 5000), "bootstrap")
    assert_same_bits(
        [x.cpu() for x in call("gae", on_gpu(given, "cuda:1"))],
        [x.cpu() for x in call("gae", on_gpu(given, "cuda:0"))],
    )
    assert torch.cuda.current_device() == 0
