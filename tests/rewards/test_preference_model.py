"""Values, scores and credit of preference models, and their folders."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from hf_models import VOCAB, build

from fastrl.models import ActorCritic, LSTMLanguageModel
from fastrl.rewards.preference import Calibration, PreferenceModel
from fastrl.rewards.preference.model import _end_token

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WORDS = ["[PAD]", "[EOS]", "[BOS]", "<user>", "<assistant>", *(f"w{i}" for i in range(5, 20))]
PROMPTS = [[1, 2, 3], [4], [1, 2, 3], [1, 2, 3], [4], [4]]
COMPLETIONS = [[5, 6, 7], [8], [5, 6], [5, 6, 7], [], [2, 2, 2, 2]]


def lora(model):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
    return get_peft_model(model, config)


BACKBONES = {
    "lstm": lambda: LSTMLanguageModel(VOCAB, 4, 6, 2),
    "llama": lambda: build("llama"),
    "gpt2": lambda: build("gpt2"),
    "lora": lambda: lora(build("llama")),
    "a critic of its own": lambda: ActorCritic(LSTMLanguageModel(VOCAB, 4, 5), build("llama")),
}


def made(kind="lstm", tokenizer=None, **options):
    torch.manual_seed(0)
    model = PreferenceModel(BACKBONES[kind](), tokenizer, **options)
    torch.nn.init.normal_(model.model.value_head.weight)
    torch.nn.init.constant_(model.model.value_head.bias, 0.5)
    return model


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="w5"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain.add_special_tokens(WORDS[:5])
    plain.post_processor = processors.TemplateProcessing(
        single="[BOS] $A", special_tokens=[("[BOS]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, chat_template=TEMPLATE,
        pad_token="[PAD]", eos_token="[EOS]", bos_token="[BOS]",
    )  # fmt: skip


@pytest.mark.parametrize("kind", BACKBONES)
def test_values_are_those_of_each_sequence_by_itself(kind):
    model = made(kind)
    with torch.no_grad():
        alone = [
            model.model(torch.tensor([prompt + ids]))[1][0, len(prompt) - 1 :]
            for prompt, ids in zip(PROMPTS, COMPLETIONS, strict=True)
        ]
    for max_tokens in (1 << 16, 1, 9):
        values = model.values(PROMPTS, COMPLETIONS, max_tokens=max_tokens)
        for got, expected, ids in zip(values, alone, COMPLETIONS, strict=True):
            assert got.dtype == torch.float64 and len(got) == len(ids) + 1
            torch.testing.assert_close(got.float(), expected, rtol=1e-5, atol=1e-5)
        scores = model.score(PROMPTS, COMPLETIONS, max_tokens=max_tokens)
        for score, value in zip(scores.tolist(), values, strict=True):
            assert math.fsum(value.diff().tolist()) == score  # exactly
    assert scores[4] == 0 and scores.abs().max() > 0.05


def test_a_prompt_and_a_completion_are_read_once(monkeypatch):
    model, seen = made(), []
    inner = model.trunk.packed_hidden

    def packed_hidden(batch):
        seen.append(batch.token_ids.tolist())
        return inner(batch)

    monkeypatch.setattr(model.trunk, "packed_hidden", packed_hidden)
    model.score(PROMPTS, COMPLETIONS)
    # One more token behind each completion.
    assert seen == [[1, 2, 3, 5, 6, 7, 0, 5, 6, 0, 4, 8, 0, 0, 2, 2, 2, 2, 0]]
    seen.clear()
    model.score(PROMPTS, COMPLETIONS, max_tokens=10)
    assert [len(ids) for ids in seen] == [10, 9]


def test_scoring_has_no_dropout_and_leaves_the_model_as_it_was():
    model = made("gpt2")
    model.trunk.model.config.resid_pdrop = 0.5
    for module in model.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    expected = model.score(PROMPTS, COMPLETIONS)
    model.model.train()
    modes = [module.training for module in model.model.modules()]
    assert torch.equal(model.score(PROMPTS, COMPLETIONS), expected)
    assert [module.training for module in model.model.modules()] == modes and all(modes)
    assert all(x.grad is None and x.requires_grad for x in model.model.parameters())


def test_a_temperature_divides_values_and_scores():
    model = made()
    before, values = model.score(PROMPTS, COMPLETIONS), model.values(PROMPTS, COMPLETIONS)
    model.calibration = Calibration(temperature=4.0)
    assert torch.equal(model.score(PROMPTS, COMPLETIONS), before / 4)
    assert torch.equal(model.values(PROMPTS, COMPLETIONS)[0], values[0] / 4)


def test_texts_and_messages_are_what_a_policy_reads_and_writes(tokenizer):
    model = made("lstm", tokenizer)
    chat = [{"role": "user", "content": "w6 w7"}]
    answer = [{"role": "assistant", "content": "w8 w9"}]
    encoder = model.encoder
    assert encoder.prompt("w6 w7") == (2, 6, 7) and encoder.prompt("[BOS] w6") == (2, 6)
    assert encoder.prompt(chat) == (2, 3, 6, 7, 4)
    assert encoder.completion("w8 w9") == encoder.completion(answer) == (8, 9, 1)
    assert encoder.completion([8, 9]) == (8, 9)
    got = model.score(["w6 w7", chat, torch.tensor([2, 6, 7])], ["w8 w9", answer, [8, 9, 1]])
    expected = model.score([[2, 6, 7], [2, 3, 6, 7, 4], [2, 6, 7]], [[8, 9, 1]] * 3)
    assert torch.equal(got, expected)
    plain = made("lstm", tokenizer._tokenizer)  # of the tokenizers library, without an EOS
    assert plain.encoder.completion("w8 w9") == (8, 9)
    assert plain.encoder.prompt("w8 w9") == (2, 8, 9)
    assert made("lstm", tokenizer, eos_token_id=None).encoder.completion("w8") == (8,)
    assert _end_token(None, SimpleNamespace(eos_token_id=[9, 1])) == 9  # of several the first


@pytest.mark.parametrize("kind", ["lstm", "lora", "a critic of its own"])
def test_a_saved_model_comes_back(kind, tokenizer, tmp_path):
    model = made(kind, tokenizer, eos_token_id=7)
    model.calibration = Calibration(temperature=2.5, offset=0.25, scale=3.0, pairs=9)
    model.save(tmp_path)
    again = PreferenceModel.load(tmp_path)
    assert again.calibration == model.calibration
    assert again.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert again.encoder.completion("w8") == (8, 7)
    assert torch.equal(again.score(PROMPTS, COMPLETIONS), model.score(PROMPTS, COMPLETIONS))
    texts = ["w6 w7"], ["w8 w9"]
    assert torch.equal(again.score(*texts), model.score(*texts))


class Digits:
    """A tokenizer that cannot be saved."""

    def encode(self, text):
        return [int(c) for c in text]


def test_a_tokenizer_that_cannot_be_saved_is_asked_for(tmp_path):
    model = made("lstm", Digits())
    model.save(tmp_path)
    with pytest.raises(ValueError, match="expected tokenizer, a Digits, for .* pass it again"):
        PreferenceModel.load(tmp_path)
    again = PreferenceModel.load(tmp_path, tokenizer=Digits())
    assert torch.equal(again.score(["12"], ["345"]), model.score([[1, 2]], [[3, 4, 5]]))


def test_a_saved_tokenizer_needs_its_package(tokenizer, tmp_path, monkeypatch):
    made(tokenizer=tokenizer).save(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="PreferenceModel: expected the package transformers"):
        PreferenceModel.load(tmp_path)


def test_a_broken_folder_is_an_error(tmp_path):
    model = made()
    with pytest.raises(ValueError, match="preference.json of a saved preference model"):
        PreferenceModel.load(tmp_path)
    model.save(tmp_path)
    (tmp_path / "value_head.safetensors").unlink()
    with pytest.raises(ValueError, match="expected a value head in .* got none"):
        PreferenceModel.load(tmp_path)
    for document, why in (
        ({"calibration": {}}, "KeyError: 'eos_token_id'"),
        ({"calibration": {"warmth": 1}}, "TypeError: .*'warmth'"),
        ([], "TypeError"),
    ):
        (tmp_path / "preference.json").write_text(json.dumps(document))
        with pytest.raises(ValueError, match=f"saved preference model, got {why}"):
            PreferenceModel.load(tmp_path)


def test_what_cannot_be_scored_is_an_error(tokenizer):
    model = made()
    two = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]
    for error, prompts, completions, message in (
        (ValueError, [[1]], [[1], [2]], "as many prompts as completions, got 1 and 2"),
        (ValueError, [[]], [[1]], "prompts of at least one token, got none"),
        (ValueError, [[1]], [[VOCAB]], rf"completions with ids in \[0, {VOCAB}\), got"),
        (ValueError, ["w5"], [[1]], "a tokenizer for prompts of text, got None"),
        (ValueError, [two], [[1]], "a tokenizer with a chat template"),
        (ValueError, [[1]], [two], "completions of one message each, got 2"),
        (TypeError, [[1]], [[1.5]], "text, chat messages or token ids, got list"),
        (TypeError, [3], [[1]], "text, chat messages or token ids, got int"),
    ):
        with pytest.raises(error, match=message):
            model.score(prompts, completions)
    with pytest.raises(TypeError, match='eos_token_id "auto", a whole number or None'):
        made("lstm", eos_token_id="end")
    with pytest.raises(TypeError, match="as_policy"):
        PreferenceModel(torch.nn.Linear(2, 2))
