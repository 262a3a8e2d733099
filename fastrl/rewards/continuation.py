"""How well a completion continues its prompt, token by token, against the true continuation."""

import codecs
import math
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from fastrl.rewards._texts import prompt_text

# Longer runs of word characters are cut, so that a token never costs more than a long word.
_WORD = re.compile(r"\w{1,64}")
STRETCH_WORDS = 15  # about what a completion has


class ContinuationReward:
    """The rise, token by token, of a score of the text so far.

        score(text) = F1(words, reference words) − (c_r · repeats + c_s · strange pairs) / n

    F1 = 2 · common / (words + reference words) is over bags of words, case ignored. A word weighs
    −log of the share of stretches of the training text that it stands in, so a word that stands
    nearly everywhere counts next to nothing, and one that says what the text is about counts most.
    `repeats` counts three words in a row that stood in the prompt or the completion
    before; `strange pairs` counts two words in a row that the training text never has, which is
    what lists of words are made of. What the reference has is neither. n is the number of words
    of the reference. The true continuation scores 1, and nothing scores more; empty text scores
    0; a word said again and again, a copy of the prompt and a list of frequent words score about
    0 or less.

    The text so far leaves out a character whose bytes are not complete; its last word counts as
    it stands, and makes a strange pair as soon as no known pair begins like it. Words are runs
    of letters, digits and underscores: text that does not separate words is not scored well.

    Args:
        token_bytes: the bytes of every token id (`byte_level_token_bytes`); b"" adds no text.
        texts: the training text, from which words get their weights and pairs are known.
        repetition_penalty: c_r.
        strangeness_penalty: c_s.
        name: what metrics call it.
    Raises:
        ValueError: a penalty is negative or not finite.
    """

    def __init__(
        self,
        token_bytes: Sequence[bytes],
        texts: Iterable[str],
        *,
        repetition_penalty: float = 0.5,
        strangeness_penalty: float = 0.25,
        name: str = "continuation",
    ) -> None:
        self.__name__ = name
        for penalty, value in (
            ("repetition_penalty", repetition_penalty),
            ("strangeness_penalty", strangeness_penalty),
        ):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(
                    f"ContinuationReward: expected {penalty} finite and >= 0, got {value}. "
                    "Pass 0 to leave this penalty out."
                )
        self.token_bytes = token_bytes
        self.repetition_penalty = repetition_penalty
        self.strangeness_penalty = strangeness_penalty
        counts: Counter[str] = Counter()  # of the stretches that a word stands in
        num_stretches = 0
        pairs: set[str] = set()
        for text in texts:
            words = _words(text)
            pairs.update(map(" ".join, zip(words, words[1:], strict=False)))
            for start in range(0, len(words), STRETCH_WORDS):
                counts.update(set(words[start : start + STRETCH_WORDS]))
                num_stretches += 1
        # Half a stretch more for every word: one that is never seen has a finite weight, and one
        # that is always seen a positive one.
        self._weights = {
            word: math.log((num_stretches + 1) / (count + 0.5)) for word, count in counts.items()
        }
        self._unseen_weight = math.log((num_stretches + 1) / 0.5)
        self._pairs = sorted(pairs)  # sorted, to find those that begin with an unfinished word

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        *,
        reference: Sequence[str | None],
        **columns: Any,
    ) -> list[list[float] | None]:
        """Rewards of a batch.

        Args:
            prompts: text, chat messages or token ids; one for each completion.
            completions: not read; the ids say the same, and where each token ends.
            completion_ids: token ids of each completion, EOS included.
            reference: the true continuation of each prompt; None: no opinion.
        Returns:
            One float per completion id; each list sums to the score of the whole completion. None
            where there is no reference.
        Raises:
            ValueError: lengths disagree, or an id has no bytes.
            TypeError: a prompt or a reference is something else.
        """
        if not len(prompts) == len(completion_ids) == len(reference):
            raise ValueError(
                "ContinuationReward: expected prompts, completion_ids and reference of the same "
                f"length, got {len(prompts)}, {len(completion_ids)} and {len(reference)}. "
                'Give every prompt of the dataset a column "reference".'
            )
        rewards: list[list[float] | None] = []
        truths: dict[tuple[str, str], _Reading] = {}  # completions of one prompt share theirs
        for prompt, ids, true_text in zip(prompts, completion_ids, reference, strict=True):
            if true_text is None:
                rewards.append(None)
                continue
            if not isinstance(true_text, str):
                raise TypeError(
                    "ContinuationReward: expected reference of texts or None, got "
                    f"{type(true_text).__name__}. Give every prompt one true continuation."
                )
            text = self._text(prompt)
            truth = truths.get((text, true_text)) or self._truth(text, true_text)
            truths[text, true_text] = truth
            scores = [0.0, *self._scores(_Reading(self, text, truth), ids)]
            rewards.append([b - a for a, b in zip(scores, scores[1:], strict=False)])
        return rewards

    def scores(self, prompt: Any, completion_ids: Sequence[int], reference: str) -> list[float]:
        """The score of the completion after each of its tokens; prompt is text, or token ids."""
        text = self._text(prompt)
        return self._scores(_Reading(self, text, self._truth(text, reference)), completion_ids)

    def overlap(self, prompt: Any, completion_ids: Sequence[int], reference: str) -> float:
        """The F1 of a whole completion, without the penalties."""
        text = self._text(prompt)
        reading = _Reading(self, text, self._truth(text, reference))
        for piece in self._pieces(completion_ids):
            reading.read(piece)
        return reading.overlap()

    def weight(self, word: str) -> float:
        """−log of the share of stretches of the training text with this word, in nats."""
        return self._weights.get(word, self._unseen_weight)

    def knows_pair(self, pair: str, *, unfinished: bool = False) -> bool:
        """Whether the training text has these two words in a row, or words that begin so."""
        at = bisect_left(self._pairs, pair)
        if at == len(self._pairs):
            return False
        return self._pairs[at].startswith(pair) if unfinished else self._pairs[at] == pair

    def _text(self, prompt: Any) -> str:
        is_text = isinstance(prompt, str) or any(isinstance(x, Mapping) for x in prompt)
        return prompt_text(prompt) if is_text else "".join(self._pieces(prompt))

    def _truth(self, prompt: str, reference: str) -> "_Reading":
        truth = _Reading(self, prompt)
        truth.read(reference)
        truth.close()
        return truth

    def _scores(self, reading: "_Reading", completion_ids: Sequence[int]) -> list[float]:
        scores = []
        for piece in self._pieces(completion_ids):
            reading.read(piece)
            scores.append(reading.score())
        return scores

    def _pieces(self, token_ids: Iterable[int]) -> Iterator[str]:
        """The characters that each token completes."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token_id in token_ids:
            index = int(token_id)
            if not 0 <= index < len(self.token_bytes):
                raise ValueError(
                    f"ContinuationReward: expected token ids in [0, {len(self.token_bytes)}), got "
                    f"{index}. Build token_bytes from the tokenizer that the model uses."
                )
            yield decoder.decode(self.token_bytes[index])


class _Reading:
    """A text read piece by piece, and its score so far; each piece costs its own length."""

    def __init__(
        self, reward: ContinuationReward, prompt: str, truth: "_Reading | None" = None
    ) -> None:
        self.reward = reward
        self.truth = truth
        self.words: Counter[str] = Counter()
        self.pairs: set[str] = set()
        self.triples: Counter[tuple[str, ...]] = Counter()
        self.weight = self.common = self.penalty = 0.0
        words = _words(prompt)
        # A completion may go on with the prompt's last word.
        self.open = words.pop() if words and _WORD.fullmatch(prompt[-1:]) else ""
        self.prompt_open = self.open
        self.last = tuple(words[-2:])
        context = words + [self.open] if self.open else words
        self.prompt_triples = set(zip(context, context[1:], context[2:], strict=False))

    def read(self, piece: str) -> None:
        """Take in more text."""
        text = self.open + piece
        self.open = ""
        for match in _WORD.finditer(text):
            if match.end() == len(text):
                self.open = match.group()
            else:
                self._finish(match.group())

    def close(self) -> None:
        """The text ends: its last word is finished."""
        if self.open:
            self._finish(self.open)
            self.open = ""

    def score(self) -> float:
        """The score of what was read, its last word as it stands."""
        assert self.truth is not None
        penalty = self.penalty + self._unfinished()[2]
        return self.overlap() - penalty / max(1, self.truth.words.total())

    def overlap(self) -> float:
        """The F1 in it."""
        assert self.truth is not None
        weight, common, _ = self._unfinished()
        both = self.weight + weight + self.truth.weight
        return 2.0 * (self.common + common) / both if both else 0.0

    def _unfinished(self) -> tuple[float, float, float]:
        """What the last word adds while it may still grow."""
        if self.open == self.prompt_open:  # nothing, or a word of the prompt
            return 0.0, 0.0, 0.0
        return self._gain(self.open.casefold(), unfinished=True)

    def _finish(self, run: str) -> None:
        word = run.casefold()
        if run != self.prompt_open:  # the prompt's own last word is no word of the completion
            weight, common, penalty = self._gain(word)
            self.weight += weight
            self.common += common
            self.penalty += penalty
            self.words[word] += 1
            if self.last:
                self.pairs.add(f"{self.last[-1]} {word}")
            self.triples[self._triple(word)] += 1
        self.prompt_open = ""
        self.last = (*self.last, word)[-2:]

    def _gain(self, word: str, *, unfinished: bool = False) -> tuple[float, float, float]:
        """What one more word adds to the weight, the common weight and the penalty."""
        weight = self.reward.weight(word)
        if self.truth is None:
            return weight, 0.0, 0.0
        common = weight if self.words[word] < self.truth.words[word] else 0.0
        penalty = 0.0
        triple = self._triple(word)
        seen = len(triple) == 3 and (triple in self.prompt_triples or self.triples[triple] > 0)
        if seen and self.triples[triple] >= self.truth.triples[triple]:
            penalty += self.reward.repetition_penalty
        if self.last and not self._has_pair(f"{self.last[-1]} {word}", unfinished):
            penalty += self.reward.strangeness_penalty
        return weight, common, penalty

    def _triple(self, word: str) -> tuple[str, ...]:
        return (*self.last, word)

    def _has_pair(self, pair: str, unfinished: bool) -> bool:
        assert self.truth is not None
        if pair in self.truth.pairs or self.reward.knows_pair(pair, unfinished=unfinished):
            return True
        return unfinished and any(known.startswith(pair) for known in self.truth.pairs)


def _words(text: str) -> list[str]:
    return [word.casefold() for word in _WORD.findall(text)]
