"""Datasets: the forms that are understood, and errors that name the entry."""

from types import SimpleNamespace

import pytest
import torch

from fastrl.layout import pack_groups
from fastrl.rollout import Rollout
from fastrl.trainers import sampling
from fastrl.trainers.prompts import PromptDataset, PromptOrder, canonical
from fastrl.trainers.scoring import RewardScorer

WORDS = ["[PAD]", "[EOS]", "[BOS]", "<|user|>", "<|assistant|>", *(f"w{i}" for i in range(5, 20))]
CHAT = [{"role": "user", "content": "w6 w7"}]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %} <|{{ m['role'] }}|> {{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %} <|assistant|>{% endif %}{{ suffix }}"
)


@pytest.fixture(scope="module")
def plain_tokenizer():
    """Of the tokenizers library: [BOS] before each text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="w5"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(WORDS[:5])
    made.post_processor = processors.TemplateProcessing(
        single="[BOS] $A", special_tokens=[("[BOS]", 2)]
    )
    return made


@pytest.fixture(scope="module")
def tokenizer(plain_tokenizer):
    """Of transformers, with a chat template."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=plain_tokenizer, chat_template=TEMPLATE,
        pad_token="[PAD]", eos_token="[EOS]", bos_token="[BOS]",
    )  # fmt: skip


def trl():
    return pytest.importorskip(
        "trl", reason="TRL is not installed: `make test` does it, from Python 3.11 on"
    )


def trl_prompt_ids(tokenizer, prompts):
    """What TRL 1.16 tokenises them to."""
    trainer = SimpleNamespace(
        _is_vlm=False, environment_factories=None, processing_class=tokenizer, tools=None,
        chat_template=None, chat_template_kwargs={},
    )  # fmt: skip
    return trl().GRPOTrainer._tokenize_prompts(trainer, prompts)[0]


@pytest.mark.parametrize("kind", ["plain_tokenizer", "tokenizer"])
def test_text_is_encoded(kind, request):
    tokenizer = request.getfixturevalue(kind)
    dataset = PromptDataset(["w7 w5 w6", {"prompt": "w6", "answer": 1}], 20, tokenizer)
    assert len(dataset) == 2
    assert dataset[0].prompt == "w7 w5 w6" and dataset[0].token_ids.tolist() == [2, 7, 5, 6]
    assert dataset[1].prompt == "w6" and dataset[1].columns == {"answer": 1}
    assert not dataset[0].is_chat


@pytest.mark.parametrize("kind", ["plain_tokenizer", "tokenizer"])
def test_completions_are_text_without_special_tokens(kind, request):
    dataset = PromptDataset(["w5"], 20, request.getfixturevalue(kind))
    assert dataset.decode([6, 7, 1], eos_token_id=1) == "w6 w7"
    assert dataset.decode([6, 4, 0, 7], eos_token_id=1) == "w6 w7"
    assert dataset.decode([6, 7, 8], eos_token_id=8) == "w6 w7"  # EOS that is no special token
    assert dataset.decode([6, 7, 8], eos_token_id=[1, 8]) == "w6 w7"
    assert dataset.decode([6, 8, 7], eos_token_id=8) == "w6 w8 w7"
    assert dataset.decode([6, 7, 8], eos_token_id=None) == "w6 w7 w8"
    assert dataset.decode([], eos_token_id=1) == ""


@pytest.mark.parametrize("kind", ["plain_tokenizer", "tokenizer"])
def test_a_special_token_may_be_a_stop_string(kind, request, make_trainer):
    trainer = make_trainer(
        tokenizer=request.getfixturevalue(kind), stop_strings=("[PAD]",), eos_token_id=None,
        max_new_tokens=30,
    )  # fmt: skip
    rollout = sampling.collect(trainer, [trainer.dataset[i] for i in range(3)], torch.arange(3))
    pad = WORDS.index("[PAD]")
    assert rollout.ended.any()
    for ids, ended in zip(rollout.completion_ids, rollout.ended.tolist(), strict=True):
        assert ids.tolist().index(pad) == len(ids) - 1 if ended else pad not in ids


def test_special_tokens_are_never_there_twice(tokenizer, plain_tokenizer):
    dataset = PromptDataset(["w6", "[BOS] w6", CHAT], 20, tokenizer)
    assert [dataset[i].token_ids.tolist()[0] for i in range(3)] == [2, 2, 2]
    assert [dataset[i].token_ids.tolist().count(2) for i in range(3)] == [1, 1, 1]


def test_prompts_become_the_ids_that_trl_gives_them(tokenizer):
    longer = [*CHAT, {"role": "assistant", "content": "w8"}, {"role": "user", "content": "w9"}]
    for prompts in (["w6 w7", "w9"], [CHAT, longer]):
        dataset = PromptDataset([{"prompt": prompt} for prompt in prompts], 20, tokenizer)
        ids = [dataset[index].token_ids.tolist() for index in range(2)]
        assert ids == trl_prompt_ids(tokenizer, prompts)
    assert ids[0] == [2, 3, 6, 7, 4]  # [BOS] <|user|> w6 w7 <|assistant|>


def trl_reward_arguments(function, inputs, completions, completion_ids):
    """TRL 1.16's own call of a reward function; returns the rewards that it reads from it."""
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu", is_main_process=False),
        args=SimpleNamespace(report_to=[]),
        state=SimpleNamespace(global_step=3), environments=None, async_loop=None,
        reward_funcs=[function], reward_processing_classes=[None], reward_func_names=["judge"],
        _log_completion_extra=None, _log_metric=None,
    )  # fmt: skip
    prompts = [row["prompt"] for row in inputs]
    return trl().GRPOTrainer._calculate_rewards(
        trainer, inputs, prompts, completions, completion_ids
    )


def test_reward_functions_see_chats_as_in_trl(tokenizer):
    seen, of_ours = [], []

    def judge(prompts, completions, completion_ids, **others):
        others = {name: x for name, x in others.items() if not name.startswith("log_")}
        of_ours.append(others.pop("is_target", None))  # which TRL does not tell
        seen.append((prompts, completions, completion_ids, others))
        return [1.0, 2, torch.tensor(3.0)]

    rows = [{"prompt": CHAT, "answer": 3}, {"prompt": CHAT[:1] * 2, "answer": 4}]
    prompts = PromptDataset(rows, 20, tokenizer)
    examples, ids = [prompts[0], prompts[1]], [[6, 7, 1], [8], [9, 1]]
    packed = [torch.tensor(row) for row in ids]
    rollout = Rollout(
        batch=pack_groups([e.token_ids for e in examples], [packed[:2], packed[2:]]),
        group_ids=torch.tensor([0, 0, 1]),
        ended=torch.tensor([True, False, True]),
        logprobs=torch.zeros(6),
    )
    state = SimpleNamespace(global_step=3)
    scores = RewardScorer(judge)(examples, rollout, prompts, 1, trainer_state=state)

    contents = tokenizer.batch_decode(ids, skip_special_tokens=True)
    completions = [[{"role": "assistant", "content": content}] for content in contents]
    inputs = [rows[0], rows[0], rows[1]]
    of_trl = trl_reward_arguments(judge, inputs, completions, ids)
    assert seen[0] == seen[1] and of_ours == [[[True] * len(row) for row in ids], None]
    assert seen[0][1][0] == [{"role": "assistant", "content": "w6 w7"}]
    assert scores.totals.tolist() == of_trl[:, 0].tolist() == [1, 2, 3]


def test_texts_and_chats_may_stand_in_one_dataset(tokenizer):
    seen = {}
    prompts = PromptDataset([CHAT, {"prompt": "w9", "answer": 3}], 20, tokenizer)
    examples = [prompts[0], prompts[1]]
    packed = [[torch.tensor([8])], [torch.tensor([9, 1])]]
    rollout = Rollout(
        batch=pack_groups([example.token_ids for example in examples], packed),
        group_ids=torch.tensor([0, 1]),
        ended=torch.tensor([False, True]),
        logprobs=torch.zeros(3),
    )
    scorer = RewardScorer(lambda **arguments: seen.update(arguments) or [0.0] * 2)
    scorer(examples, rollout, prompts, 1)
    assert seen["prompts"] == [CHAT, "w9"] and seen["answer"] == [None, 3]
    assert seen["completions"] == [[{"role": "assistant", "content": "w8"}], "w9"]


def test_arguments_of_the_chat_template(tokenizer):
    options = {"suffix": " w19", "add_generation_prompt": False}
    dataset = PromptDataset([CHAT], 20, tokenizer, chat_template_kwargs=options)
    assert dataset[0].token_ids.tolist() == [2, 3, 6, 7, 19]
    assert dataset[0].prompt == CHAT and dataset[0].is_chat


def test_chats_without_a_template_are_errors(plain_tokenizer):
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=plain_tokenizer)
    with pytest.raises(ValueError, match=r"dataset\[0\], got chat_template=None"):
        PromptDataset([CHAT], 20, bare)[0]
    with pytest.raises(ValueError, match=r"with apply_chat_template .* dataset\[0\], got Tokeniz"):
        PromptDataset([CHAT], 20, plain_tokenizer)[0]
    with pytest.raises(ValueError, match=r"with apply_chat_template .* got NoneType"):
        PromptDataset([{"prompt": CHAT}], 20)[0]


def test_a_prompt_that_is_too_long_is_an_error_and_not_cut(tokenizer):
    dataset = PromptDataset(["w6 w7", "w6 w7 w8", CHAT], 20, tokenizer, max_prompt_tokens=3)
    assert dataset[0].token_ids.tolist() == [2, 6, 7]
    for index, count in ((1, 4), (2, 5)):
        with pytest.raises(
            ValueError, match=rf"max_prompt_tokens = 3 tokens in dataset\[{index}\], got {count}"
        ):
            dataset[index]
    with pytest.raises(ValueError, match="max_prompt_tokens >= 1, got 0"):
        PromptDataset(["w6"], 20, tokenizer, max_prompt_tokens=0)


@pytest.mark.parametrize(
    "dataset",
    [
        [torch.tensor([1, 2]), torch.tensor([0])],
        [[1, 2], [0]],
        [{"prompt": torch.tensor([1, 2])}, {"prompt": [0]}],
        [{"prompt": torch.tensor([1, 2]).numpy()}],
        torch.tensor([[1, 2], [0, 0]]),
    ],
)
def test_ids_are_taken_as_they_are(dataset):
    example = PromptDataset(dataset, 3)[0]
    assert example.token_ids.tolist() == example.prompt == [1, 2]
    assert example.token_ids.dtype == torch.int64


def test_tables_of_other_libraries(tokenizer):
    datasets, pandas = pytest.importorskip("datasets"), pytest.importorskip("pandas")
    columns = {"prompt": ["w6", "w7"], "answer": [1.5, 2.5], "level": ["a", "b"]}
    chats = {"prompt": [CHAT, [*CHAT, {"role": "user", "content": "w8"}]]}
    for make in (datasets.Dataset.from_dict, lambda x: pandas.DataFrame(x, index=[5, 9])):
        dataset = PromptDataset(make(columns), 20, tokenizer)
        assert len(dataset) == 2
        assert dataset[1].prompt == "w7" and dataset[1].columns == {"answer": 2.5, "level": "b"}
        dataset = PromptDataset(make(chats), 20, tokenizer)
        assert [dataset[i].prompt for i in range(2)] == chats["prompt"]
        assert dataset[1].token_ids.tolist() == [2, 3, 6, 7, 3, 8, 4]
    assert PromptDataset(pandas.Series(["w6", "w7"]), 20, tokenizer)[1].prompt == "w7"


class Letters:
    """The least that a tokenizer has to have."""

    def encode(self, text):
        return [ord(c) - ord("a") for c in text]

    def decode(self, ids):
        return "".join(chr(i + ord("a")) for i in ids)


@pytest.mark.parametrize(
    "entry, error, message",
    [
        ("", ValueError, r"P >= 1 in dataset\[0\], got \(0,\).*BOS"),
        ([], ValueError, r"P >= 1 in dataset\[0\], got \(0,\)"),
        (torch.tensor([[1]]), ValueError, r"got \(1, 1\)"),
        (torch.tensor([1.0]), TypeError, "an int64 tensor or a list of ids, got torch.float32"),
        (3.5, TypeError, "got float"),
        ([{"content": "hi"}], TypeError, 'got list.*messages a "role" each'),
        ([1, 3], ValueError, r"ids in \[0, 3\) in dataset\[0\], got ids from 1 to 3"),
        ([-1], ValueError, "got ids from -1 to -1"),
        ({"text": "a"}, ValueError, r"""to have "prompt", got columns \['text'\]"""),
    ],
)
def test_bad_entries_are_errors(entry, error, message):
    with pytest.raises(error, match=message):
        PromptDataset([entry], 3, Letters())[0]


def test_text_without_a_tokenizer_is_an_error():
    with pytest.raises(ValueError, match=r"expected tokenizer for the text in dataset\[0\]"):
        PromptDataset(["a"], 3)[0]


def test_empty_and_endless_datasets_are_errors():
    with pytest.raises(ValueError, match="expected dataset with at least one prompt, got none"):
        PromptDataset([], 3)
    with pytest.raises(TypeError, match=r"with len\(\) and whole-number indices, got generator"):
        PromptDataset((x for x in [[1]]), 3)
    with pytest.raises(TypeError, match="an entry for each prompt, got a dict of prompt, answer"):
        PromptDataset({"prompt": [[1], [2]], "answer": ["a", "b"]}, 3)


def test_order_is_a_function_of_seed_and_epoch():
    order = PromptOrder(50, 0)
    forward = [order(position) for position in range(100)]
    assert sorted(forward[:50]) == sorted(forward[50:]) == list(range(50))
    assert forward[:50] != forward[50:]
    again = PromptOrder(50, 0)
    assert [again(position) for position in (99, 0, 60)] == [forward[i] for i in (99, 0, 60)]
    assert [PromptOrder(50, 1)(position) for position in range(50)] != forward[:50]


def test_what_is_digested_tells_contents_apart():
    rows = [
        {"prompt": "a", 1: 2, "b": {(1, 2): 3}},  # keys that JSON does not know, or cannot sort
        {"prompt": "a", 1: 2, "b": {(1, 2): 4}},
        {"prompt": torch.tensor([1, 2])},
        {"prompt": torch.tensor([1, 3])},
    ]
    assert len({canonical(row) for row in rows}) == 4
    assert canonical(rows[2]) == canonical({"prompt": [1, 2]}) == b'{"prompt": [1, 2]}'
    assert canonical({"x": {1}}) == canonical({"x": {2}})
