import pytest

from fastrl.rewards import byte_level_token_bytes

tokenizers = pytest.importorskip("tokenizers")


def test_the_bytes_of_a_text_s_tokens_are_the_text():
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<end>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the theme of the thesis"] * 5, trainer)
    pieces = byte_level_token_bytes(tokenizer.get_vocab(), ["<end>"])
    text = "The thème: naïve 字 🙂\n\ttheory\x00\x7f"
    assert b"".join(pieces[i] for i in tokenizer.encode(text).ids).decode() == text
    assert pieces[tokenizer.token_to_id("<end>")] == b""
    assert len({*pieces}) == tokenizer.get_vocab_size()


def test_a_vocabulary_that_is_not_byte_level_is_refused():
    with pytest.raises(ValueError, match="byte_level_token_bytes: expected vocab of a byte-level"):
        byte_level_token_bytes({"a": 0, "▁the": 1})
    assert byte_level_token_bytes({"a": 0, "▁": 2}, ["▁"]) == [b"a", b"", b""]
    assert byte_level_token_bytes({}) == []
