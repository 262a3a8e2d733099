import torch

from fastrl.reference import linear_token_loss


def inputs():
    torch.manual_seed(0)
    hidden = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    return hidden, weight, torch.tensor([[0, -100, 4], [2, -100, 1]])


def test_loss_sees_the_rows_that_count_and_is_summed():
    hidden, weight, ids = inputs()
    factors = torch.tensor([1.0, 99.0, 2.0, 3.0, 99.0, 4.0], dtype=torch.float64)
    seen = []

    def loss_fn(logprobs, entropy, rows):
        seen.append(rows.tolist())
        return factors[rows] * logprobs - 0.1 * entropy

    loss, logprobs, entropy = linear_token_loss(hidden, weight, ids, loss_fn)
    log_p = (hidden.flatten(0, 1) @ weight.T).log_softmax(-1)
    expected_entropy = -(log_p.exp() * log_p).sum(-1)
    counted = [0, 2, 3, 5]
    assert sum(seen, []) == counted
    expected = log_p[counted, [0, 4, 2, 1]]
    torch.testing.assert_close(logprobs.flatten()[counted], expected.detach())
    torch.testing.assert_close(entropy.flatten()[counted], expected_entropy[counted].detach())
    assert (logprobs[:, 1] == 0).all() and (entropy[:, 1] == 0).all()
    total = (torch.tensor([1.0, 2.0, 3.0, 4.0]) * expected - 0.1 * expected_entropy[counted]).sum()
    torch.testing.assert_close(loss, total)
    got = torch.autograd.grad(loss, (hidden, weight))
    torch.testing.assert_close(got, torch.autograd.grad(total, (hidden, weight)))


def test_logprobs_and_entropy_come_back_detached():
    hidden, weight, ids = inputs()
    loss, logprobs, entropy = linear_token_loss(hidden, weight, ids, lambda lp, h, rows: -lp)
    assert loss.requires_grad and not logprobs.requires_grad and not entropy.requires_grad


def test_gradcheck():
    hidden, weight, ids = inputs()
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)

    def loss(hidden, weight, bias):
        options = {"bias": bias, "temperature": 1.3, "softcap": 2.0}
        return linear_token_loss(hidden, weight, ids, lambda lp, h, _: lp.exp() * h, **options)[0]

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


def test_all_rows_ignored():
    hidden, weight, ids = inputs()

    def never(logprobs, entropy, rows):
        raise AssertionError("called without a row")

    loss, logprobs, _ = linear_token_loss(hidden, weight, torch.full_like(ids, -100), never)
    assert loss == 0 and logprobs.shape == (2, 3)
    loss.backward()
    assert (weight.grad == 0).all() and (hidden.grad == 0).all()
