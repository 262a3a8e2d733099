"""The first derivative, in reverse mode, is what the ops have; every other is refused aloud.

Torch gives a second one that lacks terms, and in forward mode zeros.
"""

import pytest
import torch
from torch.autograd import forward_ad

import fastrl

IDS = torch.tensor([3, 0, 5])
KEPT = torch.tensor([3, 1, 0, 5]), torch.tensor([0, 2, 3, 4], dtype=torch.int32)
# of x [3, 8], which is logits, hidden states or heads
CALLS = {
    "token_logprobs": lambda x: fastrl.token_logprobs(x, IDS),
    "token_logprobs in place": lambda x: fastrl.token_logprobs(x, IDS, inplace_backward=True),
    "token_logprobs of kept ids": lambda x: fastrl.token_logprobs(x, IDS, kept=KEPT),
    "linear_token_logprobs": lambda x: fastrl.linear_token_logprobs(x, torch.ones(9, 8), IDS),
    "linear_token_loss": lambda x: fastrl.linear_token_loss(
        x, torch.ones(9, 8), IDS, lambda logprobs, *_: logprobs
    )[0],
    "attention": lambda x: fastrl.attention(*3 * [x.view(1, 1, 3, 8)]),
    "gae": lambda x: fastrl.gae(x, x, gamma=0.9, gae_lambda=0.9)[0],
}


@pytest.mark.parametrize("name", CALLS)
def test_a_second_derivative_is_refused_and_not_incomplete(name):
    leaf = torch.randn(3, 8, requires_grad=True)
    loss = CALLS[name](leaf.tanh()).square().sum()
    message = f"{name.split()[0]}|returns: expected to be differentiated once"
    with pytest.raises(NotImplementedError, match=message):
        (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
        torch.autograd.grad(first.square().sum(), leaf)


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_forward_mode_is_refused_and_not_zero(name, learns):
    primal = torch.randn(3, 8, requires_grad=learns)
    with forward_ad.dual_level():
        CALLS[name](torch.randn(3, 8))  # in a block, but without a tangent
        with pytest.raises(NotImplementedError, match="in reverse mode|must implement the jvp"):
            CALLS[name](forward_ad.make_dual(primal, torch.ones(3, 8)))
    with pytest.raises((NotImplementedError, RuntimeError), match="in reverse mode|autograd.Fun"):
        torch.func.jvp(CALLS[name], (primal,), (torch.ones(3, 8),))


def test_every_backward_op_is_listed():
    """Those that write over their input have no formula: they run without create_graph alone."""
    schemas = [s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("fastrl::")]
    names = {n.removeprefix("fastrl::") for n in schemas if n.endswith(("_bwd", "value_grads"))}
    assert len(names) > 6
    for name in names:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastrl::{name}", "Autograd"), name
