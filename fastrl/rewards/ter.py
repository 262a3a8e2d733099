"""Translation edit rate as a reward."""

from typing import Any

from fastrl.rewards.metric import MetricReward, References, imported


class TER(MetricReward):
    """1 − TER of a completion, by `sacrebleu.sentence_ter`.

        reward = 1 − edits / words of the reference

    Edits are insertions, deletions and substitutions of words, and shifts of words in a row. The
    empty text gives 0, the reference 1; a text that is far too long gives less than 0. Of several
    references the fewest edits count, and their mean length. A further word may move every shift,
    so nothing of one prefix is kept for the next: with immediate=True the library is called on
    every prefix, which takes time as the square of the length and more.

    Args:
        normalized: tokenise as Tercom does.
        no_punct: leave punctuation out.
        asian_support: split Chinese and Japanese into characters, with normalized or no_punct.
        case_sensitive: do not lower the case.
        immediate, scale, reference, tokenizer, name, cache_size: as `MetricReward` has them.
    Raises:
        ImportError: the package sacrebleu is missing.  ValueError: as `MetricReward` does.
    Reference: Snover et al. 2006, https://aclanthology.org/2006.amta-papers.25.
    """

    def __init__(
        self,
        normalized: bool = False,
        no_punct: bool = False,
        asian_support: bool = False,
        case_sensitive: bool = False,
        *,
        immediate: bool = False,
        scale: float = 1.0,
        reference: str = "reference",
        tokenizer: Any = None,
        name: str = "ter",
        cache_size: int = 4096,
    ) -> None:
        library = imported("sacrebleu.metrics.ter", "TER").TER
        ter = library(normalized, no_punct, asian_support, case_sensitive)

        def score(text: str, references: References) -> float:
            return 1.0 - ter.sentence_score(text, references).score / 100

        super().__init__(
            score,
            immediate=immediate,
            scale=scale,
            reference=reference,
            tokenizer=tokenizer,
            name=name,
            cache_size=cache_size,
        )
