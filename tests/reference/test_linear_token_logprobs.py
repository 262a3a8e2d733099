import torch

from fastrl.reference import linear_token_logprobs

NAN = float("nan")


def test_by_hand():
    hidden = torch.tensor([[1.0, 2.0]])
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])  # logits 1, 2, 3
    bias = torch.tensor([2.0, 1.0, 0.0])  # then 3, 3, 3
    ids = torch.tensor([1])
    logprobs, entropy = linear_token_logprobs(hidden, weight, ids, bias=bias, return_entropy=True)
    third = torch.tensor([3.0]).log()
    torch.testing.assert_close(logprobs, -third)
    torch.testing.assert_close(entropy, third)
    plain = linear_token_logprobs(hidden, weight, ids)
    torch.testing.assert_close(plain, 2 - torch.tensor([1.0, 2.0, 3.0]).exp().sum().log()[None])


def test_softcap_bounds_the_logits_before_the_temperature():
    hidden, weight = torch.tensor([[100.0]]), torch.tensor([[1.0], [-1.0]])
    ids = torch.tensor([1])
    logprobs = linear_token_logprobs(hidden, weight, ids, softcap=3.0, temperature=2.0)
    torch.testing.assert_close(logprobs, -torch.tensor([3.0]).exp().log1p())  # logits +-3/2


def test_gradcheck():
    torch.manual_seed(0)
    hidden = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[0, -100, 4], [2, 2, 1]])

    def outputs(hidden, weight, bias):
        return linear_token_logprobs(
            hidden, weight, ids, bias=bias, temperature=0.8, softcap=2.0, return_entropy=True
        )

    assert torch.autograd.gradcheck(outputs, (hidden, weight, bias))


def test_ignored_rows_reach_no_gradient():
    hidden = torch.tensor([[NAN, NAN], [1.0, 2.0]], requires_grad=True)
    weight = torch.randn(3, 2, requires_grad=True)
    logprobs = linear_token_logprobs(hidden, weight, torch.tensor([-100, 2]))
    assert logprobs[0] == 0
    logprobs.sum().backward()
    assert (hidden.grad[0] == 0).all() and (hidden.grad[1] != 0).all()
    assert weight.grad.isfinite().all()


def test_16_bit_inputs_are_computed_in_float32():
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 8).bfloat16(), torch.randn(6, 8).bfloat16()
    ids = torch.tensor([0, 5, 2, 3])
    got = linear_token_logprobs(hidden, weight, ids)
    logits = hidden.double() @ weight.double().T
    expected = logits[range(4), ids] - logits.exp().sum(-1).log()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
