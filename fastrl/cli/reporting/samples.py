"""Tables of samples: before and after beside each other, and the last ones of training."""

from collections.abc import Iterator, Sequence
from typing import Any

from fastrl.cli.reporting.evaluations import pair_samples
from fastrl.cli.reporting.numbers import escape, is_number, number
from fastrl.cli.reporting.run_data import RunData

MOST_PAIRS, MOST_ROWS = 24, 8  # of a table; evenly from all where there are more
LONG = 900  # characters; what comes after them is folded away
_FIXED = ("step", "prompt", "completion", "reward", "reference")


def held_out_table(run: RunData) -> str:
    """The same held-out prompts before and after training; nothing where there are none."""
    pairs = pair_samples(run.before.get("samples") or [], run.after.get("samples") or [])
    if not pairs:
        return ""
    shown = _evenly(pairs, MOST_PAIRS)
    rows = "".join(_pair_row(before, after) for before, after in shown)
    has_after = any(after is not None for _, after in pairs)
    return _table(
        f"Held-out prompts, before and after{_how_many(shown, pairs)}"
        + ("" if has_after else " (the run has not been evaluated after training yet)"),
        ("Prompt", "Before", "After"),
        rows,
        "pairs",
    )


def training_table(run: RunData) -> str:
    """The last table of samples.jsonl; nothing where there is none."""
    if not run.samples:
        return ""
    step = run.samples[-1]["step"]
    last = [sample for sample in run.samples if sample["step"] == step]
    shown = _evenly(last, MOST_ROWS)
    parts = list(dict.fromkeys(k for s in shown for k in s if k not in _FIXED))
    rows = "".join(_training_row(sample, parts) for sample in shown)
    return _table(
        f"Training, step {step:g}{_how_many(shown, last)}",
        ("Prompt", "Completion", "Reward"),
        rows,
        "training",
    )


def _table(caption: str, heads: Sequence[str], rows: str, kind: str) -> str:
    cells = "".join(f'<th scope="col">{head}</th>' for head in heads)
    return (
        f'<table class="samples {kind}"><caption>{caption}</caption>'
        f"<thead><tr>{cells}</tr></thead><tbody>{rows}</tbody></table>"
    )


def _pair_row(before: dict[str, Any] | None, after: dict[str, Any] | None) -> str:
    one = after if before is None else before
    assert one is not None
    reference = one.get("reference")
    truth = "" if reference is None else f'<p class="part">Reference</p>{_texts(reference)}'
    rewards = [sample["reward"] for sample in (before, after) if sample and "reward" in sample]
    change = ""
    if len(rewards) == 2 and all(map(is_number, rewards)):
        difference = rewards[1] - rewards[0]
        arrow = "▲" if difference > 0 else "▼" if difference < 0 else "="
        change = f' <span class="change">{arrow} {number(difference, "+")}</span>'
    return (
        f'<tr><th scope="row" data-head="Prompt">{_content(one.get("prompt"))}{truth}</th>'
        f'<td data-head="Before">{_sample(before)}</td>'
        f'<td data-head="After">{_sample(after, change)}</td></tr>'
    )


def _sample(sample: dict[str, Any] | None, change: str = "") -> str:
    if sample is None:
        return '<p class="none">–</p>'
    reward = ""
    if is_number(sample.get("reward")):
        reward = f'<p class="reward">reward {number(sample["reward"])}{change}</p>'
    elif "reward" in sample:
        reward = '<p class="reward">no reward</p>'
    return reward + _content(sample.get("completion"))


def _training_row(sample: dict[str, Any], parts: Sequence[str]) -> str:
    names = ["reward", *parts]
    items = "".join(
        f"<div><dt>{escape(name.removeprefix('rewards/'))}</dt>"
        f"<dd>{_value(sample.get(name))}</dd></div>"
        for name in names
        if name in sample
    )
    return (
        f'<tr><th scope="row" data-head="Prompt">{_content(sample.get("prompt"))}</th>'
        f'<td data-head="Completion">{_content(sample.get("completion"))}</td>'
        f'<td data-head="Reward"><dl class="parts">{items}</dl></td></tr>'
    )


def _value(value: Any) -> str:
    return number(value) if value is None or is_number(value) else escape(value)


def _texts(reference: Any) -> str:
    """A reference, or several."""
    many = reference if isinstance(reference, list) else [reference]
    return "".join(_content(text) for text in many)


def _content(value: Any) -> str:
    """A text, or a chat's messages with who says them."""
    if isinstance(value, list) and value and all(isinstance(m, dict) for m in value):
        return "".join(
            f'<p class="part">{escape(message.get("role", "message"))}</p>'
            f"{_text(message.get('content', ''))}"
            for message in value
        )
    return _text("" if value is None else value)


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else str(value)
    if not text:
        return '<p class="none">(empty)</p>'
    if len(text) <= LONG:
        return f'<div class="text" dir="auto">{_lines(text)}</div>'
    cut = text.rfind(" ", LONG // 2, LONG) + 1 or LONG
    return (
        f'<div class="text" dir="auto">{_lines(text[:cut])}</div>'
        f"<details><summary>{len(text) - cut:,} more characters</summary>"
        f'<div class="text" dir="auto">{_lines(text[cut:])}</div></details>'
    )


def _lines(text: str) -> str:
    """Escaped, each line's end visible."""
    return "".join(_marked(text.replace("\r\n", "\n").split("\n")))


def _marked(lines: Sequence[str]) -> Iterator[str]:
    for index, line in enumerate(lines):
        yield escape(line)
        if index < len(lines) - 1:
            yield '<span class="newline" aria-hidden="true">↵</span>\n'


def _evenly(rows: Sequence[Any], most: int) -> list[Any]:
    count = min(most, len(rows))
    return [rows[index * len(rows) // count] for index in range(count)]


def _how_many(shown: Sequence[Any], rows: Sequence[Any]) -> str:
    return "" if len(shown) == len(rows) else f" ({len(shown)} of {len(rows):,}, evenly chosen)"
