"""`fastrl eval MODEL`: what a model is worth on prompts, with intervals."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastrl.cli.sample import COLUMN_HELP, MODEL_HELP, check_limit

PROMPTS_AT_ONCE = 16
# Fields of a recipe's config that say how completions are sampled and rewarded.
OF_TRAINING = (
    "max_new_tokens", "temperature", "eos_token_id", "stop_strings", "max_prompt_tokens",
    "chat_template_kwargs", "precision", "max_rows", "micro_batch_tokens", "reward_timeout",
    "reward_errors",
)  # fmt: skip
_DESCRIPTION = """\
Rewards, entropy and KL of a model on prompts. Rewards and prompts are those of RECIPE (data.eval,
or else data.prompts), of the run that MODEL is, or --rewards and --data. Completions are sampled
as RECIPE says, or else as in the training of MODEL. Weights of rewards that follow a schedule, and
running statistics, are those of a start of a run.

An interval is mean ± 1.96 standard errors over prompts, each with the mean of its completions.
"""


def main(argv: list[str]) -> int:
    """Exit status: 0; 1 where a reward function raised, 2 for bad input."""
    from fastrl.cli.recipes.command import explains, fail
    from fastrl.cli.recipes.toml import RecipeError
    from fastrl.trainers import RewardFunctionError

    try:
        return _eval(parser().parse_args(argv))
    except SystemExit as error:  # of argparse
        return error.code if isinstance(error.code, int) else 2
    except RewardFunctionError as error:
        return fail(str(error), 1)
    except (RecipeError, ValueError, TypeError) as error:
        if not explains(error):
            raise
        return fail(str(error).replace("train: ", "eval: ", 1))
    except BrokenPipeError:  # of standard output
        raise
    except OSError as error:
        return fail(f"eval: expected to write the result, got {error}.", 1)


def parser() -> argparse.ArgumentParser:
    from fastrl.cli.recipes.sampled_as import add_sampling

    result = argparse.ArgumentParser(
        prog="fastrl eval",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    result.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    result.add_argument("recipe", nargs="?", metavar="RECIPE", help="as of fastrl train")
    result.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="as of fastrl train"
    )
    result.add_argument("--rewards", action="append", metavar="NAME", help="file.py:function")
    result.add_argument("--weights", type=float, nargs="+", help="one for each --rewards")
    result.add_argument("--data", metavar="FILE", help="prompts, as data.prompts of a recipe")
    result.add_argument("--column", help=COLUMN_HELP.format("--data"))
    result.add_argument("--split", help="of a dataset by name as --data")
    result.add_argument("--limit", type=int, help="the first so many prompts alone")
    result.add_argument("--reference", metavar="MODEL", help="whose KL divergence is measured")
    result.add_argument("-n", type=int, metavar="N", help="completions of each prompt; default 1")
    add_sampling(result)
    result.add_argument("--json", metavar="FILE", help="write the result there too")
    return result


def _eval(options: argparse.Namespace) -> int:
    from rich.console import Console

    from fastrl.cli.recipes.build import provided
    from fastrl.cli.recipes.data import load_data
    from fastrl.cli.recipes.loading import open_model
    from fastrl.cli.recipes.measure import measure, show_measured
    from fastrl.cli.recipes.rewards import load_reward_functions
    from fastrl.cli.recipes.toml import RecipeError
    from fastrl.trainers.loggers import finite

    _check(options)
    recipe = _recipe(options)
    if recipe is not None and recipe.is_preference:
        raise RecipeError(
            f"eval: expected a recipe of a policy, got {recipe.source} of a preference model. "
            "Its results.json has what it is worth."
        )
    entries, weights = _rewards(options, recipe)
    config, temperature = _config(options, recipe, weights)
    data = None if recipe is None else load_data(recipe)
    prompts = _prompts(options, recipe, data)
    how = {"tokenizer": options.tokenizer, "dtype": options.dtype, "device": options.device}
    policy, tokenizer = open_model(options.model, **how)
    functions = load_reward_functions(entries, provided(tokenizer, data))
    reference = None if options.reference is None else open_model(options.reference, **how)[0]
    result = measure(
        policy,
        functions,
        prompts,
        tokenizer=tokenizer,
        config=config,
        reference=reference,
        temperature=temperature,
        seed=options.seed,
    )
    result = {"model": options.model, **result}
    show_measured(Console(highlight=False), result)
    if options.json is not None:  # last: what cannot be written has been shown
        text = json.dumps(finite(result), indent=2, ensure_ascii=False, allow_nan=False)
        Path(options.json).write_text(text + "\n", encoding="utf-8")
    return 0


def _check(options: argparse.Namespace) -> None:
    """Raise a RecipeError for an option that nothing would look at, or that cannot be."""
    from fastrl.cli.recipes.prompts import is_dataset
    from fastrl.cli.recipes.toml import RecipeError

    for name, of in (("weights", "rewards"), ("column", "data"), ("split", "data")):
        if getattr(options, name) is not None and getattr(options, of) is None:
            raise RecipeError(
                f"eval: expected --{of} with --{name}, got none. A recipe's own are changed by "
                "--set."
            )
    if options.split is not None and not is_dataset(options.data):
        raise RecipeError(
            f"eval: expected --split with a dataset by name, got the file {options.data}."
        )
    if options.json is not None and not Path(options.json).absolute().parent.is_dir():
        raise RecipeError(
            f"eval: expected --json a file in a folder that is there, got {options.json}. Make "
            "the folder first."
        )
    check_limit(options, "eval")


def _recipe(options: argparse.Namespace) -> Any:
    """The recipe that is named, or that of the run that MODEL is; else None."""
    from fastrl.cli.recipes.built_in import find_recipe
    from fastrl.cli.recipes.loading import RECIPE
    from fastrl.cli.recipes.parse import read_recipe
    from fastrl.cli.recipes.toml import RecipeError

    if options.recipe is not None:
        return read_recipe(find_recipe(options.recipe), options.set)
    own = Path(options.model) / RECIPE
    if options.set and not own.is_file():
        raise RecipeError("eval: expected a RECIPE beside --set, got none. Pass one.")
    return read_recipe(own, options.set) if own.is_file() else None


def _rewards(options: argparse.Namespace, recipe: Any) -> tuple[list[Any], list[float] | None]:
    """The entries of rewards.functions, and their weights."""
    from fastrl.cli.recipes.toml import RecipeError

    if options.rewards is not None:
        return options.rewards, options.weights
    if recipe is None:
        raise RecipeError("eval: expected a RECIPE or --rewards NAME, got neither. Pass one.")
    return recipe.rewards.functions, recipe.rewards.weights


def _prompts(options: argparse.Namespace, recipe: Any, data: Any) -> Any:
    from fastrl.cli.recipes.prompts import load_prompts
    from fastrl.cli.recipes.sampled_as import column_of
    from fastrl.cli.recipes.toml import RecipeError

    if options.data is not None:
        own = column_of(options.model) if recipe is None else recipe.data.column
        return load_prompts(
            options.data,
            key="--data",
            column=options.column or own,
            limit=options.limit,
            split=options.split or "train",
        )
    if data is None:
        raise RecipeError("eval: expected a RECIPE or --data FILE, got neither. Pass one.")
    prompts = data.held_out or data.train
    return (
        prompts
        if options.limit is None
        else [prompts[i] for i in range(len(prompts))][: options.limit]
    )


def _config(
    options: argparse.Namespace, recipe: Any, weights: Sequence[float] | None
) -> tuple[Any, float]:
    """How completions are sampled, and the temperature: as options, recipe or training say."""
    from fastrl.cli.recipes.sampled_as import DEFAULTS, said, trained_with
    from fastrl.cli.recipes.schema import Eval
    from fastrl.trainers import PolicyGradientConfig

    settings = Eval() if recipe is None else recipe.eval
    of_training = trained_with(options.model) if recipe is None else recipe.config().to_dict()
    names = DEFAULTS if recipe is None else OF_TRAINING
    fields = {name: of_training[name] for name in names if name in of_training}
    fields, own = {**DEFAULTS, **fields}, said(options)
    temperature = own.pop("temperature", settings.temperature)
    temperature = fields["temperature"] if temperature is None else temperature
    fields |= own
    count = settings.completions_per_prompt if options.n is None else options.n
    config = PolicyGradientConfig(
        **fields,
        prompts_per_step=PROMPTS_AT_ONCE,
        completions_per_prompt=count,
        reward_weights=None if weights is None else tuple(weights),
    )
    return config, temperature
