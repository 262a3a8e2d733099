"""Judging the items of a file, one after the other, and going on where one stopped."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

from fastrl.rewards._asking import Interview, Leave, Question, pair_question, rating_question
from fastrl.rewards._items import read_completions, read_pairs, texts_of
from fastrl.rewards._judgements import read_answers
from fastrl.rewards._record_file import RecordFile
from fastrl.rewards._terminal import Keys, Screen


def pair_questions(path: Path, annotator: str, seed: int) -> list[Question]:
    """Which is better, for each pair of a file; who sees which side is fixed by the seed."""
    sides = f"{seed} {annotator}"
    return [
        pair_question(row["id"], **texts_of(row, "prompt", "a", "b"), seed=sides)
        for row in read_pairs(path)
    ]


def rating_questions(path: Path, scale: tuple[int, int]) -> list[Question]:
    """How good it is, for each completion of a file."""
    return [
        rating_question(row["id"], **texts_of(row, "prompt", "completion"), scale=scale)
        for row in read_completions(path)
    ]


def shuffled(questions: Sequence[Question], seed: int) -> list[Question]:
    """In an order that depends on the seed alone."""
    result = list(questions)
    random.Random(seed).shuffle(result)
    return result


def judge(questions: Sequence[Question], output: Path, annotator: str) -> None:
    """Ask what the annotator has not judged in `output`, which is locked meanwhile.

    Raises:
        ValueError: the file is in use, or is none of judgements.
        OSError: it cannot be written.
    """
    with RecordFile(output, exclusive=True) as file, Keys() as keys:
        screen, answers = Screen(), read_answers(output)
        person = Interview(file, answers, annotator, keys, screen)
        leave_cleanly(lambda: person.run(questions), screen)
        done = sum(question.id in answers.of(annotator) for question in questions)
        rest = "" if done == len(questions) else " The same command goes on here."
        screen.say(f"{done} of {len(questions)} judged.{rest}")


def leave_cleanly(run: Callable[[], None], screen: Screen) -> None:
    """Run until it is done, the person quits, or there is nothing more to read."""
    try:
        run()
    except (Leave, EOFError):
        screen.say("")
