import torch

from fastrl.reference import value_loss

NAN = float("nan")


def test_mean_square_without_a_half():
    loss = value_loss(torch.tensor([1.0, 5.0]), torch.tensor([4.0, 4.0]))
    torch.testing.assert_close(loss, torch.tensor((9.0 + 1.0) / 2))


def test_clip_takes_the_larger_error():
    old, returns = torch.zeros(4), torch.tensor([2.0, 2.0, 2.0, -2.0])
    values = torch.tensor([1.0, 3.0, 0.25, 1.0], requires_grad=True)
    loss = value_loss(values, returns, old_values=old, clip=0.5, reduction="none")
    # moved: 0.5, 0.5, 0.25, 0.5
    torch.testing.assert_close(loss, torch.tensor([1.5**2, 1.5**2, 1.75**2, 3.0**2]))
    loss.sum().backward()
    torch.testing.assert_close(values.grad, torch.tensor([0.0, 0.0, -3.5, 6.0]))


def test_targets_are_detached_and_masked_entries_ignored():
    values = torch.tensor([[1.0, NAN]], requires_grad=True)
    returns = torch.tensor([[3.0, NAN]], requires_grad=True)
    old = torch.tensor([[1.0, NAN]], requires_grad=True)
    mask = torch.tensor([[True, False]])
    loss = value_loss(values, returns, old_values=old, clip=1.0, loss_mask=mask)
    loss.backward()
    assert loss == 4
    torch.testing.assert_close(values.grad, torch.tensor([[-4.0, 0.0]]))
    assert returns.grad is None and old.grad is None


def test_weights_reduction_and_normalizer():
    values, returns = torch.zeros(2, 2), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    mask, weights = (
        torch.tensor([[True, True], [False, True]]),
        torch.tensor([[1.0, 2.0], [9.0, 0.5]]),
    )
    options = {"loss_mask": mask, "weights": weights}
    loss = value_loss(values, returns, reduction="sequence_mean", **options)
    torch.testing.assert_close(loss, torch.tensor(((1 + 8) / 2 + 8) / 2))
    loss = value_loss(values, returns, normalizer=10, **options)
    torch.testing.assert_close(loss, torch.tensor(1.7))


def test_gradcheck():
    torch.manual_seed(0)
    values = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    returns, old = torch.randn(2, 2, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda v: value_loss(v, returns, old_values=old, clip=0.3, reduction="sequence_mean"),
        values,
    )
