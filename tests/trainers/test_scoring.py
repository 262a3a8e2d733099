"""Reward functions: TRL's signature, sums and weights, and what they may not return."""

import copy
import functools
import math
import random

import pytest
import torch

from fastrl.layout import PackedBatch, pack_groups
from fastrl.rewards import PotentialShaping, Scaled, WeightedSum
from fastrl.rollout import Rollout
from fastrl.trainers import RewardFunctionError
from fastrl.trainers.prompts import PromptDataset
from fastrl.trainers.scoring import RewardScorer

IDS = [[1, 2, 7], [3], [4, 5], [6, 7]]  # two completions for each of two prompts; 7 is EOS
DATASET = [{"prompt": [1, 2], "answer": "a"}, {"prompt": [3], "answer": "b"}]


def rollout_of(batch, group_ids=(0, 0, 1, 1)):
    return Rollout(
        batch=batch,
        group_ids=torch.tensor(group_ids),
        ended=torch.ones(len(group_ids), dtype=torch.bool),
        logprobs=torch.zeros(len(batch.target_ids)),
    )


def score(functions, weights=None, dataset=DATASET, tokenizer=None, ids=IDS, **options):
    scorer = functions
    if not isinstance(scorer, RewardScorer):
        scorer = RewardScorer(functions, weights, **options)
    prompts = PromptDataset(dataset, 8, tokenizer)
    examples = [prompts[0], prompts[1]]
    completions = [torch.tensor(row, dtype=torch.int64) for row in ids]
    batch = pack_groups([e.token_ids for e in examples], [completions[:2], completions[2:]])
    return scorer(examples, rollout_of(batch), prompts, eos_token_id=7)


def giving(result, name="judge"):
    def function(**_):
        return result

    function.__name__ = name
    return function


def test_functions_get_what_trl_gives_them():
    seen = {}

    def judge(prompts, completions, completion_ids, log_extra, log_metric, is_target, **columns):
        seen.update(prompts=prompts, completions=completions, ids=completion_ids, columns=columns)
        seen["is_target"] = is_target
        log_extra("length", [len(ids) for ids in completion_ids])
        log_metric("judge/calls", 1.0)
        log_metric("judge/calls", 2.0)
        return [0.0] * 4

    scores = score(judge)
    assert seen["prompts"] == [[1, 2], [1, 2], [3], [3]]
    assert seen["ids"] == seen["completions"] == IDS
    assert seen["columns"] == {"answer": ["a", "a", "b", "b"]}
    assert seen["is_target"] == [[True] * len(ids) for ids in IDS]
    assert scores.columns == {"length": [3, 1, 2, 2], "judge": [0.0] * 4}
    assert scores.metrics["judge/calls"] == 1.5


def test_functions_may_name_only_what_they_want():
    def by_name(completions, answer, scale=2.0):
        return [scale * (a == "a") for a in answer]

    assert score(by_name).totals.tolist() == [2, 2, 0, 0]
    with pytest.raises(RewardFunctionError, match="missing 1 required positional argument: 'key'"):
        score(lambda completions, key: key)


class Kind(dict):
    """A dict that is more than one."""


@pytest.mark.parametrize("together", [list, WeightedSum])
def test_what_a_function_changes_is_its_own(together):
    dataset = [{"prompt": [1, 2], "notes": [{"b": ["c"]}, "d"]}, {"prompt": [3], "notes": None}]
    dataset = [{**row, "kind": Kind(a=1)} for row in dataset]
    before, seen = copy.deepcopy(dataset), []

    def changing(prompts, completions, completion_ids, notes, kind):
        assert [type(each) for each in kind] == [Kind] * 4
        seen.append(copy.deepcopy((prompts, completions, completion_ids, notes)))
        prompts[0].append(4)
        notes[0][0]["b"].clear()
        for changed in (completion_ids[0], completions[1], prompts, completions, notes):
            changed.clear()
        return [1.0] * 4

    assert score(together([changing, changing]), dataset=dataset).totals.tolist() == [2.0] * 4
    assert dataset == before and seen[0] == seen[1]
    assert seen[0][0] == [[1, 2], [1, 2], [3], [3]] and seen[0][1] == seen[0][2] == IDS


def test_the_trainers_state_is_handed_on():
    prompts = PromptDataset(DATASET, 8)
    batch = pack_groups([torch.tensor([1, 2])], [[torch.tensor([3])]])
    scorer = RewardScorer(lambda completions, trainer_state: [trainer_state["step"]])
    state = {"step": 3.0}
    scores = scorer([prompts[0]], rollout_of(batch, [0]), prompts, None, trainer_state=state)
    assert scores.totals.tolist() == [3]


def test_a_column_may_not_hide_an_argument():
    dataset = [{"prompt": [1], "completions": "x"}, {"prompt": [2], "completions": "y"}]
    with pytest.raises(ValueError, match=r"got \['completions'\].*rename the columns"):
        score(giving([0.0] * 4), dataset=dataset)


class Digits:
    """A tokenizer of single digits."""

    def encode(self, text):
        return [int(c) for c in text]

    def decode(self, ids):
        return "".join(map(str, ids))


def test_with_a_tokenizer_they_get_text_without_the_eos():
    seen = {}
    score(lambda **arguments: seen.update(arguments) or [0.0] * 4, dataset=["12", "3"],
          tokenizer=Digits())  # fmt: skip
    assert seen["prompts"] == ["12", "12", "3", "3"]
    assert seen["completions"] == ["12", "3", "45", "6"]
    assert seen["completion_ids"] == IDS


def test_a_float_stands_at_the_last_token_and_a_list_at_its_tokens():
    scores = score(giving([1.0, [2.0], [3.0, 4.0], 5]))
    assert scores.rewards.tolist() == [0, 0, 1, 2, 3, 4, 0, 5]
    assert scores.totals.tolist() == [1, 2, 7, 5]
    assert scores.is_used.all()
    assert scores.metrics["reward"] == 15 / 4
    # Deviations -11/4, -7/4, 13/4, 5/4 with Bessel's correction, as TRL has it.
    assert scores.metrics["reward_std"] == pytest.approx(math.sqrt((121 + 49 + 169 + 25) / 48))
    assert scores.metrics["rewards/judge/std"] == scores.metrics["reward_std"]
    assert scores.rewards.dtype == scores.totals.dtype == torch.float32


def test_tokens_that_the_policy_did_not_write_get_no_reward():
    # Prompts 0 and 1, two completions of prompt 0; 8 and 9 in the first are a tool's.
    tokens = [[1, 2], [3, 8, 9, 4], [5, 6], [1]]
    targets = [[0, 0], [1, 0, 0, 1], [1, 1], [0]]
    batch = PackedBatch.from_segments(
        [torch.tensor(row) for row in tokens],
        [-1, 0, 0, -1],
        [torch.tensor(row, dtype=torch.bool) for row in targets],
    )
    prompts = PromptDataset([[1, 2], [1]], 10)
    seen = {}

    def dense(completion_ids):
        seen["ids"] = completion_ids
        return [[1.0, math.nan, 100.0, 2.0], [3.0, 4.0]]

    def sparse(completion_ids):
        return [10.0, 20.0]

    scorer = RewardScorer([dense, sparse])
    scores = scorer([prompts[0], prompts[1]], rollout_of(batch, [0, 0]), prompts, None)
    assert seen["ids"] == [[3, 8, 9, 4], [5, 6]]
    assert scores.rewards.tolist() == [1, 12, 3, 24]
    assert scores.totals.tolist() == [13, 27] and scores.is_used.all()
    assert scores.columns == {"dense": [3, 7], "sparse": [10, 20]}


def test_a_completion_that_ends_in_a_tools_answer():
    batch = PackedBatch.from_segments(
        [torch.tensor([1]), torch.tensor([2, 3, 4])],
        [-1, 0],
        [torch.tensor([False]), torch.tensor([True, True, False])],
    )
    prompts = PromptDataset([[1]], 10)

    def rewards(function):
        scorer = RewardScorer(function)
        return scorer([prompts[0]], rollout_of(batch, [0]), prompts, None).rewards.tolist()

    number, dense = giving([5.0]), giving([[1.0, 2.0, 50.0]], "dense")
    assert rewards(number) == [0, 5]
    assert rewards([number, dense]) == rewards(WeightedSum([number, dense])) == [1, 7]
    assert rewards(Scaled(dense, 2.0, offset=3.0)) == [2, 7]
    shaped = PotentialShaping(number, lambda _, ids: float(len(ids) + 1))
    assert rewards(shaped) == [2 - 1, 5 - 2]  # what the tool has answered is a state of nobody's


def test_an_empty_completion_has_its_reward_in_the_totals():
    scores = score(giving([1.0, 2.0, 3.0, 4.0]), ids=[[1], [], [4], [6]])
    assert scores.totals.tolist() == [1, 2, 3, 4] and scores.rewards.tolist() == [1, 3, 4]


def test_prompts_follow_the_groups_of_the_completions():
    seen = {}
    prompts = PromptDataset(DATASET, 8)
    batch = pack_groups(
        [torch.tensor([1, 2]), torch.tensor([3])],
        [[torch.tensor([1])], [torch.tensor([2]), torch.tensor([3])]],
    )
    scorer = RewardScorer(lambda **arguments: seen.update(arguments) or [0.0] * 3)
    scorer([prompts[0], prompts[1]], rollout_of(batch, [0, 1, 1]), prompts, None)
    assert seen["answer"] == ["a", "b", "b"] and seen["prompts"] == [[1, 2], [3], [3]]


@pytest.mark.parametrize("make", [torch.tensor, tuple, lambda x: [torch.tensor(r) for r in x]])
def test_tensors_and_tuples_will_do(make):
    assert score(giving(make([1.0, 2.0, 3.0, 4.0]))).totals.tolist() == [1, 2, 3, 4]


def test_functions_are_summed_with_weights():
    dense = giving([[1.0, 1.0, 1.0], [1.0], [1.0, 1.0], [1.0, 1.0]], "dense")
    sparse = giving([1.0, 2.0, 3.0, None], "sparse")
    scores = score([dense, sparse], [2.0, -1.0])
    assert scores.totals.tolist() == [5, 0, 1, 4]
    assert scores.rewards.tolist() == [2, 2, 1, 0, 2, -1, 2, 2]
    assert scores.metrics["rewards/dense/mean"] == scores.metrics["rewards/sparse/mean"] == 2
    assert scores.metrics["rewards/sparse/std"] == 1
    assert scores.columns == {"dense": [3, 1, 2, 2], "sparse": [1, 2, 3, None]}


def test_none_is_no_opinion():
    scores = score([giving([None, 1.0, None, 1.0], "one"), giving([None, None, 2.0, 1.0], "two")])
    assert scores.is_used.tolist() == [False, True, True, True]
    assert scores.totals.tolist() == [0, 1, 2, 2]
    assert scores.metrics["rewards/none"] == 1 and scores.metrics["rewards/bad"] == 0
    assert scores.metrics["reward"] == 5 / 3


def test_bad_numbers_mask_their_own_completion():
    scores = score(giving([float("nan"), [float("inf")], [1.0, float("-inf")], [1.0, 2.0]]))
    assert scores.is_used.tolist() == [False, False, False, True]
    assert scores.rewards.tolist() == [0, 0, 0, 0, 0, 0, 1, 2]
    assert scores.metrics["rewards/bad"] == 3 and scores.metrics["reward"] == 3
    assert math.isnan(scores.metrics["reward_std"])  # of one completion


def test_what_float32_cannot_hold_is_bad():
    scores = score(giving([1e39, 1.0, [3e38, 3e38], [3e38, -3e38]]))
    assert scores.is_used.tolist() == [False, True, False, False]
    assert scores.metrics["rewards/bad"] == 3


@pytest.mark.parametrize(
    "of", [lambda f: f, lambda f: WeightedSum([f]), lambda f: PotentialShaping(f, lambda *_: 0.0)]
)
def test_a_whole_number_that_no_float_can_hold_is_bad(of):
    scores = score(of(giving([10**400, -(10**400), [10**400, 0], 1])))
    assert scores.is_used.tolist() == [False, False, False, True]
    assert scores.metrics["rewards/bad"] == 3


def test_a_sum_that_no_float_can_hold_is_bad():
    scores = score(giving([[1e308] * 3, 1.0, [2.0, 2.0], [1e308, -1e308]]))
    assert scores.is_used.tolist() == [False, True, True, False]
    assert scores.metrics["rewards/bad"] == 2


class Judge:
    def __call__(self, completions, **_):
        return [0.0] * len(completions)


def test_names_are_distinct_and_readable():
    def judge(completions, scale=1.0):
        return [scale] * len(completions)

    partials = [functools.partial(judge, scale=2.0), functools.partial(judge, scale=3.0)]
    functions = [*partials, Judge(), lambda completions: [0.0] * 4, giving([1.0] * 4, "judge_2")]
    scorer = RewardScorer(functions)
    assert scorer.names == ["judge_1", "judge_3", "Judge", "lambda", "judge_2"]
    metrics = score(scorer).metrics
    means = [metrics[f"rewards/{name}/mean"] for name in scorer.names]
    assert means == [2, 3, 0, 0, 1]


class Noisy:
    """A reward with a state, as random ones have it."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    def __call__(self, completions, **_):
        return [self.random.random() for _ in completions]

    def state_dict(self):
        version, internal, gauss = self.random.getstate()
        return {"version": version, "internal": list(internal), "gauss": gauss}

    def load_state_dict(self, state):
        self.random.setstate((state["version"], tuple(state["internal"]), state["gauss"]))


def test_functions_with_a_state_go_on_from_it():
    scorer = RewardScorer([giving([0.0] * 4), Noisy(0)])
    score(scorer)
    state = scorer.state_dict()
    expected = score(scorer).totals
    resumed = RewardScorer([giving([0.0] * 4), Noisy(1)])
    assert state.keys() == {"Noisy"}
    assert not torch.equal(score(resumed).totals, expected)
    resumed.load_state_dict(state)
    assert torch.equal(score(resumed).totals, expected)
    with pytest.raises(ValueError, match=r"of the reward functions \[\], got \['Noisy'\]"):
        RewardScorer(giving([0.0])).load_state_dict(state)


@pytest.mark.parametrize(
    "result, error, message",
    [
        ([1.0] * 3, ValueError, "judge to give a list of 4 rewards, .* got 3"),
        ([], ValueError, "a list of 4 rewards, .* got 0"),
        (1.0, ValueError, "a list of 4 rewards, .* got float"),
        (None, ValueError, "a list of 4 rewards, .* got NoneType"),
        ("good", ValueError, "a list of 4 rewards, .* got str"),
        ([1.0, 1.0, [1.0], 1.0], ValueError, "judge to give 2 rewards for completion 2, .* got 1"),
        ([1.0, [], 1.0, 1.0], ValueError, "give 1 rewards for completion 1, .* got 0"),
        (["good"] * 4, TypeError, "judge to give floats, .* got str for completion 0"),
        ([1.0, 1.0, [1.0, None], 1.0], TypeError, "judge to give numbers for the tokens of"),
    ],
)
@pytest.mark.parametrize("errors", ["raise", "mask"])
def test_wrong_results_name_the_function(result, error, message, errors):
    with pytest.raises(error, match=message):
        score(giving(result), errors=errors)


def test_a_logged_column_has_an_entry_for_each_completion():
    def judge(completions, log_extra):
        log_extra("length", [1, 2])
        return [0.0] * 4

    with pytest.raises(ValueError, match=r"log_extra\('length', ...\) with 4 values.* got 2"):
        score(judge)


def failing(**_):
    raise KeyError("answers")


def test_an_exception_carries_the_functions_name():
    with pytest.raises(RewardFunctionError, match="failing raised KeyError: 'answers'") as caught:
        score(failing)
    assert isinstance(caught.value.__cause__, KeyError)
    assert caught.value.__cause__.__traceback__.tb_next.tb_frame.f_code.co_name == "failing"


def test_an_exception_may_mask_the_completions():
    with pytest.warns(RuntimeWarning, match="failing raised KeyError: 'answers'; 4 completions"):
        scores = score([failing, giving([1.0] * 4)], errors="mask")
    assert not scores.is_used.any() and not scores.rewards.any()
    counts = [scores.metrics[f"rewards/{kind}"] for kind in ("errors", "timeouts", "bad", "none")]
    assert counts == [4, 0, 0, 0]
    assert scores.metrics["rewards/judge/mean"] == 1 and math.isnan(scores.metrics["reward"])


@pytest.mark.parametrize(
    "functions, options, error, message",
    [
        ([], {}, ValueError, "at least one function, got none"),
        ([3], {}, TypeError, "to be callable, got 3"),
        (["judge"], {}, TypeError, "got 'judge'. A preference model becomes"),
        ("judge", {}, TypeError, "got 'judge'. A preference model becomes"),
        (torch.nn.Linear(1, 1), {}, TypeError, "got Linear. A preference model becomes"),
        (
            [len, len],
            {"weights": [1.0]},
            ValueError,
            "reward_weights for 2 reward functions, got 1",
        ),
        (len, {"timeout": 0}, ValueError, "timeout of reward functions above 0 seconds, got 0"),
        (len, {"errors": "skip"}, ValueError, '"raise" or "mask", got \'skip\''),
    ],
)
def test_arguments_are_checked(functions, options, error, message):
    with pytest.raises(error, match=message):
        RewardScorer(functions, **options)
