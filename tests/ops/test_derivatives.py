"""Derivatives: the same under checkpointing; refused, and not left out, where there are none."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastrl

IDS = torch.tensor([0, 3, 1])
FLAGS = torch.tensor([[True, False, True, True]] * 3)
EACH_ROW_KEEPS_ALL = torch.arange(4).repeat(3), torch.tensor([0, 4, 8, 12], dtype=torch.int32)
WEIGHT = torch.linspace(-1, 1, 20).view(5, 4)

# Functions of a tensor [3, 4].
OPS = {
    "token_logprobs": lambda x: fastrl.token_logprobs(x, IDS),
    "token_logprobs, in place": lambda x: fastrl.token_logprobs(1 * x, IDS, inplace_backward=True),
    "token_logprobs, kept": lambda x: fastrl.token_logprobs(x, IDS, kept=EACH_ROW_KEEPS_ALL),
    "linear_token_logprobs": lambda x: fastrl.linear_token_logprobs(x, WEIGHT, IDS),
    "linear_token_loss": lambda x: fastrl.linear_token_loss(
        x, WEIGHT, IDS, lambda logprobs, *_: logprobs
    )[0],
    "attention": lambda x: fastrl.attention(*[x.view(1, 1, 3, 4)] * 3),
    "gae": lambda x: fastrl.gae(x, 2 * x, gamma=0.9, gae_lambda=0.9, mask=FLAGS)[0],
    "lambda_returns": lambda x: fastrl.lambda_returns(
        x, 2 * x, gamma=0.9, gae_lambda=0.9, terminated=FLAGS
    ),
    "discounted_returns": lambda x: fastrl.discounted_returns(x, gamma=0.9, mask=FLAGS),
    "n_step_returns": lambda x: fastrl.n_step_returns(x, 2 * x, gamma=0.9, n=2, mask=FLAGS),
    "vtrace": lambda x: fastrl.vtrace(x, 2 * x, x, gamma=0.9, mask=FLAGS)[0],
    "retrace_returns": lambda x: fastrl.retrace_returns(x, x, 2 * x, x, gamma=0.9, mask=FLAGS),
}
each_op = pytest.mark.parametrize("name", OPS)


def some_input():
    return torch.linspace(-2, 1, 12).view(3, 4).requires_grad_()


@each_op
def test_checkpointing_reads_what_was_saved_once(name):
    x = some_input()
    (plain,) = torch.autograd.grad(OPS[name](x).sum(), x)
    (recomputed,) = torch.autograd.grad(checkpoint(OPS[name], x, use_reentrant=False).sum(), x)
    assert torch.equal(recomputed, plain)


class Seen(TorchDispatchMode):
    """Notes which ops of ours it is asked about."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "fastrl":
            self.names.append(op.__name__)
        return op(*args, **(kwargs or {}))


@each_op
def test_who_looks_on_sees_the_ops_themselves(name):
    """As selective checkpointing and tracers do, and finds the same result."""
    x = some_input()
    (plain,) = torch.autograd.grad(OPS[name](x).square().sum(), x)
    with Seen() as seen:
        (watched,) = torch.autograd.grad(OPS[name](x).square().sum(), x)
    assert torch.equal(watched, plain)
    assert seen.names or name == "linear_token_loss"  # a function of Python


@each_op
def test_a_second_derivative_is_refused(name):
    x = some_input()
    # Of the square, and with a term that has a second derivative: what is missing would not show.
    loss = OPS[name](x).square().sum()
    with pytest.raises(NotImplementedError, match="differentiated once, got") as caught:
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        (first + x.square()).square().sum().backward()
    assert str(caught.value).startswith((f"{name.partition(',')[0]}: expected", "returns: exp"))


@each_op
def test_forward_mode_is_refused_and_not_zero(name):
    if name == "linear_token_loss":
        pytest.skip("a Python function: torch refuses by itself")
    x = some_input().detach()
    tangent = torch.ones_like(x)
    message = f"^{name.partition(',')[0]}: expected no derivative in forward mode"
    with forward_ad.dual_level():
        OPS[name](x)  # no tangent: as ever
        with pytest.raises(NotImplementedError, match=message):
            OPS[name](forward_ad.make_dual(x, tangent))
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(OPS[name], (x,), (tangent,))


def test_forward_mode_is_refused_under_compile_too():
    """A tensor that is traced with has no tangent."""
    op = OPS["token_logprobs"]
    compiled = torch.compile(op, backend="eager")
    x = some_input().detach()
    expected = compiled(x)
    with forward_ad.dual_level():
        assert torch.equal(compiled(x), expected)
        with pytest.raises(NotImplementedError, match="no derivative in forward mode"):
            compiled(forward_ad.make_dual(x, torch.ones_like(x)))
    with pytest.raises(NotImplementedError, match="no derivative in forward mode"):
        torch.compile(lambda x: torch.func.jvp(op, (x,), (x,)), backend="eager")(x)


def test_what_has_no_derivative_takes_tangents():
    logits = torch.randn(3, 9)
    seeds = torch.arange(3)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(logits, torch.ones_like(logits))
        drawn, _ = fastrl.sample_tokens(dual, seeds=seeds)
    assert torch.equal(drawn, fastrl.sample_tokens(logits, seeds=seeds)[0])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@each_op
def test_gradients_through_vmap(name):
    if name in ("attention", "linear_token_loss"):
        pytest.skip("torch refuses by itself: a list of tensors, a function without setup_context")
    x = torch.stack([some_input().detach(), 1 - some_input().detach()]).requires_grad_()
    mapped = torch.func.vmap(OPS[name])(x)
    one_by_one = torch.stack([OPS[name](row) for row in x])
    assert torch.equal(mapped, one_by_one)
    grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in (mapped, one_by_one)]
    if name == "linear_token_logprobs":  # under vmap no op knows that hidden alone is learned
        torch.testing.assert_close(*grads)
    else:
        assert torch.equal(*grads)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_over_what_is_looked_into():
    """Token ids and rates, whose range is checked where it can be."""
    logits, ids = torch.randn(2, 3, 4), torch.stack([IDS, IDS.flip(0)])
    rates = torch.rand(2, 3, 4)

    def both(x, ids, rates):
        return fastrl.token_logprobs(x, ids), fastrl.discounted_returns(x, gamma=rates)

    mapped = torch.func.vmap(both)(logits, ids, rates)
    for i in range(2):
        for got, expected in zip(mapped, both(logits[i], ids[i], rates[i]), strict=True):
            assert torch.equal(got[i], expected)


def test_every_backward_op_is_listed():
    """Those that write over their input have no formula: they run without create_graph alone."""
    schemas = [s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("fastrl::")]
    names = {n.removeprefix("fastrl::") for n in schemas if n.endswith(("_bwd", "value_grads"))}
    assert len(names) > 6
    for name in names:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastrl::{name}", "Autograd"), name
