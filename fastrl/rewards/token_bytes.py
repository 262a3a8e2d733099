"""The bytes behind each token id: text can be decoded as it grows, token by token."""

from collections.abc import Collection, Mapping


def byte_level_token_bytes(
    vocab: Mapping[str, int], special_tokens: Collection[str] = ()
) -> list[bytes]:
    """The bytes of every token of a byte-level BPE vocabulary (GPT-2's alphabet).

    Args:
        vocab: token to id, as `tokenizers.Tokenizer.get_vocab()` gives it.
        special_tokens: tokens that stand for no text, such as the end of the text.
    Returns:
        One bytes object per id, from 0 to the largest; b"" for special tokens and unused ids.
    Raises:
        ValueError: a token has a character outside the byte-level alphabet.
    """
    byte_of = {char: byte for byte, char in enumerate(_byte_level_alphabet())}
    pieces = [b""] * (max(vocab.values(), default=-1) + 1)
    for token, token_id in vocab.items():
        if token in special_tokens:
            continue
        try:
            pieces[token_id] = bytes(byte_of[char] for char in token)
        except KeyError as error:
            raise ValueError(
                "byte_level_token_bytes: expected vocab of a byte-level BPE tokenizer, got token "
                f"{token!r}. Name it in special_tokens if it stands for no text."
            ) from error
    return pieces


def _byte_level_alphabet() -> list[str]:
    """The printable character that stands for each byte: itself, or the next one from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    alphabet, shifted = [], 256
    for byte in range(256):
        alphabet.append(chr(byte if byte in printable else shifted))
        shifted += byte not in printable
    return alphabet
