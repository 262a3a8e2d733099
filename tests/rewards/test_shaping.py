import functools
import math
import random
from collections.abc import Iterator

import pytest
import torch

from fastrl.cli.recipes.models import load_tokenizer
from fastrl.rewards.chrf import ChrF
from fastrl.rewards.shaping import PotentialShaping

VOCABULARY, HORIZON, EOS = 3, 4, 0
State = tuple[int, ...]


def completions(prefix: State = ()) -> Iterator[State]:
    """All that end with EOS or at the horizon."""
    if prefix and (prefix[-1] == EOS or len(prefix) == HORIZON):
        yield prefix
        return
    for token in range(VOCABULARY):
        yield from completions((*prefix, token))


ALL = list(completions())
STATES = sorted({ids[:end] for ids in ALL for end in range(len(ids))})
RANDOM = random.Random(0)
PHI = {s: RANDOM.gauss(0, 1) for s in {ids[:end] for ids in ALL for end in range(len(ids) + 1)}}
BY_TOKEN = {ids[:end]: RANDOM.gauss(0, 1) for ids in ALL for end in range(1, len(ids) + 1)}
BY_COMPLETION = {ids: RANDOM.gauss(0, 1) for ids in ALL}


def by_token(completion_ids, **columns):
    return [[BY_TOKEN[ids[:end]] for end in range(1, len(ids) + 1)] for ids in completion_ids]


def by_completion(completion_ids):
    return [BY_COMPLETION[ids] for ids in completion_ids]


def potential(prompt, prefix):
    assert prompt == "p"
    return PHI[prefix]


def giving(rewards):
    return lambda completion_ids: rewards


def rewards_of(function, gamma=None) -> list[list[float]]:
    """Of every completion, by token; shaped with a gamma."""
    if gamma is not None:
        shaping = PotentialShaping(function, potential, gamma)
        return shaping(["p"] * len(ALL), [""] * len(ALL), ALL)
    plain = function(completion_ids=ALL)
    if isinstance(plain[0], float):
        return [[0.0] * (len(ids) - 1) + [r] for ids, r in zip(ALL, plain, strict=True)]
    return plain


def action_values(rewards: list[list[float]], gamma: float) -> dict[State, list[float]]:
    """Of the best policy, by dynamic programming from the ends."""
    steps: dict[State, float] = {}
    for ids, row in zip(ALL, rewards, strict=True):
        for end, reward in enumerate(row, 1):
            # A reward belongs to the step, whichever completion it was seen in.
            assert steps.setdefault(ids[:end], reward) == reward
    values: dict[State, list[float]] = {}
    for state in sorted(STATES, key=len, reverse=True):
        after = [(*state, token) for token in range(VOCABULARY)]
        values[state] = [steps[s] + gamma * max(values.get(s, [0.0])) for s in after]
    return values


@pytest.mark.parametrize("gamma", [1.0, 0.8, 0.0])
@pytest.mark.parametrize("function", [by_token, by_completion])
def test_the_best_policy_stays_the_best(function, gamma):
    plain = action_values(rewards_of(function), gamma)
    shaped = action_values(rewards_of(function, gamma), gamma)
    for state in STATES:
        # Q' = Q − Φ(s): the order of the actions is the same.
        expected = [value - PHI[state] for value in plain[state]]
        assert shaped[state] == pytest.approx(expected, abs=1e-12)
        assert max(range(VOCABULARY), key=shaped[state].__getitem__) == max(
            range(VOCABULARY), key=plain[state].__getitem__
        )


def objective(logits, rewards, gamma):
    """The expected discounted return, exactly, and the surrogate whose gradient trainers follow."""
    logprobs = logits.log_softmax(-1)
    expected = surrogate = torch.zeros((), dtype=torch.float64)
    for ids, row in zip(ALL, rewards, strict=True):
        steps = torch.stack([logprobs[STATES.index(ids[:t]), token] for t, token in enumerate(ids)])
        probability = steps.sum().exp()
        expected = expected + probability * sum(gamma**t * r for t, r in enumerate(row))
        for t, step in enumerate(steps):
            to_go = sum(gamma**k * r for k, r in enumerate(row[t:]))
            surrogate = surrogate + probability.detach() * step * to_go
    return expected, surrogate


def gradients(rewards, gamma, seed):
    logits = torch.randn(
        len(STATES), VOCABULARY, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    ).requires_grad_()
    expected, surrogate = objective(logits, rewards, gamma)
    both = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (expected, surrogate)]
    return expected.item(), *both


@pytest.mark.parametrize("gamma", [1.0, 0.8])
@pytest.mark.parametrize("function", [by_token, by_completion])
def test_the_policy_gradient_of_any_policy_stays_the_same(function, gamma):
    plain, shaped = rewards_of(function), rewards_of(function, gamma)
    for seed in range(2):
        value, gradient, followed = gradients(plain, gamma, seed)
        shaped_value, shaped_gradient, shaped_followed = gradients(shaped, gamma, seed)
        assert shaped_value == pytest.approx(value - PHI[()], abs=1e-12)
        torch.testing.assert_close(shaped_gradient, gradient, rtol=0, atol=1e-12)
        torch.testing.assert_close(shaped_followed, followed, rtol=0, atol=1e-12)
        assert gradient.abs().max() > 1e-2


def test_the_gamma_has_to_be_the_trainers():
    plain, shaped = rewards_of(by_token), rewards_of(by_token, 0.8)
    difference = gradients(plain, 1.0, 0)[1] - gradients(shaped, 1.0, 0)[1]
    assert difference.abs().max() > 1e-2


def test_by_hand():
    phi = {(): 0.5, (7,): 1.0, (7, 8): 3.0, (7, 8, 9): 100.0}
    shaping = PotentialShaping(lambda completion_ids: [2.0], lambda _, ids: phi[ids], 0.5)
    (rewards,) = shaping(["p"], ["x"], [[7, 8, 9]])
    assert rewards == [0.5 * 1.0 - 0.5, 0.5 * 3.0 - 1.0, 2.0 - 3.0]  # Φ(terminal) = 0


def test_what_a_tool_answered_is_no_step():
    """The state before a token is all that stands there, a tool's answer too."""
    phi = {(): 0.5, (7,): math.nan, (7, 8): 3.0, (7, 8, 9): math.nan, (7, 8, 9, 4): math.nan}
    own = [[True, False, True, False]]
    for reward in ([2.0], [[0.0, 0.0, 2.0, 0.0]]):
        shaping = PotentialShaping(giving(reward), lambda _, ids: phi[ids], 0.5)
        (rewards,) = shaping(["p"], ["x"], [[7, 8, 9, 4]], is_target=own)
        assert rewards == [0.5 * 3.0 - 0.5, 0, 2.0 - 3.0, 0]
    (unwritten,) = shaping(["p"], ["x"], [[7, 8, 9, 4]], is_target=[[False] * 4])
    assert unwritten == [0, 0, 2, 0]


def test_a_metric_as_potential():
    tokenizer = load_tokenizer("bytes")
    texts, reference = ["the cat", "a dog"], ["the cat sat", None]
    ids = [tokenizer.encode(text) for text in texts]
    metric = ChrF(tokenizer=tokenizer, scale=2.0)
    shaping = PotentialShaping(lambda completions, **_: [1.0, None], metric)
    first, second = shaping(["p"] * 2, texts, ids, reference=reference)
    assert second is None and math.fsum(first) == pytest.approx(1.0)
    score = 2 * ChrF().score("the", ["the cat sat"])
    assert math.fsum(first[:3]) == pytest.approx(score) and score > 0.3
    shaping = PotentialShaping(lambda completions: [1.0, 2.0], metric)
    assert shaping(["p"] * 2, texts, ids, reference=reference)[1] == [0.0] * 4 + [2.0]


def test_a_function_of_texts_as_potential():
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode("né!")
    seen = []
    shaping = PotentialShaping(
        lambda completions: [0.0], lambda _, text: seen.append(text) or 0.0, tokenizer=tokenizer
    )
    shaping(["p"], ["né!"], [ids])
    assert seen == ["", "n", "n", "né", "né!"]


def test_the_states_of_its_parts_are_its_own():
    class Counter:
        count = 0

        def __call__(self, prompts, completions, completion_ids, **columns):
            self.count += 1
            return [0.0] * len(prompts)

        def state_dict(self):
            return {"count": self.count}

        def load_state_dict(self, state):
            self.count = state["count"]

    one, other = (PotentialShaping(Counter(), lambda *_: 0.0) for _ in range(2))
    one(["p"], ["x"], [[1]])
    other.load_state_dict(one.state_dict())
    assert other.reward_function.count == 1
    assert one.__name__ == "shaped_Counter"
    assert PotentialShaping(Counter(), lambda *_: 0.0, name="mine").__name__ == "mine"
    with pytest.raises(ValueError, match=r"expected states of \['reward_function'\], got \[\]"):
        one.load_state_dict({})
    inside = PotentialShaping(functools.partial(Counter(), scale=2.0), lambda *_: 0.0)
    inside.load_state_dict(one.state_dict())
    assert inside.state_dict() == {"reward_function": {"count": 1}}


def test_bad_arguments():
    async def later(**columns):
        return [0.0]

    with pytest.raises(ValueError, match=r"expected gamma in \[0, 1\], got 1.5"):
        PotentialShaping(by_token, potential, 1.5)
    with pytest.raises(TypeError, match="expected reward_function a function, got an asynch"):
        PotentialShaping(later, potential)
    with pytest.raises(TypeError, match="expected potential a function, got str"):
        PotentialShaping(by_token, "chrf")
    with pytest.raises(ValueError, match="expected 2 rewards for completion 0, .*, got 1"):
        PotentialShaping(lambda completions: [[1.0]], lambda *_: 0.0)(["p"], ["x"], [[1, 2]])
    with pytest.raises(ValueError, match="expected 1 rewards of shaped_<lambda>, got 2"):
        PotentialShaping(lambda completions: [1.0, 2.0], lambda *_: 0.0)(["p"], ["x"], [[1]])
    with pytest.raises(ValueError, match="expected a finite potential of completion 0"):
        PotentialShaping(lambda completions: [1.0], lambda *_: math.nan)(["p"], ["x"], [[1]])
