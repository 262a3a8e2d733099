"""`fastrl <command> ...`: finds the command's module and hands it the rest."""

import importlib.util
import os
import sys
from typing import NoReturn

COMMANDS = {
    "info": "versions, what is available, and which implementation of each op runs where",
    "train": "train a language model as a recipe says, or on a text (the demo)",
    "sample": "completions of a model, with their log-probabilities",
    "eval": "rewards, entropy and KL of a model on prompts, with intervals",
    "label": "people's judgements of completions: pairs, ratings, live; agreement and export",
    "report": "one HTML page with a run's curves, samples and settings",
    "bench": "time the ops beside other libraries, correctness first",
}


def usage() -> str:
    lines = "\n".join(f"  {name:<8} {summary}" for name, summary in COMMANDS.items())
    return f"usage: fastrl <command> [options]\n\n{lines}\n\n`fastrl <command> --help` tells more."


def run() -> NoReturn:
    """The program: `main` of its arguments, and out."""
    status = main()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # torch's threads for several processes may abort an interpreter that comes down in order.
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        os._exit(status)
    sys.exit(status)


def main(argv: list[str] | None = None) -> int:
    """Exit status: the command's own; 2 for one that does not exist, or lacks a package; 1 where
    standard output cannot be written: without a word where its reader has gone, as `| head` does.
    """
    args = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # no text ends a run that the terminal cannot show
            stream.reconfigure(errors="replace")
    try:
        status = _run(args)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except ImportError as error:
        return _without(error, args[0])
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the end
        return 1
    except OSError as error:
        print(f"fastrl: expected to read and write what it needs, got {error}.", file=sys.stderr)
        return 1


def _without(error: ImportError, command: str) -> int:
    """Say which extra has the package that is missing; raise the error if none has, or if what is
    missing is something in a package that is there, as in one of another version."""
    from fastrl.cli.info import OPTIONAL

    module = (error.name or "").partition(".")[0]
    package = module.replace("_", "-")
    if module and importlib.util.find_spec(module) is not None:
        raise error
    extra = next((extra for extra, packages in OPTIONAL.items() if package in packages), None)
    if extra is not None:
        message = f'expected the package {package}, got none. pip install "fastrl[{extra}]"'
        print(f"fastrl {command}: {message}", file=sys.stderr)
    elif ": expected " in str(error):  # ours
        print(error, file=sys.stderr)
    else:
        raise error
    return 2


def _run(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if args else 2
    if args[0] == "--version":
        from fastrl import __version__

        print(f"fastrl {__version__}")
        return 0
    if args[0] not in COMMANDS:
        known = ", ".join(COMMANDS)
        print(f"fastrl: expected a command ({known}), got {args[0]}.\n{usage()}", file=sys.stderr)
        return 2
    module = importlib.import_module(f"fastrl.cli.{args[0]}")
    return module.main(args[1:])
