"""`fastrl train RECIPE.toml`: options, exit status, and what is said when something is wrong."""

import argparse
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from fastrl.cli.recipes import schema
from fastrl.cli.recipes.built_in import built_in
from fastrl.cli.recipes.toml import RecipeError

if TYPE_CHECKING:
    from fastrl.cli.training.interruption import StopRequest
    from fastrl.cli.training.workers import Workers

EPILOG = """\
The run's folder gets recipe.toml as it was resolved, versions.json, metrics.jsonl, samples.jsonl,
tensorboard/, results.json and checkpoint/, which loads in AutoModelForCausalLM where the model is
one of transformers; with [supervised] also supervised.jsonl and start/, the model and tokenizer
that the algorithm starts from. A preference model is in model/ instead, and begins again when it is
resumed.
SIGTERM and Ctrl-C let the step end and save; a second Ctrl-C stops at once.
torchrun --nproc-per-node 8 -m fastrl train RECIPE.toml does the run with several processes, each on
the GPU of its number; any number of them goes on with it. A signal to torchrun ends all of them
after the step, if that and its checkpoint take no longer than torchrun waits: 30 seconds, unless
its --shutdown-timeout says otherwise (newer versions have it). Its own exit status is 1 then; a
second Ctrl-C changes nothing.
A run that is resumed has to find the rows that it was begun with; that its held-out rows or its own
Python files have been changed since is said.

Exit status: 0 finished, or stopped by SIGTERM with everything saved; 130 the same by Ctrl-C;
1 training broke down; 2 bad input.

"""

_NO_READER = (
    "train: expected standard output to have a reader, got none any more. The last checkpoint "
    "stands: --resume the run."
)


def parser() -> argparse.ArgumentParser:
    """The options; --help says what a recipe is as well."""
    result = argparse.ArgumentParser(
        prog="fastrl train",
        description="Train a language model as a recipe says.",
        epilog=EPILOG + (schema.__doc__ or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    result.add_argument(
        "recipe", nargs="?", metavar="RECIPE", help=f"a .toml file, or {', '.join(built_in())}"
    )
    result.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="in place of the recipe's: --set train.learning_rate=1e-5; KEY= takes it "
        "out, a table too; as often as you like",
    )
    result.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="go on with the run in FOLDER, with its recipe; without FOLDER and with a RECIPE: "
        "go on with the run in --output, or start it where there is none",
    )
    result.add_argument(
        "--output", metavar="FOLDER", help="the run's, new or empty; default runs/<date and time>"
    )
    return result


def main(argv: list[str]) -> int:
    """Exit status as in EPILOG."""
    from fastrl.cli.training.interruption import Interrupted, StopRequest
    from fastrl.cli.training.run_folder import RunFolderError
    from fastrl.cli.training.workers import Workers
    from fastrl.trainers import ProcessFailedError, RewardFunctionError, checkpoint
    from fastrl.trainers._exchange import ConnectionLostError

    workers = Workers()
    stop = StopRequest(workers)

    def tell(message: str, status: int = 2) -> int:
        return fail(message, status) if workers.speaks else status

    try:
        with workers.said_once():
            options = parser().parse_args(argv)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 2
    try:
        _check(options)
        with workers.connected(), stop.listening(), workers.together():
            return _run(options, stop, workers)
    except ConnectionLostError as error:
        return fail(str(error), 1)
    except ProcessFailedError:  # there it is said
        return 1
    except SystemExit as error:  # of a reward function or builder: the run is not finished
        if isinstance(error.__context__, BrokenPipeError):  # rich's
            return tell(_NO_READER, 1)
        return tell(f"train: expected the recipe's code to return, got sys.exit({error.code}).", 1)
    except (RecipeError, RunFolderError) as error:
        return tell(str(error))
    except RewardFunctionError as error:
        cause = error.__cause__
        if isinstance(cause, Exception) and not explains(cause) and workers.speaks:
            traceback.print_exception(cause)
        return tell(str(error), 1)
    except Interrupted as error:
        status = 0 if error.signal_number == signal.SIGTERM else 128 + error.signal_number
        message = f"train: stopped by {error} before it began; nothing was changed."
        return fail(message, status) if workers.is_first else status
    except (ValueError, TypeError, FloatingPointError) as error:  # of the trainer
        if not explains(error):
            raise
        return tell(str(error), 1)
    except checkpoint.CheckpointError as error:
        return tell(str(error), 1)
    except BrokenPipeError:
        return tell(_NO_READER, 1)
    except OSError as error:  # a full disk, a folder that may not be written to
        return tell(f"train: expected to read and write the run's files, got {error}.", 1)
    except KeyboardInterrupt:  # the second one: the first waits for the step to end
        message = "train: stopped at once. The last checkpoint stands: --resume the run."
        return fail(message, 130) if workers.is_first else 130


def _check(options: argparse.Namespace) -> None:
    if options.recipe is None and not options.resume:
        raise RecipeError(
            "train: expected a RECIPE.toml, or --resume FOLDER, got neither. "
            "`fastrl train tiny_grpo` is a first one."
        )
    if options.output == "":
        raise RecipeError("train: expected --output FOLDER, got an empty text. Name a folder.")
    if options.resume == "" and options.output is None:
        raise RecipeError(
            "train: expected --output FOLDER beside --resume without a folder, got none. "
            "Name the run that may go on."
        )
    if options.resume and options.output is not None:
        raise RecipeError(
            f"train: expected --resume {options.resume} without --output, got {options.output}. "
            "A run goes on in its own folder."
        )


def _run(options: argparse.Namespace, stop: "StopRequest", workers: "Workers") -> int:
    from fastrl.cli.recipes.run import go_on, start

    if options.resume:
        return go_on(Path(options.resume), options.recipe, options.set, stop, workers)
    output = None if options.output is None else Path(options.output)
    if options.resume == "" and output is not None:
        is_begun = (output / "recipe.toml").is_file
        if workers.on_first("the run's folder", is_begun):
            return go_on(output, options.recipe, options.set, stop, workers)
    return start(options.recipe, options.set, output, stop, workers)


def explains(error: Exception) -> bool:
    """Whether a message is one of ours, so that nobody needs to see where it came from."""
    return isinstance(error, FloatingPointError) or ": expected " in str(error)


def fail(message: str, status: int = 2) -> int:
    """Say it on stderr; returns the status."""
    print(message, file=sys.stderr)
    return status
