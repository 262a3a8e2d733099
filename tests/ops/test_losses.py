"""The losses, kl_penalty, group_advantages and whiten: checks, and the definition in reference."""

import math

import pytest
import torch

import fastrl
from fastrl import reference

LOGPROBS = -torch.rand(3, 4) - 0.1
OTHER = torch.randn(3, 4)
MASK = torch.tensor([[True] * 4, [True, False, True, False], [False] * 4])
BOUNDS = torch.tensor([0, 4, 9, 12], dtype=torch.int32)
PACKED = {"loss_mask": MASK.flatten(), "cu_seqlens": BOUNDS, "reduction": "sequence_mean"}
PACKED |= {"normalizer": 7.0, "weights": LOGPROBS.exp().flatten()}
FLAT, OTHER_FLAT = LOGPROBS.flatten(), OTHER.flatten()
IDS = torch.tensor([4, 4, 7, 7])
REWARDS = torch.tensor([1.0, 2.0, 5.0, 5.0])

CALLS = [
    ("policy_gradient_loss", (LOGPROBS, OTHER), {"loss_mask": MASK}),
    ("policy_gradient_loss", (FLAT, OTHER_FLAT), PACKED),
    ("ppo_loss", (LOGPROBS, LOGPROBS - 0.3, OTHER), {"dual_clip": 3.0, "weights": LOGPROBS.exp()}),
    ("ppo_loss", (FLAT, FLAT - 0.3, OTHER_FLAT), {**PACKED, "level": "sequence", "clip_low": 0.1}),
    ("value_loss", (OTHER_FLAT, FLAT), {**PACKED, "old_values": OTHER_FLAT + 0.3, "clip": 0.2}),
    ("actor_critic_loss", (LOGPROBS, OTHER, LOGPROBS), {"entropy": -LOGPROBS, "entropy_coef": 0.1}),
    ("actor_critic_loss", (FLAT, OTHER_FLAT, FLAT), {**PACKED, "critic_coef": 0.3}),
    ("kl_penalty", (LOGPROBS, LOGPROBS - 0.1), {"estimator": "k2"}),
    ("group_advantages", (REWARDS, IDS), {"estimator": "rloo"}),
    ("group_advantages", (REWARDS, IDS), {"estimator": "max_at_k", "k": 1}),
    ("whiten", (OTHER, MASK), {}),
]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name, arguments, options", CALLS)
def test_what_the_reference_gives(name, arguments, options, device):
    arguments = [x.to(device) for x in arguments]
    options = {k: x.to(device) if torch.is_tensor(x) else x for k, x in options.items()}
    ours, plain = (getattr(m, name)(*arguments, **options) for m in (fastrl, reference))
    torch.testing.assert_close(ours, plain, rtol=0, atol=0)


def test_the_definitions_by_hand():
    logprobs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    values = torch.tensor([[0.5, 1.0]], requires_grad=True)
    returns = torch.tensor([[2.0, -1.0]])
    # -mean(log pi * (R - V)) = (1 * 1.5 + 2 * -2) / 2, plus half of mean((R - V)^2) = 3.125
    loss = fastrl.actor_critic_loss(logprobs, values, returns)
    loss.backward()
    assert loss.item() == pytest.approx(-1.25 + 0.5 * 3.125)
    assert logprobs.grad.tolist() == [[-0.75, 1.0]]  # -(R - V) / 2
    assert values.grad.tolist() == [[-0.75, 1.0]]  # 0.5 * 2 (V - R) / 2, nothing from the actor
    immediate = fastrl.policy_gradient_loss(logprobs, returns)
    assert immediate.item() == pytest.approx(-(-1.0 * 2.0 + -2.0 * -1.0) / 2)


@pytest.mark.parametrize("name, arguments, options", CALLS)
def test_compiles(name, arguments, options):
    function = getattr(fastrl, name)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments, **options), function(*arguments, **options))


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_normalizer_may_be_a_tensor_of_one_number(shape):
    loss = fastrl.policy_gradient_loss(LOGPROBS, OTHER, normalizer=torch.full(shape, 7))
    torch.testing.assert_close(loss, fastrl.policy_gradient_loss(LOGPROBS, OTHER, normalizer=7))


@pytest.mark.parametrize("name, arguments", [(name, x) for name, x, _ in CALLS[1:7:2]])
def test_weights_of_float64_give_float64(name, arguments):
    loss = getattr(fastrl, name)(*arguments, weights=torch.ones_like(arguments[0]).double())
    assert loss.dtype == torch.float64


BAD = [
    (
        "policy_gradient_loss",
        (LOGPROBS, OTHER[:1]),
        {},
        ValueError,
        r"advantages \(3, 4\) like log",
    ),
    ("policy_gradient_loss", (LOGPROBS, 1.0), {}, TypeError, "advantages as a tensor, got float"),
    ("policy_gradient_loss", (LOGPROBS, None), {}, TypeError, "advantages as a tensor, got None"),
    ("policy_gradient_loss", (IDS, IDS), {}, TypeError, "logprobs of dtype float32"),
    ("policy_gradient_loss", (LOGPROBS, OTHER), {"loss_mask": OTHER}, TypeError, "dtype bool"),
    ("policy_gradient_loss", (LOGPROBS, OTHER), {"reduction": "sum"}, ValueError, "reduction one"),
    ("policy_gradient_loss", (LOGPROBS, OTHER), {"normalizer": 0}, ValueError, "normalizer > 0"),
    ("policy_gradient_loss", (LOGPROBS, OTHER), {"normalizer": IDS}, ValueError, "one number, got"),
    ("policy_gradient_loss", (OTHER[0, 0], OTHER[0, 0]), {}, ValueError, r"logprobs \[..., T\]"),
    ("policy_gradient_loss", (LOGPROBS, OTHER), {"cu_seqlens": BOUNDS}, ValueError, "packed log"),
    (
        "policy_gradient_loss",
        (LOGPROBS[0], OTHER[0]),
        {"cu_seqlens": BOUNDS.to("meta")},
        ValueError,
        "cu_seqlens on cpu like logprobs",
    ),
    (
        "policy_gradient_loss",
        (LOGPROBS[0], OTHER[0]),
        {"reduction": "sequence_mean"},
        ValueError,
        r"Pass cu_seqlens, or logprobs\[None\]",
    ),
    ("ppo_loss", (LOGPROBS, LOGPROBS, OTHER), {"level": "word"}, ValueError, "level one of"),
    ("ppo_loss", (LOGPROBS, LOGPROBS, OTHER), {"clip_low": -0.1}, ValueError, "clip_low in"),
    ("ppo_loss", (LOGPROBS, LOGPROBS, OTHER), {"clip_high": math.nan}, ValueError, "clip_high >="),
    ("ppo_loss", (LOGPROBS, LOGPROBS, OTHER), {"dual_clip": 0.5}, ValueError, "dual_clip >= 1"),
    ("value_loss", (OTHER, OTHER), {"old_values": OTHER, "clip": 0.0}, ValueError, "clip > 0"),
    ("value_loss", (OTHER, OTHER), {"clip": 0.2}, ValueError, "together, got clip alone"),
    ("value_loss", (OTHER, OTHER), {"old_values": OTHER}, ValueError, "together, got old_values"),
    ("actor_critic_loss", (LOGPROBS, OTHER, OTHER), {"critic_coef": -1}, ValueError, "critic_coef"),
    ("actor_critic_loss", [OTHER] * 3, {"entropy_coef": math.nan}, ValueError, "entropy_coef"),
    ("actor_critic_loss", (OTHER, OTHER[0], OTHER), {}, ValueError, "values"),
    ("actor_critic_loss", [OTHER] * 3, {"reduction": "sum"}, ValueError, "reduction one"),
    (
        "actor_critic_loss",
        (LOGPROBS, OTHER, OTHER),
        {"entropy_coef": 1},
        ValueError,
        "entropy with",
    ),
    ("kl_penalty", (LOGPROBS, OTHER), {"estimator": "k4"}, ValueError, "estimator one of"),
    ("kl_penalty", (LOGPROBS, OTHER[0]), {}, ValueError, "ref_logprobs"),
    ("group_advantages", (OTHER, IDS), {}, ValueError, r"rewards \[C\], got \(3, 4\)"),
    ("group_advantages", (REWARDS, IDS.int()), {}, TypeError, "group_ids of dtype int64"),
    ("group_advantages", (REWARDS, IDS[:2]), {}, ValueError, "group_ids"),
    ("group_advantages", (REWARDS, IDS), {"estimator": "mean"}, ValueError, "estimator one of"),
    ("group_advantages", (REWARDS, IDS), {"estimator": "max_at_k"}, ValueError, "k with estim"),
    ("group_advantages", (REWARDS, IDS), {"k": 2}, ValueError, "no k with estimator 'grpo', got 2"),
    ("group_advantages", (REWARDS, IDS), {"estimator": "max_at_k", "k": 0}, ValueError, "k >= 1"),
    ("group_advantages", (REWARDS, IDS), {"estimator": "max_at_k", "k": 2.0}, TypeError, "an int"),
    ("whiten", (IDS,), {}, TypeError, "x of dtype float32"),
    ("whiten", (OTHER, MASK[0]), {}, ValueError, r"mask \(3, 4\) like x"),
]


@pytest.mark.parametrize("name, arguments, options, error, message", BAD)
def test_bad_arguments(name, arguments, options, error, message):
    with pytest.raises(error, match=message) as caught:
        getattr(fastrl, name)(*arguments, **options)
    assert str(caught.value).startswith(f"{name}: expected ")
