"""What the launchers allocate and refuse. Their device, stream and memory are stand-ins here."""

import pytest
import torch
from emulated.returns import FLOATS, OPS, arguments, forward, further, path
from torch._subclasses.fake_tensor import FakeTensorMode

SHAPES = [(4, 7), (2, 3, 5), (6,), (1, 9), (9, 1), (0, 4), (3, 0), (2, 1, 1, 3)]


def time_major(x):
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


def in_a_larger_tensor(x):
    wide = torch.nn.functional.pad(x, (1, 2))
    return wide[..., 1:-2]


def positional(op, given):
    tensors = [given[name] for name in ("rewards", *FLOATS[op])]
    ends = [given.get(name) for name in ("bootstrap_value", "next_values")]
    keeps = [True] if op in ("vtrace", "retrace_returns") else []
    return [*tensors, *ends, *path(given), *further(op, given), *keeps]


def assert_as_in_the_fake(emulated, op, call):
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in call]
        expected = getattr(torch.ops.fastrl, op)(*fakes)
    expected = [expected] if isinstance(expected, torch.Tensor) else expected
    for x, fake in zip(emulated(op, *call), expected, strict=True):
        assert (x.shape, x.dtype) == (fake.shape, fake.dtype)
        assert x.numel() == 0 or x.stride() == fake.stride()


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, time_major, in_a_larger_tensor])
@pytest.mark.parametrize("op", OPS)
def test_results_are_laid_out_as_torch_compile_is_told(emulated, op, layout):
    for shape in SHAPES:
        for option in ("bootstrap", "everything"):
            for dtype in (torch.float32, torch.float64, torch.bfloat16):
                given = arguments(op, shape, option, dtype)
                moved = {
                    k: layout(x) if isinstance(x, torch.Tensor) and x.shape == shape else x
                    for k, x in given.items()
                    if k != "bootstrap_value"
                }
                assert_as_in_the_fake(emulated, op, positional(op, moved))


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, time_major])
def test_gradients_are_laid_out_as_torch_compile_is_told(emulated, layout):
    for shape in SHAPES:
        given = arguments("vtrace", shape, "bootstrap")
        moved = {k: layout(x) for k, x in given.items() if k in ("terminated", "log_ratio")}
        moved |= {"gamma": 0.9, "gae_lambda": 0.9}
        steps, g = path(moved), layout(torch.randn(shape))
        assert_as_in_the_fake(emulated, "td_bwd", [g, None, *steps])
        assert_as_in_the_fake(emulated, "n_step_returns_bwd", [g, *steps, 3])
        assert_as_in_the_fake(
            emulated, "vtrace_bwd", [None, g, moved["log_ratio"], g, g, *steps, 1.0, 1.0]
        )
        for kept in (None, g):
            assert_as_in_the_fake(
                emulated, "retrace_returns_bwd",
                [g, moved["log_ratio"], kept, *steps, 1.0, kept is None],
            )  # fmt: skip
        for flag in (False, True):
            assert_as_in_the_fake(
                emulated, "value_grads", [g, g, None, True, False, flag, not flag, *steps]
            )


def test_packed_rows_may_be_none(emulated):
    given = {"rewards": torch.zeros(0), "gamma": 0.9, "cu_seqlens": torch.zeros(1).int()}
    assert forward(emulated, "discounted_returns", given)[0].shape == (0,)
    grads = emulated(
        "value_grads", torch.zeros(0), None, None, False, True, False, False, *path(given)
    )
    assert [x.shape for x in grads] == [(0,), (0,), (0,)]


def test_rows_without_an_action_give_bootstrap_no_gradient(emulated):
    mask = torch.zeros(2, 5, dtype=torch.bool)
    steps = path({"gamma": 0.9, "mask": mask})
    _, _, grad = emulated(
        "value_grads", torch.ones(2, 5), None, None, False, True, False, False, *steps
    )
    assert torch.equal(grad, torch.zeros(2))


R = torch.zeros(4, 6)
WRONG = {
    "another dtype": {"values": R.double()},
    "another shape": {"values": R[:, :5]},
    "another number of axes": {"values": R[0]},
    "not bool": {"terminated": R},
    "rows without one stride": dict.fromkeys(("rewards", "values"), torch.zeros(3, 5, 6)[:, :4]),
    "bootstrap_value of another length": {"bootstrap_value": torch.zeros(3)},
    "bootstrap_value and next_values": {"bootstrap_value": torch.zeros(4), "next_values": R},
    "truncated alone": {"truncated": R.bool()},
    "int64 cu_seqlens": {"cu_seqlens": torch.tensor([0, 24])},
    "cu_seqlens of rows": {"cu_seqlens": torch.tensor([0, 24]).int()},
    "whole numbers": {"rewards": R.long()},
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_what_would_read_foreign_memory_is_refused(emulated, wrong):
    given = {"rewards": R, "values": R, "gamma": 0.9, "gae_lambda": 0.9}
    with pytest.raises(RuntimeError):
        forward(emulated, "gae", given | wrong)
