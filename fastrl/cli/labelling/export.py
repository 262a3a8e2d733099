"""`fastrl label --export`: preferences for training, by majority."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastrl.cli.training.run_folder import write_atomically
from fastrl.rewards._items import read_pairs
from fastrl.rewards._judgements import choices_of, read_answers


def export(output: Path, pairs: Path, judgements: Sequence[Path]) -> str:
    """Write {"prompt", "chosen", "rejected", "votes"} for each pair that somebody judged.

    The choice with more votes than any other stands. Where there is none, or it is the tie, the
    row has "tie": true and the file's a as "chosen". "votes" counts {"chosen", "rejected",
    "tie"}.

    Returns:
        What was written, for people.
    Raises:
        ValueError: `output` is one of the inputs, or a judgement is of no pair in the file.
        OSError: a file cannot be read or written.
    """
    if output.resolve() in [path.resolve() for path in (pairs, *judgements)]:
        raise ValueError(
            f"label: expected --export a file of its own, got {output}, which is read too. "
            "Write --export PREFERENCES.jsonl PAIRS.jsonl JUDGEMENTS.jsonl."
        )
    rows = {row["id"]: row for row in read_pairs(pairs)}
    votes = {item: Counter(row.values()) for item, row in choices_of(read_answers(*judgements))}
    strange = [item for item in votes if item not in rows]
    if strange:
        raise ValueError(
            f"label: expected judgements of the pairs in {pairs}, got one of {strange[0]}. "
            "Pass the file that was judged."
        )
    chosen = [_row(row, votes[item]) for item, row in rows.items() if votes.get(item)]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in chosen]
    write_atomically(output, "".join(lines).encode(errors="backslashreplace"))
    ties = sum("tie" in row for row in chosen)
    unanimous = sum(sum(count > 0 for count in row["votes"].values()) == 1 for row in chosen)
    return (
        f"{len(chosen)} of {len(rows)} pairs written to {output}: {len(chosen) - ties} with a "
        f"preference, {ties} ties; {unanimous} unanimous. {len(rows) - len(chosen)} without a "
        "judgement were left out."
    )


def _row(pair: Mapping[str, Any], votes: Mapping[str, int]) -> dict[str, Any]:
    counts = {choice: votes.get(choice, 0) for choice in ("a", "b", "tie")}
    most = max(counts.values())
    winners = [choice for choice, count in counts.items() if count == most]
    winner = winners[0] if len(winners) == 1 else "tie"
    chosen, rejected = ("b", "a") if winner == "b" else ("a", "b")
    row: dict[str, Any] = {
        "prompt": pair["prompt"],
        "chosen": pair[chosen],
        "rejected": pair[rejected],
    }
    if winner == "tie":
        row["tie"] = True
    numbers = {"chosen": counts[chosen], "rejected": counts[rejected], "tie": counts["tie"]}
    return {**row, "votes": numbers}
