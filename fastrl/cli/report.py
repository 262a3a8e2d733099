"""`fastrl report RUN`: one page of HTML with a run's curves, samples and settings."""

import argparse
import webbrowser
from pathlib import Path

_DESCRIPTION = """\
Write one HTML page about a run, or about several beside each other: what it gained on held-out
prompts, its curves, samples before and after, and its settings. The page needs no network and
nothing beside it. A run that is not finished, or was killed, has a page too.
"""


def main(argv: list[str]) -> int:
    """Exit status: 0; 1 where the page cannot be written, 2 for bad input."""
    from fastrl.cli.recipes.command import fail
    from fastrl.cli.recipes.toml import RecipeError
    from fastrl.cli.training.run_folder import RunFolderError

    try:
        return _report(parser().parse_args(argv))
    except SystemExit as error:  # of argparse
        return error.code if isinstance(error.code, int) else 2
    except (RecipeError, RunFolderError) as error:
        return fail(str(error).replace("train: ", "report: ", 1))
    except BrokenPipeError:  # of standard output
        raise
    except OSError as error:
        return fail(f"report: expected to read the runs and write the page, got {error}.", 1)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="fastrl report",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    result.add_argument("runs", nargs="+", metavar="RUN", help="a folder that fastrl train made")
    result.add_argument(
        "--output", metavar="FILE", help="the page; default: report.html in the first RUN"
    )
    result.add_argument("--open", action="store_true", help="show it in the browser")
    return result


def _report(options: argparse.Namespace) -> int:
    from fastrl.cli.reporting.page import page
    from fastrl.cli.reporting.run_data import read_runs
    from fastrl.cli.training.run_folder import write_atomically

    folders = [Path(name) for name in options.runs]
    runs = read_runs(folders)
    output = folders[0] if options.output is None else Path(options.output)
    if output.is_dir():
        output /= "report.html"
    write_atomically(output, page(runs).encode())
    print(f"The report is in {output}")
    if options.open:
        webbrowser.open(output.resolve().as_uri())
    return 0
