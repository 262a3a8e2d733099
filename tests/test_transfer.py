import pytest
import torch

from fastrl._transfer import _cut, _joined, on_device
from fastrl.layout import pack_groups


def some_tensors():
    """Every size of a number, shapes that end off the bounds, one that is empty, one transposed."""
    return [
        torch.arange(5),
        torch.tensor([True, False, True]),
        torch.zeros(0, 7, dtype=torch.int32),
        torch.randn(3, 4).t(),
        torch.tensor(3.0, dtype=torch.float64),
        torch.arange(6, dtype=torch.int32).view(2, 3),
        torch.arange(9, dtype=torch.int16),
    ]


def test_what_is_joined_is_cut_into_the_same_tensors():
    given = [x.contiguous() for x in some_tensors()]
    found = _cut(_joined(given), given)
    for x, y in zip(given, found, strict=True):
        assert torch.equal(x, y) and x.dtype == y.dtype and x.stride() == y.stride()
        assert y.storage_offset() * y.element_size() % 16 == 0 and not y._is_view()


def test_on_the_host_they_are_what_they_were():
    given = some_tensors()
    assert all(x is y for x, y in zip(given, on_device(given, "cpu"), strict=True))
    assert on_device([], "cuda") == []
    assert all(x.is_meta for x in on_device(given, "meta"))


@pytest.mark.gpu
def test_a_gpu_is_not_waited_for():
    prompts, completions = [torch.arange(1, 4)], [[torch.arange(5), torch.arange(2)]]
    expected = pack_groups(prompts, completions)
    torch.cuda.set_sync_debug_mode("error")
    try:
        moved = on_device(given := some_tensors(), "cuda")
        batch = expected.to("cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(x, y.cpu()) for x, y in zip(given, moved, strict=True))
    assert all(y.data_ptr() % 16 == 0 for y in moved if y.numel())
    for name in ("target_index", "predict_index", "completion_cu_seqlens"):
        assert torch.equal(getattr(batch, name).cpu(), getattr(expected, name))
