"""What a run is, in a few words each."""

import math
from typing import Any

from fastrl.cli.reporting.numbers import fixed, is_number
from fastrl.cli.reporting.run_data import RunData


def steps_of(run: RunData) -> str:
    if run.total is None or run.step == run.total:
        return f"{run.step:,}"
    return f"{run.step:,} of {run.total:,}"


def time_of(run: RunData) -> float:
    """Seconds in steps, those of the supervised start too; evaluations are not in it."""
    records = [*run.records, *run.supervised]
    return math.fsum(r["time/step"] for r in records if is_number(r.get("time/step")))


def model_of(run: RunData) -> str:
    """In a few words."""
    model = run.recipe.get("model", {})
    if run.is_demo:
        return f"LSTM, hidden size {run.config.get('hidden_dim')}, warmed up on the text"
    for key in ("start", "path"):
        if model.get(key):
            return str(model[key])
    if model.get("lstm"):
        return f"LSTM from scratch ({_sizes(model['lstm'])})"
    random = dict(model.get("random") or {})
    return f"{random.pop('model_type', 'model')} from scratch ({_sizes(random)})"


def _sizes(fields: dict[str, Any]) -> str:
    names = {"hidden_size": "width {}", "hidden_dim": "width {}", "embed_dim": "embedding {}"}
    names |= {"num_hidden_layers": "{} layers", "num_layers": "{} layers"}
    found = [names[key].format(value) for key, value in fields.items() if key in names]
    return ", ".join(found) or "default sizes"


def data_of(run: RunData) -> str:
    data = run.recipe.get("data", {})
    for key in ("builder", "prompts", "pairs"):
        value = data.get(key)
        if isinstance(value, list):
            return f"{len(value)} prompts in the recipe"
        if value:
            return str(value)
    return "a text" if run.is_demo else "unknown"


def cross_validation_of(run: RunData) -> str:
    """What models that have not seen a pair's prompt say of it; nothing without them."""
    found = run.cross_validation
    keys = [f"eval/{key}" for key in ("accuracy", "accuracy_low", "accuracy_high")]
    if not all(is_number(found.get(key)) for key in keys):
        return ""
    mean, low, high = (fixed(found[key]) for key in keys)
    folds = len(found.get("folds", ()))
    return f"accuracy {mean} (95 % interval {low} to {high}) in {folds} folds"


def versions_of(run: RunData) -> str:
    """What the run was made with; nothing where it is not known."""
    parts = []
    for start in run.versions:
        commit = str(start.get("commit") or "")
        changed = ", changed" if commit.endswith("+") else ""
        of = f" ({commit[:12]}{changed})" if commit else ""
        others = ", ".join(f"{name} {start[name]}" for name in ("torch", "python") if name in start)
        since = f"from step {start['step']:g}: " if len(run.versions) > 1 else ""
        parts.append(f"{since}fastrl {start.get('fastrl')}{of}, {others}")
    return "; ".join(parts)


def interval(mean_and_half: tuple[float, float], sign: str = "") -> str:
    """A mean with its half-width, unless that is NaN."""
    mean, half = mean_and_half
    if math.isnan(half):
        return fixed(mean, sign)
    return f"{fixed(mean, sign)} ± {fixed(half)}"
