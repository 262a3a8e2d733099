"""The text that each token id adds, whatever a tokenizer does with spaces and characters."""

import inspect
from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\ufffd"  # what decoders write for bytes that are no character, or not yet


class TokenPieces:
    """Cuts a decoded text into the pieces that its token ids complete.

        "".join(pieces(ids)) == tokenizer.decode(ids)

    Always; special tokens are skipped, with skip_special_tokens=True where `decode` has that
    argument, and have the piece "". A character whose bytes are spread over several tokens stands
    with the one that completes it; bytes at the end that are no character stand with the last
    token that is not special.

    Each id is decoded behind another one, once, and the result is kept; ids with parts of
    characters are decoded together. The whole is then compared with one decoding of all ids. Where
    a decoder does not work from token to token (one that tidies up the spaces of the whole text,
    say), every prefix is decoded instead, which costs the square of the number of ids: a piece is
    then what a prefix has of the final text beyond the prefixes before it.

    Args:
        tokenizer: has decode(ids) -> str: `tokenizers.Tokenizer`, transformers', or others.
    Raises:
        TypeError: it has no such method.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not callable(getattr(tokenizer, "decode", None)):
            raise TypeError(
                "TokenPieces: expected tokenizer with a method decode(ids), got "
                f"{type(tokenizer).__name__}. Pass the tokenizer that the trainer has."
            )
        self.tokenizer = tokenizer
        knows = "skip_special_tokens" in inspect.signature(tokenizer.decode).parameters
        self._options = {"skip_special_tokens": True} if knows else {}
        self._special = _special_ids(tokenizer) if knows else frozenset()
        self._first: dict[int, str] = {}  # by id, its text where nothing stands before it
        self._later: dict[int, str | None] = {}  # behind another id; None: parts of characters

    def __call__(self, ids: Sequence[int]) -> list[str]:
        """One piece per id.

        Raises:
            what `decode` raises for ids that it does not know.
        """
        ids = [int(token_id) for token_id in ids]
        text = self._decode(ids)
        pieces = self._token_by_token(ids)
        if pieces is None or "".join(pieces) != text:
            pieces = self._prefix_by_prefix(ids, text)
        return pieces

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, **self._options)

    def _token_by_token(self, ids: list[int]) -> list[str] | None:
        """Pieces of a decoder that looks at one token after the other; None: it does not."""
        pieces = [""] * len(ids)
        before: list[int] = []  # the last token of what is cut off already
        pending: list[int] = []  # tokens behind it that end within a character
        given = ""  # their text, what is complete of it
        last = 0
        for i, token_id in enumerate(ids):
            if token_id in self._special:
                continue
            last = i
            text = self._alone(token_id, before) if not pending else None
            if text is None:
                pending.append(token_id)
                text = self._behind(pending, before)
            complete = None if text is None else text.rstrip(_UNFINISHED)
            if complete is None or not complete.startswith(given):
                return None
            pieces[i] = complete[len(given) :]
            given = complete
            if complete == text:
                before, pending, given = [token_id], [], ""
        if pending:
            pieces[last] += (self._behind(pending, before) or "")[len(given) :]
        return pieces

    def _alone(self, token_id: int, before: list[int]) -> str | None:
        known: dict[int, Any] = self._later if before else self._first
        if token_id not in known:
            piece = self._behind([token_id], before)
            known[token_id] = None if piece is None or _UNFINISHED in piece else piece
        return known[token_id]

    def _behind(self, ids: list[int], before: list[int]) -> str | None:
        """The text of some ids behind another; None where they change the text of that one."""
        prefix, text = self._decode(before), self._decode(before + ids)
        return text[len(prefix) :] if text.startswith(prefix) else None

    def _prefix_by_prefix(self, ids: list[int], text: str) -> list[str]:
        pieces: list[str] = []
        done = 0
        for end in range(1, len(ids) + 1):
            prefix = text if end == len(ids) else self._decode(ids[:end]).rstrip(_UNFINISHED)
            common = max(done, _common_length(prefix, text))
            pieces.append(text[done:common])
            done = common
        return pieces


def _common_length(a: str, b: str) -> int:
    if b.startswith(a):
        return len(a)
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def _special_ids(tokenizer: Any) -> frozenset[int]:
    """Those that decoding skips: transformers' list, or the tokens that are marked so."""
    named = getattr(tokenizer, "all_special_ids", ())
    list_added = getattr(tokenizer, "get_added_tokens_decoder", dict)  # of `tokenizers`
    added = {**list_added(), **getattr(tokenizer, "added_tokens_decoder", {})}
    marked = (token_id for token_id, token in added.items() if token.special)
    return frozenset([*named, *marked])
