"""Count-based bonuses against counts by hand."""

import hashlib
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from fastrl.rewards.novelty import CountNovelty, _hash
from fastrl.trainers import _tree


def root(n):
    return 1 / math.sqrt(n)


def call(reward, ids, **options):
    return reward(["p"] * len(ids), ["c"] * len(ids), ids, **options)


def test_bonuses_are_one_over_the_root_of_the_visits():
    reward = CountNovelty(n=2)
    # Bigrams 5, 55, 55, 57: within a completion the second 55 is a second visit.
    assert call(reward, [[5, 5, 5, 7], [5, 5], []]) == [[1, 1, root(2), 1], [1, 1], []]
    # Visited so far: 5 twice, 55 three times, 57 once.
    assert call(reward, [[5, 5, 7, 5]]) == [[root(3), root(4), root(2), 1]]
    assert call(CountNovelty(n=2, scale=3.0, immediate=False), [[5, 5, 5, 7]]) == [
        pytest.approx(9 + 3 * root(2))
    ]


def test_the_order_of_a_calls_completions_does_not_matter():
    one, other = CountNovelty(n=2), CountNovelty(n=2)
    rows = [[1, 2, 3], [2, 3, 2], [3]]
    assert call(one, rows) == call(other, rows[::-1])[::-1]
    assert call(one, rows) == call(other, rows)


def test_counts_decay_with_every_call():
    reward = CountNovelty(n=1, decay=0.5)
    assert call(reward, [[1], [1], [1], [1]]) == [[1]] * 4
    assert call(reward, [[2]]) == [[1]]
    assert call(reward, [[1]]) == [[root(4 * 0.5**2 + 1)]]
    assert call(reward, [[1]]) == [[root((4 * 0.5**2 + 1) * 0.5 + 1)]]
    for _ in range(60):
        call(reward, [[2]])
    assert call(reward, [[1]]) == [[pytest.approx(1.0)]]  # forgotten
    # One call back stood 1; the visit of 2 before it, Σ 0.5^k over k = 2, 3, …, is 0.5 by now.
    assert call(reward, [[2]]) == [[pytest.approx(root(0.5 + 1))]]


def test_the_coefficient_falls_evenly_over_the_steps():
    reward, metrics = CountNovelty(n=1, scale=2.0, anneal_steps=4), {}
    for step, expected in ((0, 2.0), (1, 1.5), (3, 0.5), (4, 0.0), (9, 0.0)):
        state = SimpleNamespace(global_step=step)
        given = call(reward, [[10 + step]], trainer_state=state, log_metric=metrics.__setitem__)
        assert given == [[expected]]
    assert metrics == {"novelty/states": 5, "novelty/coefficient": 0.0}
    with pytest.raises(ValueError, match="expected trainer_state"):
        call(reward, [[1]])


def test_whole_completions_and_states_of_ones_own():
    whole = CountNovelty(n=0)
    assert call(whole, [[1, 2], [1, 2], [2, 1], []]) == [1.0, 1.0, 1.0, 1.0]
    assert call(whole, [[1, 2], [2, 1], [3]]) == [root(3), root(2), 1.0]
    parity = CountNovelty(state=lambda ids: ["even" if i % 2 == 0 else "odd" for i in ids])
    assert call(parity, [[2, 4, 1]]) == [[1, root(2), 1]]
    kinds = CountNovelty(state=lambda ids: ["1", b"1", 1, [1]])
    assert call(kinds, [[0] * 4]) == [[1, 1, 1, 1]]  # of different types, different states
    with pytest.raises(ValueError, match="expected state to give 2 states"):
        call(CountNovelty(state=lambda ids: ["a"]), [[1, 2]])


def test_the_smallest_counts_are_forgotten_when_there_are_too_many():
    reward = CountNovelty(n=1, max_states=4)
    call(reward, [[1, 1, 1, 2, 2, 3, 4]])
    call(reward, [[5]])  # of five states, three stay: 1, 2, and of 3, 4, 5 the one seen last
    assert call(reward, [[1, 2, 3, 4, 5]]) == [[root(4), root(3), 1, 1, root(2)]]


def test_state_goes_through_a_checkpoint():
    one, other = CountNovelty(n=2, decay=0.9), CountNovelty(n=2, decay=0.9)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(4, (6, 8, 5), generator=generator).tolist()
    for row in rows[:3]:
        call(one, row)
    document, tensors = _tree.flatten(one.state_dict())
    state = _tree.unflatten(json.loads(json.dumps(document)), tensors.__getitem__)
    expected = [call(one, row) for row in rows[3:]]  # the state is a copy
    other.load_state_dict(state)
    assert [call(other, row) for row in rows[3:]] == expected
    assert call(CountNovelty(n=2, decay=0.9), rows[3]) != expected[0]


def test_hashes_are_the_same_in_every_process():
    data = b"i" + (1).to_bytes(8, sys.byteorder) + (2).to_bytes(8, sys.byteorder)
    expected = hashlib.blake2b(data, digest_size=8).digest()
    assert _hash([1, 2]) == int.from_bytes(expected, "little", signed=True)
    assert len({_hash(state) for state in ([1, 2], [2, 1], "ab", b"ab", 7, [7])}) == 6


def test_bad_arguments_are_refused():
    bad = {"n": -1, "scale": -1.0, "decay": 0.0, "anneal_steps": 0, "max_states": 0}
    for name, value in bad.items():
        with pytest.raises(ValueError, match=f"CountNovelty: expected {name}"):
            CountNovelty(**{name: value})
