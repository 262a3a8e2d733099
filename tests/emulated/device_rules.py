"""Run by test_device.py on the emulated device: what holds there as on a GPU."""

import pytest
import torch

import fastrl
from fastrl import reference
from fastrl.models import LSTMLanguageModel

pytestmark = pytest.mark.gpu

DEVICE = "cuda"


@pytest.fixture
def waits_are_errors():
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_tensors_say_where_they_are():
    x = torch.ones(3).to(DEVICE)
    for y in (x, torch.zeros(2, device=DEVICE), x + 1, x[:2], x.clone(), torch.tensor([1]).cuda()):
        assert y.is_cuda and y.device == torch.device("cuda:0")
    assert x.cpu().device.type == "cpu" and type(x.cpu()) is torch.Tensor
    view = x[1:]
    view.fill_(5)
    assert x.tolist() == [1, 5, 5]
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()


def test_two_devices_in_one_op_are_an_error():
    here, there = torch.ones(3), torch.ones(3, device=DEVICE)
    for op in (torch.add, torch.dot, lambda a, b: torch.cat([a, b])):
        with pytest.raises(RuntimeError, match="one device"):
            op(here, there)
    assert (there * torch.tensor(2.0)).tolist() == [2, 2, 2]  # a number is of no device


def test_what_waits_is_an_error_where_that_was_asked_for(waits_are_errors):
    x = torch.ones(3, device=DEVICE)
    (x * 2).sum().sqrt()
    x.to("cpu", non_blocking=True), torch.ones(3).pin_memory().to(DEVICE, non_blocking=True)
    x.repeat_interleave(torch.ones(3, dtype=torch.int64, device=DEVICE), output_size=3)
    for wait in (
        lambda: x.sum().item(), lambda: x.cpu(), lambda: x.tolist(), lambda: x.nonzero(),
        lambda: torch.ones(3).to(DEVICE), lambda: x[x > 0], lambda: bool(x.any()),
        lambda: x.repeat_interleave(torch.ones(3, dtype=torch.int64, device=DEVICE)),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="synchronizing"):
            wait()


def test_products_of_16_bits_in_float32():
    a, b = torch.randn(3, 4).bfloat16(), torch.randn(4, 5).bfloat16()
    found = torch.mm(a.to(DEVICE), b.to(DEVICE), torch.float32)
    torch.testing.assert_close(found.cpu(), a.float() @ b.float())
    with pytest.raises(AssertionError):
        torch.mm(a.float().to(DEVICE), b.float().to(DEVICE), torch.float32)


def test_cudnn_has_no_gradients_in_evaluation_mode():
    model = LSTMLanguageModel(5, 3, 4).to(DEVICE).lstm.eval()
    output, _ = model(torch.ones(1, 2, 3, device=DEVICE))
    with pytest.raises(RuntimeError, match="training mode"):
        output.sum().backward()


@pytest.mark.parametrize("op", ["token_logprobs", "discounted_returns"])
def test_ops_are_their_cuda_kernels(op, monkeypatch):
    """Called once, and a result of another device is no result."""
    from emulated.on_gpu import KERNELS

    calls, name = [], f"fastrl::{op}" + ("_fwd" if op == "token_logprobs" else "")
    function, calls_ops = KERNELS[name]
    spy = lambda *args: calls.append(args) or function(*args)  # noqa: E731
    monkeypatch.setitem(KERNELS, name, (spy, calls_ops))
    x = torch.randn(2, 5)
    given = {"token_ids": torch.tensor([1, 3])} if op == "token_logprobs" else {"gamma": 0.9}
    there = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    found = getattr(fastrl, op)(x.to(DEVICE), **there)
    assert found.is_cuda and len(calls) == 1
    torch.testing.assert_close(found.cpu(), getattr(reference, op)(x, **given))
