"""Compositions: what they give for known parts, how they call them, and what they refuse."""

import functools
import math
from types import SimpleNamespace

import pytest
import torch
from meeting import Meeting

from fastrl.rewards.composition import Clipped, Minimum, Product, Scaled, WeightedSum

IDS = [[1, 2, 7], [3], [4, 5], []]
NAN, INF = math.nan, math.inf


def giving(result, name="judge"):
    def function(**_):
        return result

    function.__name__ = name
    return function


def call(reward, **arguments):
    prompts = arguments.pop("prompts", ["a", "a", "b", "b"])
    return reward(prompts, ["x"] * 4, IDS, **arguments)


DENSE = giving([[1.0, 2.0, 3.0], [4.0], [5.0, 6.0], []], "dense")
SPARSE = giving([10.0, 20.0, 30.0, 40.0], "sparse")


def test_numbers_stay_numbers():
    assert call(WeightedSum([SPARSE, giving([1, 2, 3, True])], [0.5, -1.0])) == [4, 8, 12, 19]
    assert all(type(x) is float for x in call(WeightedSum([giving([1, 2, 3, True])])))


def test_lists_are_added_id_by_id():
    other = giving([[1.0, 0.0, -1.0], [1.0], [0.0, 1.0], []])
    assert call(WeightedSum([DENSE, other], [2, 10])) == [[12, 4, -4], [18], [10, 22], 0]


def test_a_number_stands_at_the_last_id_beside_a_list():
    assert call(WeightedSum([DENSE, SPARSE])) == [[1, 2, 13], [24], [5, 36], 40]
    some = giving([1.0, [1.0], None, 1.0])
    assert call(WeightedSum([some, SPARSE])) == [11, [21], 30, 41]


def test_none_is_left_out_and_only_none_gives_none():
    parts = [giving([None, 1.0, None, None], "one"), giving([2.0, None, None, [1.0][:0]], "two")]
    assert call(WeightedSum(parts, [3, 5])) == [10, 3, None, 0]
    assert call(Minimum(parts)) == [2, 1, None, 0]
    assert call(Product(parts)) == [2, 1, None, 0]
    for single in (Scaled(parts[0], 2.0, 1.0), Clipped(parts[0], 3, 4)):
        assert call(single) == [None, 3, None, None]


def test_bad_numbers_stay_with_their_completion_even_at_weight_zero():
    bad = giving([NAN, INF, [1.0, -INF], 1.0], "bad")
    first, second, third, last = call(WeightedSum([bad, SPARSE], [0.0, 1.0]))
    assert math.isnan(first) and math.isnan(second) and math.isnan(third[1]) and last == 40
    assert third[0] == 0
    found = call(Minimum([bad, SPARSE]))
    assert all(map(math.isnan, found[:3])) and found[3] == 1
    first, second, third, last = call(Clipped(bad, -2, 0.5))
    assert math.isnan(first) and (second, third, last) == (INF, [0.5, -INF], 0.5)


def test_what_float32_cannot_hold_is_no_minimum():
    found = call(Minimum([giving([-1e39, 1e39, [3e38, 3e38], -3e38]), SPARSE]))
    assert all(map(math.isnan, found[:3])) and found[3] == -3e38


def test_minimum_gives_what_the_worst_part_gave():
    other = giving([6.5, 3.0, [20.0, -9.0], -1.0], "other")
    assert call(Minimum([DENSE, other])) == [[1, 2, 3], 3, [5, 6], -1]  # 6, 4 > 3, 11 = 11, 0 > -1


def test_a_product_has_one_list_at_most():
    gate = giving([0.0, 1.0, 2.0, 3.0], "gate")
    assert call(Product([gate, SPARSE])) == [0, 20, 60, 120]
    assert call(Product([gate, DENSE, giving([1.0, None, -1.0, 1.0], "sign")])) == [
        [0, 0, 0], [4], [-10, -12], 0,
    ]  # fmt: skip
    with pytest.raises(TypeError, match="at most one part .* dense and again for completion 0"):
        call(Product({"dense": DENSE, "gate": gate, "again": DENSE}))


def test_scaled_and_clipped():
    assert call(Scaled(DENSE, -2, 0.5)) == [[-2, -4, -5.5], [-7.5], [-10, -11.5], 0.5]
    assert call(Scaled(SPARSE, 0.1, offset=-1)) == [0, 1, 2, 3]
    assert call(Clipped(DENSE, 2, 4.5)) == [[2, 2, 3], [4], [4.5, 4.5], 2]
    assert call(Clipped(SPARSE, -INF, 25)) == [10, 20, 25, 25]
    assert Clipped(SPARSE, 0, 1).__name__ == "clipped_sparse"
    assert Scaled(SPARSE, name="it").__name__ == "it"


@pytest.mark.parametrize("make", [torch.tensor, tuple, lambda x: list(map(torch.tensor, x))])
def test_tensors_and_tuples_will_do(make):
    assert call(WeightedSum([giving(make([1.0, 2.0, 3.0, 4.0]))])) == [1, 2, 3, 4]


def test_parts_get_the_arguments_they_name():
    seen = {}

    def first(completions, answer, scale=1.0):
        seen["first"] = answer
        return [scale] * 4

    def second(prompts, completion_ids, trainer_state, log_extra, **columns):
        seen["second"] = (prompts, completion_ids, trainer_state.global_step, sorted(columns))
        return [1.0] * 4

    columns = {"answer": [1, 2, 3, 4], "trainer_state": SimpleNamespace(global_step=5)}
    logging = {"log_metric": lambda *_: None, "log_extra": None}
    inner = WeightedSum([functools.partial(first, scale=3.0)], name="inner")
    assert call(WeightedSum([inner, second]), **columns, **logging) == [4] * 4
    assert seen["first"] == [1, 2, 3, 4]
    assert seen["second"] == (
        ["a", "a", "b", "b"], IDS, 5, ["answer", "completions", "log_metric"],
    )  # fmt: skip


def test_async_parts_run_beside_each_other_at_any_depth():
    meeting = Meeting(4)

    async def slow(completions, reward):
        await meeting.join()
        return [reward] * len(completions)

    parts = [functools.partial(slow, reward=10.0**k) for k in range(4)]
    inner = Clipped(WeightedSum(parts[:2]), 0, INF)
    reward = WeightedSum([Minimum([inner, SPARSE]), *parts[2:]])
    assert call(reward) == [1110, 1111, 1111, 1111]


def test_each_part_is_logged_under_its_path():
    logged = {}
    inner = Minimum({"a": SPARSE, "b": giving([15.0, NAN, None, 50.0])}, name="ignored")
    reward = WeightedSum({"inner": inner, "dense": DENSE}, {"dense": -1, "inner": 2}, name="sum")
    call(reward, log_metric=lambda name, value: logged.update({name: value}))
    assert logged.pop("rewards/sum/inner/mean") == pytest.approx((10 + 30 + 40) / 3)
    assert logged == {
        "rewards/sum/inner/a/mean": 25,
        "rewards/sum/inner/b/mean": 32.5,
        "rewards/sum/inner/a/share": 1,
        "rewards/sum/inner/b/share": 0,
        "rewards/sum/inner/weight": 2,
        "rewards/sum/dense/mean": 21 / 4,
        "rewards/sum/dense/weight": -1,
    }
    call(Minimum([giving([None] * 4)]), log_metric=lambda *pair: logged.update([pair]))
    assert math.isnan(logged["rewards/minimum/judge/mean"])
    assert math.isnan(logged["rewards/minimum/judge/share"])


def test_listed_parts_of_one_name_are_numbered():
    logged = {}
    call(WeightedSum([DENSE, DENSE, SPARSE]), log_metric=lambda name, _: logged.update({name: 0}))
    parts = {name.split("/")[2] for name in logged}
    assert parts == {"dense_1", "dense_2", "sparse"}


@pytest.mark.parametrize(
    "result, error, message",
    [
        ([1.0] * 3, ValueError, "Minimum: expected part inner/bad to give a list of 4 .* got 3"),
        (None, ValueError, "part inner/bad to give a list of 4 rewards, .* got NoneType"),
        ("good", ValueError, "got str"),
        ([1.0, [1.0, 2.0], 1.0, 1.0], ValueError, "bad to give 1 rewards for completion 1, .*2"),
        (["good"] * 4, TypeError, "part inner/bad to give floats, .* got str for completion 0"),
        ([1.0, [None], 1.0, 1.0], TypeError, "bad to give numbers for the tokens of completion 1"),
    ],
)
def test_wrong_results_name_the_part(result, error, message):
    inner = WeightedSum({"bad": giving(result)})
    with pytest.raises(error, match=message):
        call(Minimum({"good": SPARSE, "inner": inner}))


@pytest.mark.parametrize("is_async", [False, True])
def test_an_exception_carries_the_parts_name(is_async):
    def failing(**_):
        raise KeyError("answers")

    async def failing_later(**_):
        raise KeyError("answers")

    parts = {"good": SPARSE, "key": failing_later if is_async else failing}
    with pytest.raises(
        RuntimeError, match="expected part key .* got KeyError: 'answers'"
    ) as caught:
        call(WeightedSum(parts))
    assert isinstance(caught.value.__cause__, KeyError)


def test_an_interrupt_passes():
    def interrupted(**_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call(WeightedSum([interrupted]))


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: WeightedSum([]), ValueError, "WeightedSum: expected parts .* got none"),
        (lambda: Minimum({}), ValueError, "Minimum: expected parts .* got none"),
        (lambda: Minimum("judge"), ValueError, "got 'judge'"),
        (lambda: Minimum(["judge"]), TypeError, "parts to be callable, got 'judge'"),
        (lambda: Product({"a/b": SPARSE}), ValueError, "without a slash, got 'a/b'"),
        (lambda: Product({1: SPARSE}), ValueError, "without a slash, got 1"),
        (lambda: WeightedSum([SPARSE], [1, 2]), ValueError, r"parts \['sparse'\], got \[1, 2\]"),
        (lambda: WeightedSum([SPARSE], {"b": 1}), ValueError, r"\['sparse'\], got \['b'\]"),
        (lambda: WeightedSum([SPARSE], [NAN]), ValueError, "finite weight of part sparse, got nan"),
        (lambda: WeightedSum([SPARSE], ["1"]), TypeError, "weight of part sparse, got '1'"),
        (lambda: Clipped(SPARSE, 2, 1), ValueError, "low <= high, got 2 and 1"),
        (lambda: Clipped(SPARSE, NAN, 1), ValueError, "low <= high, got nan and 1"),
        (lambda: Scaled(SPARSE, INF), ValueError, "factor and offset finite, got inf"),
        (lambda: Clipped(3, 0, 1), TypeError, "Clipped: expected parts to be callable, got 3"),
    ],
)
def test_arguments_are_checked(make, error, message):
    with pytest.raises(error, match=message):
        make()
