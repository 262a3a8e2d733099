import random
import unicodedata

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fastrl.cli.recipes.models import load_tokenizer
from fastrl.rewards.token_pieces import TokenPieces

TEXTS = [
    "The cat sat on the mat. It's a naïve cat, isn't it? Do not touch!",
    "Zwei Hunde laufen über die Straße, 3.5 km weit; 中文字符 und 🙂🙂.",
    "a man in an orange hat is starring at something , and he 's happy ...",
] * 3


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [AddedToken("<eos>", special=True)]
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def metaspace() -> Tokenizer:
    """As Llama's: the first space goes, characters that are not known are bytes."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{b:02X}>": 3 + b for b in range(256)}}
    for text in TEXTS:
        for word in text.split():
            for token in ("▁" + word, *("▁" + word)):
                if token.isascii() or token.startswith("▁"):
                    vocab.setdefault(token, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def word_piece() -> Tokenizer:
    words = {word for text in TEXTS for word in text.replace(".", " . ").split()}
    pieces = sorted(words | set("abcdeé") | {"##" + c for c in "abcdeé中"} | set(".,!?'"))
    vocab = {"[UNK]": 0, "[SEP]": 1, **{piece: i for i, piece in enumerate(pieces, 2)}}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[SEP]"])
    return tokenizer


class Spaced:
    """A decoder of our own that does nothing special, without special tokens."""

    def decode(self, ids: list[int]) -> str:
        return "-".join(map(str, ids))


MAKERS = {
    "byte level": byte_level,
    "metaspace": metaspace,
    "word piece": word_piece,
    "byte level, transformers": lambda: PreTrainedTokenizerFast(
        tokenizer_object=byte_level(), eos_token="<eos>"
    ),
    "metaspace, transformers": lambda: PreTrainedTokenizerFast(
        tokenizer_object=metaspace(), bos_token="<s>", eos_token="</s>"
    ),
    "spaces tidied up, transformers": lambda: PreTrainedTokenizerFast(
        tokenizer_object=word_piece(), sep_token="[SEP]", clean_up_tokenization_spaces=True
    ),
    "bytes": lambda: load_tokenizer("bytes"),
    "our own": Spaced,
}


@pytest.fixture(scope="module", params=MAKERS)
def tokenizer(request):
    return MAKERS[request.param]()


def size_of(tokenizer) -> int:
    if isinstance(tokenizer, Tokenizer):
        return tokenizer.get_vocab_size()
    return 50 if isinstance(tokenizer, Spaced) else len(tokenizer)


def decode(tokenizer, ids):
    options = {} if isinstance(tokenizer, Spaced) else {"skip_special_tokens": True}
    return tokenizer.decode(ids, **options)


def test_pieces_make_up_the_text_of_any_ids(tokenizer):
    random.seed(0)
    pieces, size = TokenPieces(tokenizer), size_of(tokenizer)
    for length in [0, 1, 2, 3] * 10 + [20] * 40:
        ids = [random.randrange(size) for _ in range(length)]
        cut = pieces(ids)
        assert len(cut) == length
        assert "".join(cut) == decode(tokenizer, ids)


def sensible_ids(tokenizer, name: str) -> list[int]:
    """Ids without bytes that are no characters, of which byte-level ones are full."""
    if name.startswith("byte"):
        text = random.choice(TEXTS)
        encoded = tokenizer.encode(text[random.randrange(len(text)) :][:12])
        return list(getattr(encoded, "ids", encoded))
    whole = [i for i in range(size_of(tokenizer)) if "\ufffd" not in decode(tokenizer, [i])]
    return [random.choice(whole) for _ in range(8)]


@pytest.mark.parametrize("name", MAKERS)
def test_a_piece_is_what_the_prefix_has_more(name):
    """Where the text of every prefix is the beginning of the text, as most decoders have it."""
    random.seed(1)
    tokenizer = MAKERS[name]()
    pieces, num_compared = TokenPieces(tokenizer), 0
    for _ in range(60):
        ids = sensible_ids(tokenizer, name)
        prefixes = [decode(tokenizer, ids[:end]).rstrip("\ufffd") for end in range(len(ids) + 1)]
        if all(prefixes[-1].startswith(prefix) for prefix in prefixes):
            rises = [b[len(a) :] for a, b in zip(prefixes, prefixes[1:], strict=False)]
            assert pieces(ids) == rises
            num_compared += 1
    assert num_compared >= 30


def test_a_character_stands_with_the_token_that_completes_it():
    tokenizer = load_tokenizer("bytes")
    pieces = TokenPieces(tokenizer)
    ids = tokenizer.encode("é字🙂a")
    assert pieces(ids) == ["", "é", "", "", "字", "", "", "", "🙂", "a"]
    eos = tokenizer.eos_token_id
    assert pieces([*ids[:4], eos, eos]) == ["", "é", "", "\ufffd", "", ""]  # cut short
    assert pieces([ids[2], *tokenizer.encode("ab")]) == ["", "\ufffda", "b"]


def test_special_tokens_have_no_text_wherever_they_stand():
    tokenizer = metaspace()
    hat, man = tokenizer.token_to_id("▁hat"), tokenizer.token_to_id("▁man")
    assert TokenPieces(tokenizer)([1, hat, man, 2, man]) == ["", "hat", " man", "", " man"]


def test_a_token_that_changes_the_one_before_has_what_is_new_of_both():
    class Composing:
        def decode(self, ids):
            return unicodedata.normalize("NFC", "".join(map(chr, ids)))

    pieces = TokenPieces(Composing())
    assert pieces([ord(c) for c in "xa\u0308y"]) == ["x", "", "\u00e4", "y"]


def test_long_completions_are_decoded_a_few_times():
    class Counting:
        def __init__(self):
            self.tokenizer, self.num_ids = load_tokenizer("bytes"), 0
            self.all_special_ids = self.tokenizer.all_special_ids

        def decode(self, ids, skip_special_tokens=False):
            self.num_ids += len(ids)
            return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    counting = Counting()
    ids = counting.tokenizer.encode("The naïve cat sat on the 字. " * 200)
    assert "".join(TokenPieces(counting)(ids)) == "The naïve cat sat on the 字. " * 200
    assert counting.num_ids < 10 * len(ids)


def test_a_tokenizer_is_needed():
    with pytest.raises(TypeError, match="expected tokenizer with a method decode"):
        TokenPieces("gpt2")
