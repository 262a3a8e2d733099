"""Immediate rewards of metrics against their libraries called on every prefix.

    python -m bench.metric_rewards                          # 512 completions of 64 tokens
    python -m bench.metric_rewards --text train.de.gz       # a sentence a line

A completion is its reference with words replaced, left out and moved, as ids of a byte-level BPE
that is trained on the text. Ours is timed as a trainer calls it: from ids and texts to one reward
per id, with nothing cached before, the cutting of text into tokens included. The library is timed
on every prefix of a random part of the completions, scaled to all of them, without the decoding;
both score the same prefixes, and their greatest difference is printed. Each is the least of
several rounds, which take turns.
"""

import argparse
import gzip
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.environment import cpu_name
from bench.peers import version_of

Score = Callable[[str, str], float]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m bench.metric_rewards", description=__doc__.split("\n")[0]
    )
    p.add_argument("--completions", type=int, default=512)
    p.add_argument("--tokens", type=int, default=64, help="of a completion")
    p.add_argument("--subset", type=int, default=16, help="completions that the library scores")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--vocab", type=int, default=8192, help="of the BPE")
    p.add_argument("--text", type=Path, help="a sentence a line, also .gz; default: Python's docs")
    return p


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    random.seed(0)
    lines = read_lines(args.text)
    tokenizer = train_tokenizer(lines, args.vocab)
    ids, references = completions(lines, tokenizer, args.completions, args.tokens)
    texts = [tokenizer.decode(row) for row in ids]
    characters = sum(map(len, texts)) / len(texts)
    print(f"{cpu_name()}; sacrebleu {version_of('sacrebleu')}, rouge-score ", end="")
    print(f"{version_of('rouge-score')}; {len(ids)} completions x {args.tokens} tokens, ", end="")
    print(f"{characters:.0f} characters; library on {args.subset} of them, scaled\n")
    print("metric   ours s   library s   ratio   greatest difference")
    subset = random.sample(range(len(ids)), args.subset)
    for name, (make, library) in contestants().items():
        ours, theirs, given, expected = [], [], [], []
        for _ in range(args.rounds):
            reward = make(immediate=True, tokenizer=tokenizer)
            began = time.perf_counter()
            given = reward([""] * len(ids), texts, ids, reference=references)
            ours.append(time.perf_counter() - began)
            prefixes = [
                [text_before(tokenizer, ids[i], end) for end in ends(ids[i])] for i in subset
            ]
            began = time.perf_counter()
            expected = [
                [library(prefix, references[i]) for prefix in row]
                for i, row in zip(subset, prefixes, strict=True)
            ]
            theirs.append(time.perf_counter() - began)
        difference = greatest_difference([given[i] for i in subset], expected)
        scaled = min(theirs) * len(ids) / len(subset)
        ratio = scaled / min(ours)
        print(
            f"{name:8} {min(ours):6.3f} {scaled:11.2f} {ratio:7.1f} {difference:14.1e}", flush=True
        )


def contestants() -> dict[str, tuple[Callable[..., Any], Score]]:
    """Ours, and the library's score of a text against a reference, in [0, 1]."""
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    from fastrl.rewards.bleu import BLEU
    from fastrl.rewards.chrf import ChrF
    from fastrl.rewards.rouge import ROUGE

    def of_sacrebleu(metric: Any) -> Score:
        return lambda text, reference: metric.sentence_score(text, [reference]).score / 100

    def of_rouge(kind: str) -> Score:
        scorer = RougeScorer([kind])
        return lambda text, reference: scorer.score(reference, text)[kind].fmeasure

    return {
        "chrF": (ChrF, of_sacrebleu(sacrebleu.CHRF())),
        "chrF++": (lambda **k: ChrF(word_order=2, **k), of_sacrebleu(sacrebleu.CHRF(word_order=2))),
        "ROUGE-L": (ROUGE, of_rouge("rougeL")),
        "ROUGE-2": (lambda **k: ROUGE("rouge2", **k), of_rouge("rouge2")),
        "BLEU": (BLEU, of_sacrebleu(sacrebleu.BLEU(effective_order=True))),
    }


def read_lines(path: Path | None) -> list[str]:
    if path is None:
        from pydoc_data.topics import topics

        return [line for text in topics.values() for line in text.splitlines() if len(line) > 40]
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        return file.read().splitlines()


def train_tokenizer(lines: list[str], vocab_size: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(lines[:20_000], trainer)
    return tokenizer


def completions(
    lines: list[str], tokenizer: Any, count: int, length: int
) -> tuple[list[list[int]], list[str]]:
    """Ids of `count` completions, and their references of about the same length."""
    ids: list[list[int]] = []
    references = []
    while len(ids) < count:
        reference = ""
        while len(tokenizer.encode(reference).ids) < length:
            reference += (" " if reference else "") + random.choice(lines)
        completion = garbled(reference.split(), lines)
        row = tokenizer.encode(completion).ids[:length]
        if len(row) == length:
            ids.append(row)
            references.append(reference)
    return ids, references


def garbled(words: list[str], lines: list[str]) -> str:
    other = random.choice(lines).split()
    for _ in range(len(words) // 4):
        place = random.randrange(len(words))
        kind = random.randrange(3)
        if kind == 0:
            words[place] = random.choice(other)
        elif kind == 1:
            words.insert(random.randrange(len(words)), words.pop(place))
        else:
            words[place : place + 1] = [words[place], random.choice(other)]
    return " ".join(words)


def ends(row: list[int]) -> range:
    return range(1, len(row) + 1)


def text_before(tokenizer: Any, row: list[int], end: int) -> str:
    """The text of a prefix, without the beginning of a character unless the completion ends so."""
    text = tokenizer.decode(row[:end])
    return text if end == len(row) else text.rstrip("\ufffd")


def greatest_difference(given: list[list[float]], expected: list[list[float]]) -> float:
    greatest = 0.0
    for row, scores in zip(given, expected, strict=True):
        total = 0.0
        for rise, score in zip(row, scores, strict=True):
            total += rise
            greatest = max(greatest, abs(total - score))
    return greatest


if __name__ == "__main__":
    main()
