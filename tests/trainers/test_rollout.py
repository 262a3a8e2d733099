"""generate: the policy's own distribution, each prompt read once, no work on finished rows."""

from dataclasses import replace

import pytest
import torch

import fastrl.reference as ops
from fastrl.models import LSTMLanguageModel
from fastrl.rollout import completion_seeds, generate

V = 6
EOS = 5
PROMPTS = [torch.tensor([1, 2, 3]), torch.tensor([4]), torch.tensor([0, 0, 1, 2, 3])]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LSTMLanguageModel(V, 8, 16, 2)


def sample(model, prompts=PROMPTS, keys=None, count=4, length=12, **options):
    keys = torch.arange(len(prompts)) if keys is None else torch.tensor(keys)
    seeds = completion_seeds(0, 0, keys, count)
    options = {"eos_token_id": EOS, "ops": ops, **options}
    return generate(
        model, prompts, completions_per_prompt=count, max_new_tokens=length, seeds=seeds, **options
    )


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_logprobs_are_those_of_a_forward_pass(model, temperature):
    rollout = sample(model, temperature=temperature)
    logprobs = rollout.logprobs.split(rollout.lengths.tolist())
    for index, (ids, got) in enumerate(zip(rollout.completion_ids, logprobs, strict=True)):
        prompt = PROMPTS[rollout.group_ids[index]]
        logits, _ = model(torch.cat([prompt, ids])[None])
        log_p = (logits[0, len(prompt) - 1 : -1] / temperature).log_softmax(-1)
        expected = log_p.gather(1, ids[:, None])[:, 0]
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_eos_is_a_completions_last_token_and_only_that(model):
    rollout = sample(model)
    assert rollout.ended.any() and not rollout.ended.all()
    for ids, ended in zip(rollout.completion_ids, rollout.ended.tolist(), strict=True):
        assert (ids[:-1] != EOS).all()
        assert (ids[-1] == EOS) == ended
        assert ended or len(ids) == 12


def test_without_eos_all_have_the_full_length(model):
    rollout = sample(model, eos_token_id=None)
    assert rollout.lengths.tolist() == [12] * 12
    assert not rollout.ended.any()
    assert (rollout.token_ids == EOS).any()


def test_packed_fields_agree(model):
    rollout = sample(model)
    assert rollout.cu_seqlens.dtype == torch.int32
    assert rollout.cu_seqlens[0] == 0 and rollout.cu_seqlens[-1] == rollout.token_ids.numel()
    assert rollout.group_ids.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert torch.equal(torch.cat(rollout.completion_ids), rollout.token_ids)
    assert rollout.logprobs.shape == rollout.token_ids.shape


def test_a_completion_does_not_depend_on_its_batch(model):
    whole = sample(model)
    ids, logprobs = whole.completion_ids, whole.logprobs.split(whole.lengths.tolist())
    for index, prompt in enumerate(PROMPTS):
        torch.manual_seed(index)  # nor on torch's generator
        alone = sample(model, [prompt], keys=[index])
        rows = range(4 * index, 4 * index + 4)
        assert torch.equal(alone.token_ids, torch.cat([ids[row] for row in rows]))
        expected = torch.cat([logprobs[row] for row in rows])
        torch.testing.assert_close(alone.logprobs, expected, atol=1e-6, rtol=1e-5)


def test_completions_of_a_prompt_differ(model):
    rollout = sample(model, PROMPTS[:1], count=16, eos_token_id=None)
    assert len({tuple(ids.tolist()) for ids in rollout.completion_ids}) == 16


def test_finished_rows_leave_the_batch_and_prompts_are_read_once(model):
    read = []
    model.embedding.register_forward_hook(lambda _, args, __: read.append(args[0].numel()))
    rollout = sample(model)
    lengths = rollout.lengths
    assert read[0] == sum(map(len, PROMPTS))
    # The token at step t is read only by the rows that go on after it.
    assert read[1:] == [int((lengths > step).sum()) for step in range(1, int(lengths.max()))]


def test_greedy_takes_the_likeliest_token(model):
    rollout = sample(model, temperature=0.0, eos_token_id=None, count=1)
    for prompt, ids in zip(PROMPTS, rollout.completion_ids, strict=True):
        logits, _ = model(torch.cat([prompt, ids])[None])
        assert torch.equal(logits[0, len(prompt) - 1 : -1].argmax(-1), ids)


def test_first_tokens_follow_the_policy(model):
    count = 4000
    rollout = sample(model, PROMPTS[:1], count=count, length=1)
    p = model(PROMPTS[0][None])[0][0, -1].softmax(-1)
    observed = torch.bincount(rollout.token_ids, minlength=V)
    chi_square = ((observed - count * p).square() / (count * p)).sum()
    assert chi_square < 20.5  # 5 degrees of freedom, p = 0.001


@pytest.mark.parametrize("max_rows", [1, 3, 5, 12, 100])
def test_rows_that_are_refilled_give_the_same_tokens(model, max_rows):
    whole, some = sample(model), sample(model, max_rows=max_rows)
    assert torch.equal(some.token_ids, whole.token_ids)
    assert torch.equal(some.cu_seqlens, whole.cu_seqlens)
    assert torch.equal(some.ended, whole.ended)
    torch.testing.assert_close(some.logprobs, whole.logprobs, atol=1e-6, rtol=1e-5)


def test_no_more_rows_run_than_allowed(model):
    read = []
    model.embedding.register_forward_hook(lambda _, args, __: read.append(args[0].shape))
    rollout = sample(model, max_rows=5)
    steps = [shape[0] for shape in read if len(shape) == 2]  # prompts are read packed
    assert max(steps) == 5
    assert sum(steps) == int((rollout.lengths - 1).sum())  # no row computes what nobody reads


@pytest.mark.parametrize("ids", [[EOS, 0], (0, EOS), torch.tensor([EOS, 0])])
def test_each_of_several_eos_ids_ends_a_completion(model, ids):
    rollout = sample(model, eos_token_id=ids)
    last = torch.stack([ids[-1] for ids in rollout.completion_ids])
    assert {0, EOS} <= set(last[rollout.ended].tolist()) <= {0, EOS}
    for ids in rollout.completion_ids:
        assert not torch.isin(ids[:-1], torch.tensor([0, EOS])).any()


def test_a_completion_ends_where_a_stop_string_is_complete(model):
    def decode(ids):
        return "".join("abcdef"[i] for i in ids)

    plain = sample(model, eos_token_id=None)
    rollout = sample(model, eos_token_id=None, stop_strings=["ab", "ddd"], decode=decode)
    assert rollout.ended.any() and not rollout.ended.all()
    pairs = zip(plain.completion_ids, rollout.completion_ids, rollout.ended.tolist(), strict=True)
    for whole, ids, ended in pairs:
        ends = [n for n in range(1, 13) if decode(whole[:n].tolist()).endswith(("ab", "ddd"))]
        assert len(ids) == (ends[0] if ends else 12) and ended == bool(ends)
        assert torch.equal(ids, whole[: len(ids)])


def test_what_an_environment_answers_is_read_and_is_no_target(model):
    asked = []

    def environment(index, prompt, completion):
        asked.append((index, prompt, completion))
        return [1, 2, 3] if len(completion) < 5 else None

    rollout = sample(model, environment=environment)
    assert asked
    answered = {index for index, _, completion in asked if len(completion) < 5}
    logprobs = rollout.logprobs.split(rollout.lengths.tolist())
    for index, (ids, written) in enumerate(
        zip(rollout.completion_ids, rollout.is_target, strict=True)
    ):
        if index in answered:
            at = int((ids == EOS).nonzero()[0])
            assert ids[at + 1 : at + 4].tolist() == [1, 2, 3][: len(ids) - at - 1]
            assert not written[at + 1 : at + 4].any() and written[: at + 1].all()
        prompt = PROMPTS[rollout.group_ids[index]]
        log_p = model(torch.cat([prompt, ids])[None])[0][0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = log_p.gather(1, ids[:, None])[:, 0][written]
        torch.testing.assert_close(logprobs[index], expected, atol=1e-5, rtol=1e-5)
    for index, prompt, completion in asked:
        assert prompt == PROMPTS[index // 4].tolist() and completion[-1] == EOS
        ids = rollout.completion_ids[index].tolist()
        assert ids[: len(completion)] == completion


def test_values_are_those_of_the_states_that_were_sampled_from(model):
    rollout = sample(model, value_fn=lambda hidden: hidden.sum(-1), max_rows=5)
    with torch.no_grad():
        expected = model.packed_hidden(rollout.batch).sum(-1)
    torch.testing.assert_close(rollout.values, expected, atol=1e-5, rtol=1e-5)
    assert sample(model).values is None


def test_all_targets_count_until_it_is_known_which_do_not(model):
    rollout = sample(model)
    assert rollout.is_used is None and rollout.loss_mask.tolist() == [True] * len(rollout.token_ids)


def test_take_cuts_all_that_is_known_of_completions(model):
    rollout = sample(model, value_fn=lambda hidden: hidden.sum(-1))
    rewards, is_used = torch.arange(len(rollout.token_ids)).float(), torch.arange(12) % 3 > 0
    rollout = replace(rollout, rewards=rewards, is_used=is_used)
    stays = torch.tensor([True, False, True, False] + [False] * 4 + [True] * 4)
    part, rows = rollout.take(stays), stays.nonzero().squeeze(1)
    tokens = stays.repeat_interleave(rollout.lengths)
    for name in ("token_ids", "logprobs", "values", "rewards", "loss_mask"):
        assert torch.equal(getattr(part, name), getattr(rollout, name)[tokens])
    for name in ("group_ids", "ended", "is_used", "lengths"):
        assert torch.equal(getattr(part, name), getattr(rollout, name)[rows])
    whole = rollout.completion_ids
    assert [x.tolist() for x in part.completion_ids] == [whole[i].tolist() for i in rows]
    assert part.batch.layout.num_segments == 6 + 2  # the second prompt has gone


def test_seeds_are_distinct_and_belong_to_their_key():
    seeds = completion_seeds(3, 0, torch.arange(1000), 8)
    assert seeds.unique().numel() == 8000
    assert (seeds >= 0).all()
    assert torch.equal(completion_seeds(3, 0, torch.tensor([7]), 8), seeds[56:64])
    assert torch.equal(completion_seeds(3, 0, torch.tensor([7]), 2), seeds[56:58])
    others = [completion_seeds(4, 0, torch.arange(1000), 8)]
    others.append(completion_seeds(3, 1, torch.arange(1000), 8))
    assert torch.cat([seeds, *others]).unique().numel() == 24000


@pytest.mark.parametrize(
    "prompts, error, message",
    [
        ([], ValueError, "expected prompts, got none"),
        ([torch.tensor([], dtype=torch.int64)], ValueError, r"P_g >= 1, got \(0,\) at 0"),
        ([torch.tensor([[1]])], ValueError, r"got \(1, 1\) at 0"),
        ([torch.tensor([1.0])], TypeError, "expected prompts int64, got torch.float32"),
    ],
)
def test_prompts_are_checked(model, prompts, error, message):
    with pytest.raises(error, match=message):
        sample(model, prompts)


def test_seeds_and_length_are_checked(model):
    with pytest.raises(ValueError, match=r"expected seeds \[C\] = \(3,\).*got \(2,\)"):
        generate(model, PROMPTS, max_new_tokens=1, seeds=torch.tensor([1, 2]), ops=ops)
    with pytest.raises(ValueError, match="expected max_new_tokens >= 1, got 0"):
        sample(model, length=0)
    options = {"max_new_tokens": 1, "seeds": torch.arange(3), "decode": str}
    for message, changes in (
        ("completions_per_prompt >= 1, got 0", {"completions_per_prompt": 0}),
        ("max_rows >= 1, got 0", {"max_rows": 0}),
        ("stop_strings a list of texts that are not empty, got 'ab'", {"stop_strings": "ab"}),
        (r"stop_strings a list .*, got \['a', ''\]", {"stop_strings": ["a", ""]}),
        ("decode with stop_strings, got None", {"stop_strings": ["a"], "decode": None}),
        ("max_rows as an int, got float", {"max_rows": 1.5}),
        ("eos_token_id >= 0, got -1", {"eos_token_id": [EOS, -1]}),
        (rf"eos_token_id in \[0, {V}\), got {V}", {"eos_token_id": V}),
        ("eos_token_id as an int, got str", {"eos_token_id": "</s>"}),
    ):
        with pytest.raises((ValueError, TypeError), match=f"generate: expected {message}"):
            generate(model, PROMPTS, **options | changes)
