"""BLEU of a sentence, as the text grows."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastrl.rewards._lowercase import LowercaseReading
from fastrl.rewards._ngrams import Ngram, NgramMatches, count_ngrams
from fastrl.rewards.metric import MetricReward, Reading, References, imported

# White space before something else. "13a" joins what stands around "-\n", also when a "<skipped>"
# between the two is dropped: that line end does not separate.
_BOUNDARY = {
    "13a": re.compile(r"(?:[^\S\n]|(?<![->])\n)(?=\S)"),
    "none": re.compile(r"\s(?=\S)"),
    "char": re.compile(r"(?s)(?<=.)"),  # characters are tokens: each is final
}


class BLEU(MetricReward):
    """Sentence BLEU of a completion, in [0, 1]: `sacrebleu.sentence_bleu` divided by 100.

        BLEU = min(1, exp(1 − r/c)) · exp(mean over n of log p_n),   n = 1 … max_ngram_order

    p_n is the share of the n-grams that a reference has, each counted no more often than there;
    c and r are the lengths of the completion and of the reference that is nearest in length.

    With tokenize "13a", "none" and "char" a piece of text costs its own length and that of the word
    that it goes on with: white space separates tokens there whatever stands around it, but for a
    line end behind a hyphen, which "13a" drops (and then both lines are read as one word). Other
    tokenizers of sacrebleu ("intl", "zh", "spm", "flores200", ...) look at the whole text, and
    every prefix is tokenised anew; so is, with lowercase=True, a text with a Greek capital sigma.

    Args:
        smooth_method: what p_n = 0 becomes: "exp", "floor", "add-k" or "none".
        effective_order: leave out orders that a short completion does not have.
        tokenize: the name of one of sacrebleu's tokenizers.
        lowercase: ignore case.
        smooth_value: of "floor" and "add-k"; None: 0.1 and 1.
        max_ngram_order: longest n-gram.
        immediate, scale, reference, tokenizer, name, cache_size: as `MetricReward` has them.
    Raises:
        ValueError: no such smooth_method or tokenize, max_ngram_order below 1; and as
            `MetricReward` does.
        ImportError: the package sacrebleu, or one that the tokenizer needs, is missing.
    Reference: Papineni et al. 2002, P02-1040; smoothing: Chen and Cherry 2014, W14-3346; Post 2018.
    """

    def __init__(
        self,
        smooth_method: str = "exp",
        effective_order: bool = True,
        tokenize: str = "13a",
        lowercase: bool = False,
        smooth_value: float | None = None,
        max_ngram_order: int = 4,
        *,
        immediate: bool = False,
        scale: float = 1.0,
        reference: str = "reference",
        tokenizer: Any = None,
        name: str = "bleu",
        cache_size: int = 4096,
    ) -> None:
        library = imported("sacrebleu.metrics.bleu", "BLEU").BLEU
        for argument, value, known in (
            ("smooth_method", smooth_method, library.SMOOTH_DEFAULTS),
            ("tokenize", tokenize, library.TOKENIZERS),
        ):
            if value not in known:
                raise ValueError(
                    f"BLEU: expected {argument} one of {sorted(known)}, got {value!r}. "
                    "Leave it out for what sacrebleu takes."
                )
        if max_ngram_order < 1:
            raise ValueError(
                f"BLEU: expected max_ngram_order >= 1, got {max_ngram_order}. Leave it out for 4."
            )
        bleu = library(
            lowercase=lowercase,
            tokenize=tokenize,
            smooth_method=smooth_method,
            smooth_value=smooth_value,
            max_ngram_order=max_ngram_order,
            effective_order=effective_order,
        )
        super().__init__(
            _Metric(bleu, _BOUNDARY.get(tokenize)),
            immediate=immediate,
            scale=scale,
            reference=reference,
            tokenizer=tokenizer,
            name=name,
            cache_size=cache_size,
        )


@dataclass(frozen=True)
class _Target:
    """What is known of the references: their n-grams, the most in any of them, and lengths."""

    ngrams: Counter[Ngram]
    lengths: list[int]


@dataclass(frozen=True)
class _Metric:
    bleu: Any
    boundary: re.Pattern[str] | None  # up to the last match, tokens are final; None: nowhere

    def against(self, references: References) -> Callable[[], Reading]:
        ngrams: Counter[Ngram] = Counter()
        lengths = []
        for text in references:
            tokens = self.tokens((text.lower() if self.bleu.lowercase else text).rstrip())
            ngrams |= count_ngrams(tokens, self.bleu.max_ngram_order)
            lengths.append(len(tokens))
        target = _Target(ngrams, lengths)

        def begin() -> Reading:
            return _Reading(self, target)

        return (lambda: LowercaseReading(begin)) if self.bleu.lowercase else begin

    def tokens(self, text: str) -> list[str]:
        return self.bleu.tokenizer(text).split()

    def final(self, text: str) -> int:
        """How many of the characters have final tokens, whatever follows."""
        if self.boundary is None:
            return 0
        return max((match.end() for match in self.boundary.finditer(text)), default=0)

    def score(self, matches: Sequence[int], length: int, target: _Target) -> float:
        bleu = self.bleu
        nearest = min(target.lengths, key=lambda other: (abs(other - length), other))
        result = bleu.compute_bleu(
            correct=list(matches),
            total=[max(0, length - n) for n in range(bleu.max_ngram_order)],
            sys_len=length,
            ref_len=nearest,
            smooth_method=bleu.smooth_method,
            smooth_value=bleu.smooth_value,
            effective_order=bleu.effective_order,
            max_ngram_order=bleu.max_ngram_order,
        )
        return result.score / 100


class _Reading:
    def __init__(self, metric: _Metric, target: _Target) -> None:
        self._metric, self._target = metric, target
        self._matches = NgramMatches(target.ngrams, metric.bleu.max_ngram_order)
        self._num_tokens = 0
        self._open = ""  # text whose tokens may change

    def read(self, piece: str) -> None:
        self._open += piece
        final = self._metric.final(self._open)
        if final:
            tokens = self._metric.tokens(self._open[:final])
            self._matches.extend(tokens)
            self._num_tokens += len(tokens)
            self._open = self._open[final:]

    def score(self) -> float:
        # The library strips the end of the text, and what it leaves may be read otherwise.
        tokens = self._metric.tokens(self._open.rstrip())
        matches = self._matches.with_tokens(tokens)
        return self._metric.score(matches, self._num_tokens + len(tokens), self._target)
