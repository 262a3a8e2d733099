"""`fastrl bench`: the benchmarks of the checkout that this install comes from."""

import importlib
import sys
from pathlib import Path

import fastrl

USAGE_ERROR = 2


def main(argv: list[str]) -> int:
    """bench/ stands beside fastrl/ in a checkout, and is not part of an installed package."""
    root = Path(fastrl.__file__).parents[1]
    if not (root / "bench" / "command.py").is_file():
        print(
            f"bench: expected the folder bench/ beside {root / 'fastrl'}, got none. Benchmarks "
            "need a checkout: clone the repository and `pip install --no-build-isolation -e .`",
            file=sys.stderr,
        )
        return USAGE_ERROR
    sys.path.insert(0, str(root))
    return importlib.import_module("bench.command").main(argv)
