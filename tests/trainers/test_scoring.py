"""Reward functions: TRL's signature, sums and weights, and what they may not return."""

import pytest
import torch

from fastrl.rollout import Rollout
from fastrl.trainers import RewardFunctionError
from fastrl.trainers.prompts import PromptDataset
from fastrl.trainers.scoring import RewardScorer

IDS = [[1, 2, 7], [3], [4, 5], [6, 7]]  # two completions for each of two prompts; 7 is EOS
DATASET = [{"prompt": [1, 2], "answer": "a"}, {"prompt": [3], "answer": "b"}]


def score(functions, weights=None, dataset=DATASET, tokenizer=None):
    prompts = PromptDataset(dataset, 8, tokenizer)
    examples = [prompts[0], prompts[1]]
    lengths = torch.tensor([0] + [len(ids) for ids in IDS])
    rollout = Rollout(
        prompts=[example.token_ids for example in examples],
        token_ids=torch.tensor(sum(IDS, [])),
        cu_seqlens=lengths.cumsum(0).int(),
        group_ids=torch.tensor([0, 0, 1, 1]),
        ended=torch.tensor([True, False, False, True]),
        logprobs=torch.zeros(8),
    )
    return RewardScorer(functions, weights)(examples, rollout, prompts, eos_token_id=7)


def giving(result, name="judge"):
    def function(**_):
        return result

    function.__name__ = name
    return function


def test_functions_get_what_trl_gives_them():
    seen = {}

    def judge(prompts, completions, completion_ids, **columns):
        seen.update(prompts=prompts, completions=completions, ids=completion_ids, columns=columns)
        return [0.0] * 4

    score(judge)
    assert seen["prompts"] == [[1, 2], [1, 2], [3], [3]]
    assert seen["ids"] == seen["completions"] == IDS
    assert seen["columns"] == {"answer": ["a", "a", "b", "b"]}


class Words:
    """A tokenizer of single digits."""

    def encode(self, text):
        return [int(c) for c in text]

    def decode(self, ids):
        return "".join(map(str, ids))


def test_with_a_tokenizer_they_get_text_without_the_eos():
    seen = {}
    score(lambda **arguments: seen.update(arguments) or [0.0] * 4, dataset=["12", "3"],
          tokenizer=Words())  # fmt: skip
    assert seen["prompts"] == ["12", "12", "3", "3"]
    assert seen["completions"] == ["12", "3", "45", "6"]
    assert seen["completion_ids"] == IDS


def test_a_float_stands_at_the_last_token_and_a_list_at_its_tokens():
    scores = score(giving([1.0, [2.0], [3.0, 4.0], 5]))
    assert scores.rewards.tolist() == [0, 0, 1, 2, 3, 4, 0, 5]
    assert scores.totals.tolist() == [1, 2, 7, 5]
    assert scores.is_used.all()
    assert scores.metrics["reward"] == 15 / 4
    assert scores.rewards.dtype == torch.float32


@pytest.mark.parametrize("make", [torch.tensor, tuple, lambda x: [torch.tensor(r) for r in x]])
def test_tensors_and_tuples_will_do(make):
    assert score(giving(make([1.0, 2.0, 3.0, 4.0]))).totals.tolist() == [1, 2, 3, 4]


def test_functions_are_summed_with_weights():
    dense = giving([[1.0, 1.0, 1.0], [1.0], [1.0, 1.0], [1.0, 1.0]], "dense")
    sparse = giving([1.0, 2.0, 3.0, None], "sparse")
    scores = score([dense, sparse], [2.0, -1.0])
    assert scores.totals.tolist() == [5, 0, 1, 4]
    assert scores.metrics["rewards/dense"] == 2 and scores.metrics["rewards/sparse"] == 2


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


def test_functions_of_the_same_name_are_told_apart():
    metrics = score([giving([1.0] * 4), giving([2.0] * 4)]).metrics
    assert metrics["rewards/judge_1"] == 1 and metrics["rewards/judge_2"] == 2


@pytest.mark.parametrize(
    "result, error, message",
    [
        ([1.0] * 3, ValueError, "judge to give a list of 4 rewards, .* got 3"),
        ([], ValueError, "a list of 4 rewards, .* got 0"),
        (1.0, ValueError, "a list of 4 rewards, .* got float"),
        (None, ValueError, "a list of 4 rewards, .* got NoneType"),
        ([1.0, 1.0, [1.0], 1.0], ValueError, "judge to give 2 rewards for completion 2, .* got 1"),
        ([1.0, [], 1.0, 1.0], ValueError, "give 1 rewards for completion 1, .* got 0"),
        (["good"] * 4, TypeError, "judge to give floats, .* got str for completion 0"),
        ([1.0, 1.0, [1.0, None], 1.0], TypeError, "judge to give numbers for the tokens"),
    ],
)
def test_wrong_results_name_the_function(result, error, message):
    with pytest.raises(error, match=message):
        score(giving(result))


def test_an_exception_carries_the_functions_name():
    def judge(**_):
        raise KeyError("answers")

    with pytest.raises(RewardFunctionError, match="judge raised KeyError: 'answers'") as caught:
        score(judge)
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(
    "functions, weights, error, message",
    [
        ([], None, ValueError, "at least one function, got none"),
        (["judge"], None, TypeError, "to be callable, got 'judge'"),
        ([len, len], [1.0], ValueError, "reward_weights for 2 reward functions, got 1"),
    ],
)
def test_arguments_are_checked(functions, weights, error, message):
    with pytest.raises(error, match=message):
        RewardScorer(functions, weights)
