"""`fastrl label --agreement`: how far annotators agree."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from fastrl.rewards._judgements import choices_of, ratings_of, read_answers
from fastrl.rewards.agreement import (
    Estimate,
    Table,
    agreement_share,
    cohens_kappa,
    krippendorffs_alpha,
)


def report(paths: Sequence[Path]) -> str:
    """What people read: all annotators together, and each two of them.

    Raises:
        ValueError: choices and ratings are mixed, or no item was judged by two annotators.
    """
    answers = read_answers(*paths)
    level = "interval" if answers.is_rating else "nominal"
    judged = ratings_of(answers) if answers.is_rating else choices_of(answers)
    table: Table = [dict(row) for _, row in judged]
    names = sorted({name for row in table for name in row})
    if not any(len(row) > 1 for row in table):
        raise ValueError(
            "label: expected --agreement judgements of two annotators on the same items, got "
            f"those of {', '.join(names) or 'nobody'} with no item in common. Pass all the files."
        )
    given = sum(map(len, table))
    skipped = sum(map(len, answers.by_item.values())) - given
    lines = [
        f"{len(table)} items, {len(names)} annotators, {given} judgements; {skipped} skipped ones "
        "are left out.",
        f"agreement              {_shown(agreement_share(table))}",
        f"Krippendorff's alpha   {_shown(krippendorffs_alpha(table, level))}   {level}",
    ]
    for first, second in combinations(names, 2):
        both = [row for row in table if first in row and second in row]
        two = [{name: row[name] for name in (first, second)} for row in both]
        if not two:
            lines.append(f"{first}, {second}: no item in common")
            continue
        lines.append(
            f"{first}, {second}: {len(two)} items, agreement {_shown(agreement_share(two))}, "
            f"Cohen's kappa {_shown(cohens_kappa(two, first, second))}"
        )
    lines.append("Intervals of 95 %: bootstrap over items.")
    return "\n".join(lines)


def _shown(estimate: Estimate) -> str:
    """nan where it is not defined, as kappa is of two who always say the same."""
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
