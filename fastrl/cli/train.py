"""`fastrl train`: a run that a recipe describes, or the demo: a language model of a text.

`fastrl train RECIPE.toml` is `fastrl.cli.recipes.command`; without a recipe it is the demo, here.
"""

import hashlib
import importlib.util
import json
import signal
import sys
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # these need the extra packages, whose absence main reports first
    from rich.console import Console
    from tokenizers import Tokenizer

    from fastrl.cli.training.corpus import Splits
    from fastrl.cli.training.interruption import StopRequest
    from fastrl.cli.training.run_folder import RunFolder
    from fastrl.cli.training.settings import TrainSettings
    from fastrl.cli.training.stages import Run

EXTRAS = ("tokenizers", "safetensors", "rich", "matplotlib", "tyro")


def main(argv: list[str]) -> int:
    """Exit status: 0 finished, or stopped by SIGTERM with all saved; 130 the same by Ctrl-C;
    1 training broke down, 2 bad input.
    """
    missing = [name for name in EXTRAS if importlib.util.find_spec(name) is None]
    if missing:
        return _fail(
            f"train: expected the packages {', '.join(EXTRAS)}, got no {', '.join(missing)}. "
            'Install them with: pip install "fastrl[train]"'
        )
    if _is_of_recipe(argv):
        from fastrl.cli.recipes import command

        return command.main(argv)
    import tyro

    from fastrl.cli.recipes.toml import RecipeError
    from fastrl.cli.training.corpus import CorpusError
    from fastrl.cli.training.interruption import StopRequest
    from fastrl.cli.training.run_folder import RunFolderError
    from fastrl.cli.training.settings import SettingsError, TrainSettings
    from fastrl.cli.training.workers import Workers

    if (workers := Workers()).started > 1:
        message = (
            f"train: expected one process for the demo, got {workers.started}, each of which would "
            "begin the run. Start it without torchrun; several processes train as a recipe says: "
            "torchrun --nproc-per-node 2 -m fastrl train RECIPE.toml"
        )
        return _fail(message) if workers.is_first else 2
    stop = StopRequest()
    try:
        if argv in (["--help"], ["-h"]):
            from fastrl.cli.recipes import command

            print(f"{command.parser().format_help()}\n\nWithout a recipe, the demo:\n")
        settings = tyro.cli(TrainSettings, args=argv, prog="fastrl train")
        settings.check()
        with stop.listening():
            return _train(settings, stop)
    except SystemExit as error:  # of tyro: --help, or an option that it does not know
        return error.code if isinstance(error.code, int) else 2
    except (CorpusError, RecipeError, RunFolderError, SettingsError) as error:
        return _fail(str(error))
    except FloatingPointError as error:
        return _fail(str(error), status=1)
    except BrokenPipeError:  # of standard output
        raise
    except OSError as error:  # a full disk, a folder that may not be written to
        return _fail(f"train: expected to read and write the run's files, got {error}.", status=1)
    except KeyboardInterrupt:  # the second one: the first waits for the step to end
        return _fail("train: stopped at once. The last checkpoint stands: --resume the run.", 130)


def _is_of_recipe(argv: list[str]) -> bool:
    """The demo has options alone, none of them --set, and its folders have no recipe.toml."""
    first = argv[0] if argv else "-"
    options = [option.partition("=") for option in argv]
    resumed = [value for name, _, value in options if name == "--resume" and value]
    resumed += [value for name, value in pairwise(argv) if name == "--resume"]
    return (
        not first.startswith("-")
        or any(name == "--set" for name, _, _ in options)
        or any(value.endswith(".toml") for name, value in pairwise(argv) if name != "--corpus")
        or any((Path(folder) / "recipe.toml").is_file() for folder in resumed)
    )


def _train(settings: "TrainSettings", stop: "StopRequest") -> int:
    from rich.console import Console

    from fastrl.cli.console import say
    from fastrl.cli.training.interruption import Interrupted
    from fastrl.cli.training.learning_curve import learning_curve
    from fastrl.cli.training.report import show_report
    from fastrl.cli.training.run_folder import write_atomically
    from fastrl.cli.training.stages import STEP_TIMING

    console = Console(highlight=False)
    with ExitStack() as stack:
        run = _prepared_run(settings, stop, console, stack)
        folder = run.folder
        try:
            if STEP_TIMING in run.results:
                say(console, f"The run in {folder.path} is finished; this is its result.")
            else:
                run.go_on()
        except Interrupted as error:
            print(
                f"\nStopped by {error} in {run.stage}. Everything is saved; go on with: "
                f"fastrl train --resume {folder.path}",
                file=sys.stderr,
            )
            return 0 if error.signal_number == signal.SIGTERM else 128 + error.signal_number
        write_atomically(folder.curve, learning_curve(run.log.records, run.results))
        show_report(console, run.results, run.data)
        say(console, f"\nThe run, its learning curve and its checkpoints are in {folder.path}")
    return 0


def _prepared_run(
    settings: "TrainSettings", stop: "StopRequest", console: "Console", stack: ExitStack
) -> "Run":
    """A run that is new, or stands where it was left; its folder is locked until `stack` ends."""
    import torch

    import fastrl.ops
    import fastrl.reference
    from fastrl.cli.console import say
    from fastrl.cli.recipes.device import find_device
    from fastrl.cli.training.run_folder import MetricsLog, RunFolder, path_of_now
    from fastrl.cli.training.stages import Run
    from fastrl.cli.training.text_data import prepare
    from fastrl.rewards import ContinuationReward

    torch.set_num_threads(settings.threads)
    device = find_device(settings.device, "--device")
    if settings.resume is not None:
        folder = RunFolder.open(settings.resume)
        stack.enter_context(folder.lock())
        config = folder.read_json(folder.config)
        settings = settings.resumed(config.get("settings"))
    splits = _load_splits(settings)
    facts = _facts(splits)
    tokenizer = None
    if settings.resume is not None:
        _check_text(folder, config.get("corpus"), facts)
        tokenizer = _read_tokenizer(folder)
    tokenizer = tokenizer or _train_tokenizer(splits, settings)
    data = prepare(splits, tokenizer, settings)
    if settings.resume is None:  # nothing is written before the input is known to be good
        folder = RunFolder.create(settings.output or path_of_now())
        stack.enter_context(folder.lock())
        folder.write_json(folder.config, {"settings": settings.to_json(), "corpus": facts})
    if not folder.tokenizer.exists():
        folder.write_json(folder.tokenizer, json.loads(tokenizer.to_str()))

    say(
        console,
        f"{splits.name}: {facts['characters']['train']:,} characters to train on, "
        f"{facts['characters']['held_out']:,} held out; {tokenizer.get_vocab_size()} tokens; "
        f"run folder {folder.path}",
    )
    reward = ContinuationReward(
        data.token_bytes,
        splits.train,
        repetition_penalty=settings.repetition_penalty,
        strangeness_penalty=settings.strangeness_penalty,
    )
    return Run(
        settings=settings,
        data=data,
        reward=reward,
        folder=folder,
        log=MetricsLog(folder.metrics),
        results=folder.read_json(folder.results) if folder.results.exists() else {},
        ops=fastrl.ops if settings.ops == "fastrl" else fastrl.reference,
        device=device,
        console=console,
        stop=stop,
    )


def _load_splits(settings: "TrainSettings") -> "Splits":
    from fastrl.cli.training.corpus import load_splits

    return load_splits(
        settings.corpus,
        seed=settings.seed,
        held_out_fraction=settings.held_out_fraction,
        max_characters=settings.max_characters,
    )


def _facts(splits: "Splits") -> dict[str, Any]:
    """What config.json says of the text; a resume needs the very same."""
    parts = {
        "train": splits.train,
        "validation": splits.validation,
        "held_out": splits.held_out,
    }
    text = json.dumps(parts, ensure_ascii=False)
    return {
        "name": splits.name,
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "characters": {name: sum(map(len, blocks)) for name, blocks in parts.items()},
    }


def _check_text(folder: "RunFolder", saved: Any, facts: dict[str, Any]) -> None:
    from fastrl.cli.training.run_folder import RunFolderError

    if saved != facts:
        raise RunFolderError(
            f"train: expected the text that the run in {folder.path} was started with, got "
            f"another under the name {facts['name']}. Put the old text back (with the default "
            "corpus: use the same Python and fastrl), or start a new run."
        )


def _train_tokenizer(splits: "Splits", settings: "TrainSettings") -> "Tokenizer":
    from fastrl.cli.training.text_data import train_tokenizer

    return train_tokenizer(splits.train, settings.vocab_size)


def _read_tokenizer(folder: "RunFolder") -> "Tokenizer | None":
    """None where the run was interrupted before it was written."""
    from tokenizers import Tokenizer

    from fastrl.cli.training.run_folder import RunFolderError

    if not folder.tokenizer.exists():
        return None
    document = json.dumps(folder.read_json(folder.tokenizer))
    try:
        return Tokenizer.from_str(document)
    except Exception as error:  # the library raises Exception itself
        raise RunFolderError(
            f"train: expected {folder.tokenizer} as this run wrote it, got {error}. Delete the "
            "file to have it made again, and resume again."
        ) from error


def _fail(message: str, status: int = 2) -> int:
    print(message, file=sys.stderr)
    return status
