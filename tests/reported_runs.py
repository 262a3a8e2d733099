"""Folders of runs as `fastrl train` leaves them, without training; and a strict reader of pages."""

import json
import math
import random
from html.parser import HTMLParser

RECIPE = """
algorithm = "{algorithm}"
seed = 7
[model]
tokenizer = "bpe"
random = {{model_type = "llama", hidden_size = 128, num_hidden_layers = 3}}
[data]
builder = "multi30k_translation"
[rewards]
functions = ["ChrF", "LengthReward"]
[train]
max_steps = {steps}
learning_rate = {learning_rate}
"""
ATTACK = "<script>alert('é')</script>\n</td></table><b onclick=\"x()\">&amp;\x00\x1b[31m"
PROMPTS = [
    "Two young men are playing football in a park.",
    "A woman in a red coat\nwaits for the bus.",
    "Children run along the beach.",
    "An old man reads a newspaper on a bench.",
]
REFERENCES = [
    "Zwei junge Männer spielen Fußball in einem Park.",
    "Eine Frau in einem roten Mantel\nwartet auf den Bus.",
    "Kinder laufen am Strand entlang.",
    "Ein alter Mann liest auf einer Bank eine Zeitung.",
]
EARLY = ["Zwei Männer in einem.", "Eine Frau Frau roten", "Kinder Kinder Strand", "Ein Mann."]
BEFORE, AFTER = [0.2, 0.3, 0.25, 0.1], [0.5, 0.45, 0.6, 0.3]
LATE = ["Zwei junge Männer spielen in einem Park.", "Eine Frau wartet auf den Bus.", ATTACK, ""]


def written_run(
    folder, *, steps=60, total=60, algorithm="ppo", learning_rate=2e-4, seed=0, gap=(20, 21)
):
    """A run with all that a report shows: critic, monitor with an alarm, supervised start."""
    folder.mkdir(parents=True)
    draw = random.Random(seed)
    recipe = RECIPE.format(algorithm=algorithm, steps=total, learning_rate=learning_rate)
    (folder / "recipe.toml").write_text(recipe)
    (folder / "config.json").write_text(json.dumps({"algorithm": algorithm, "max_steps": total}))
    records = [record_of(step, draw, gap) for step in range(1, steps + 1)]
    write_lines(folder / "metrics.jsonl", records)
    supervised = [
        {"step": s, "loss": 7 * math.exp(-s / 80) + draw.gauss(2, 0.05), "time/step": 0.1}
        | ({"validation_loss": 7 * math.exp(-s / 80) + 2.1} if s % 50 == 0 else {})
        for s in range(1, 201)
    ]
    write_lines(folder / "supervised.jsonl", supervised)
    before = evaluation(0, BEFORE, EARLY, kl=0.0)
    after = evaluation(steps, AFTER, LATE, kl=0.04)
    after["samples"].reverse()  # another order than before: they are paired by prompt
    results = {"before": before} | ({"after": after} if steps == total else {})
    (folder / "results.json").write_text(json.dumps(results))
    samples = [
        {"step": step, "prompt": PROMPTS[i % 4], "completion": f"{LATE[i % 4]} {step}"}
        | {"reward": 0.25 * i, "rewards/chrf": 0.2 * i, "rewards/length": None}
        for step in (20, 40)
        for i in range(4)
    ]
    write_lines(folder / "samples.jsonl", samples)
    return folder


def record_of(step, draw, gap):
    noise = draw.gauss
    rise = 1 - math.exp(-step / 20)
    chrf = 0.25 + 0.3 * rise + noise(0, 0.03)
    record = {
        "step": step,
        "rewards/chrf/mean": chrf,
        "rewards/length/mean": 0.5 + noise(0, 0.05),
        "reward": None if step in gap else chrf,
        "reward_std": 0.1 + abs(noise(0, 0.01)),
        "kl": 0.002 * step + abs(noise(0, 0.004)),
        "entropy": 3.1 - 0.02 * step + noise(0, 0.05),
        "completions/mean_length": 14 + 0.1 * step + noise(0, 0.6),
        "loss": noise(0, 1e-3),
        "grad_norm": abs(noise(0.8, 0.2)),
        "value_error": 0.2 * math.exp(-step / 15) + 0.02 + abs(noise(0, 0.004)),
        "explained_variance": rise * 0.8 + noise(0, 0.04),
        "time/step": 1.1 + abs(noise(0, 0.1)),
        "learning_rate": 2e-4 * min(1, step / 5),
        "bad_steps": 0,
    }
    if step % 5 == 0:
        record |= {
            "gold/gold": 0.3 + 0.012 * step - 0.00022 * step**2 + noise(0, 0.005),
            "gold/proxy": 0.3 + 0.3 * rise + noise(0, 0.005),
            "gold/gold_stderr": 0.012,
            "gold/proxy_stderr": 0.009,
            "gold/kl": 0.03 * step,
            "gold/entropy": 3.0 - 0.02 * step,
            "gold/p_value": 0.4 if step < 45 else 0.0012,
            "gold/threshold": 0.0071,
            "gold/alarm": float(step == 45),
        }
    return record


def evaluation(step, rewards, texts, kl):
    return {
        "step": step,
        "eval/reward": sum(rewards) / 4,
        "eval/rewards/chrf/mean": sum(rewards) / 4,
        "eval/kl": kl,
        "eval/entropy": 2.5 - 10 * kl,
        "eval/completions/mean_length": 14.25,
        "prompt_rewards": rewards,
        "samples": [
            {"prompt": p, "completion": t, "reward": r, "reference": ref}
            for p, t, r, ref in zip(PROMPTS, texts, rewards, REFERENCES, strict=True)
        ],
    }


def write_lines(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


class Page(HTMLParser):
    """Parsed strictly: each tag closed in its turn, and what a browser would load."""

    VOID = {"meta", "br", "link", "img", "input", "hr"}

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.loads, self.tags, self.attributes = [], [], [], [], []
        self.texts, self.rows, self.descriptions, self.references = [], [], {}, []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join("".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        attributes = dict(attrs)
        if "id" in attributes:
            self.ids.append(attributes["id"])
        for name in ("aria-labelledby", "aria-describedby"):
            self.references += attributes.get(name, "").split()
        self.loads += [v for k, v in attrs if k in ("src", "href", "action", "data", "xlink:href")]
        if tag not in self.VOID:
            self.open.append((tag, attributes))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        tag, attributes = self.open[-1] if self.open else ("", {})
        if tag in ("style", "script"):
            return
        if tag == "desc":
            self.descriptions[attributes["id"].removesuffix("-text")] = data
            return
        self.texts.append(data)
        if any(name in ("td", "th") for name, _ in self.open):
            self.rows[-1][-1] += data
