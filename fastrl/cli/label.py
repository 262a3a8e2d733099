"""`fastrl label`: people's judgements of completions, in the terminal."""

import argparse
import getpass
import re
from pathlib import Path

_DESCRIPTION = """\
Judge completions: which of two is better, or a rating of each.

  fastrl label PAIRS.jsonl --output JUDGEMENTS.jsonl            {"id"?, "prompt", "a", "b"} a line
  fastrl label COMPLETIONS.jsonl --rate --output RATINGS.jsonl  {"id"?, "prompt", "completion"}
  fastrl label --live FOLDER           completions that a training's HumanReward(FOLDER) waits for
  fastrl label --agreement JUDGEMENTS.jsonl ...                 how far annotators agree
  fastrl label --export PREFERENCES.jsonl PAIRS.jsonl JUDGEMENTS.jsonl ...   majority, for training

Keys: a, b, t(ie) or a number; s skips, u takes the last answer back, q and Ctrl-C leave. Where
standard input is no terminal, a line is an answer. Each answer is on the disk before the next item
is shown, and the same command goes on where you left. The two sides change places at random;
what is written is in terms of the file's own a and b.
"""
_EPILOG = "Exit status: 0 done, or left with q; 130 left with Ctrl-C; 1 cannot write; 2 bad input."


def main(argv: list[str]) -> int:
    """Exit status as in the epilog."""
    from fastrl.cli.recipes.command import explains, fail

    try:
        return _run(parser().parse_args(argv))
    except SystemExit as error:  # of argparse
        return error.code if isinstance(error.code, int) else 2
    except BrokenPipeError:  # of standard output
        raise
    except FileNotFoundError as error:
        return fail(f"label: expected {error.filename} to be a file, got none. Check the path.")
    except OSError as error:
        return fail(f"label: expected to read and write the files, got {error}.", 1)
    except ValueError as error:
        if not explains(error):
            raise
        return fail(str(error).replace("judgements: ", "label: ", 1))
    except KeyboardInterrupt:
        return fail("\nlabel: stopped. Every answer is kept; the same command goes on.", 130)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="fastrl label",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    result.add_argument("files", nargs="*", type=Path, metavar="FILE", help="as above")
    kind = result.add_mutually_exclusive_group()
    kind.add_argument("--rate", action="store_true", help="rate completions")
    kind.add_argument("--live", type=Path, metavar="FOLDER", help="rate as a training samples")
    kind.add_argument("--agreement", action="store_true", help="between annotators")
    kind.add_argument("--export", type=Path, metavar="FILE", help="write preferences there")
    result.add_argument("--output", type=Path, metavar="FILE", help="appended to")
    result.add_argument("--annotator", metavar="NAME", help="default: the user's name")
    result.add_argument("--scale", metavar="LOW-HIGH", help="of --rate; default 1-5")
    result.add_argument("--shuffle", action="store_true", help="items in an order of --seed")
    result.add_argument("--seed", type=int, default=0, help="of the order and of the sides")
    return result


def _run(options: argparse.Namespace) -> int:
    _check(options)
    if options.agreement:
        from fastrl.cli.labelling.agree import report

        _expect(options, "at least one FILE of judgements", len(options.files) >= 1)
        print(report(options.files))
    elif options.export is not None:
        from fastrl.cli.labelling.export import export

        _expect(options, "PAIRS.jsonl and JUDGEMENTS.jsonl", len(options.files) >= 2)
        print(export(options.export, options.files[0], options.files[1:]))
    elif options.live is not None:
        from fastrl.cli.labelling.live import rate_live

        _expect(options, "--live without a FILE", not options.files)
        rate_live(options.live, _annotator(options))
    else:
        _judge(options)
    return 0


def _judge(options: argparse.Namespace) -> None:
    from fastrl.cli.labelling import session

    _expect(options, "one FILE to judge", len(options.files) == 1)
    if options.output is None:
        raise ValueError("label: expected --output FILE for the judgements, got none. Name one.")
    path, annotator = options.files[0], _annotator(options)
    questions = (
        session.rating_questions(path, _scale(options.scale or "1-5"))
        if options.rate
        else session.pair_questions(path, annotator, options.seed)
    )
    if options.shuffle:
        questions = session.shuffled(questions, options.seed)
    session.judge(questions, options.output, annotator)


def _check(options: argparse.Namespace) -> None:
    """Raise a ValueError for an option that nothing would look at."""
    asks = not (options.agreement or options.export)
    judges = asks and options.live is None
    for name, is_read in (
        ("scale", options.rate),
        ("annotator", asks),
        ("output", judges),
        ("shuffle", judges),
    ):
        if getattr(options, name) and not is_read:
            others = ("rate", "live", "agreement", "export")
            given = [f"--{other}" for other in others if getattr(options, other)]
            beside = given[0] if given else "pairs"
            raise ValueError(
                f"label: expected no --{name} with {beside}, got one. Leave it out: nothing reads "
                "it there."
            )


def _expect(options: argparse.Namespace, wanted: str, is_so: bool) -> None:
    if not is_so:
        got = " ".join(map(str, options.files)) or "none"
        raise ValueError(f"label: expected {wanted}, got {got}. See fastrl label --help.")


def _annotator(options: argparse.Namespace) -> str:
    if options.annotator is not None:
        return options.annotator
    try:
        return getpass.getuser()
    except (KeyError, OSError) as error:  # a container that knows no users
        raise ValueError(
            "label: expected --annotator NAME where the user has no name, got none. Pass it."
        ) from error


def _scale(text: str) -> tuple[int, int]:
    from fastrl.rewards._scale import checked_scale

    found = re.fullmatch(r"(-?\d+)-(-?\d+)", text)
    if found is None:
        raise ValueError(f"label: expected --scale LOW-HIGH as in 1-5, got {text}. Correct it.")
    return checked_scale([int(found[1]), int(found[2])], "label")
