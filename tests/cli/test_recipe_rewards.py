"""Reward functions of a recipe: tables with arguments, and fields of one algorithm alone."""

import dataclasses
import json
import shutil

import pytest

for package in ("rich", "safetensors", "transformers"):
    pytest.importorskip(package)

import fastrl  # noqa: E402
from fastrl.cli import report, train  # noqa: E402
from fastrl.cli.recipes import built_in, toml  # noqa: E402
from fastrl.cli.recipes.build import Parts  # noqa: E402
from fastrl.cli.recipes.parse import read_recipe  # noqa: E402
from fastrl.cli.recipes.rewards import load_reward_functions  # noqa: E402
from fastrl.cli.recipes.toml import RecipeError  # noqa: E402
from fastrl.cli.training.workers import Workers  # noqa: E402
from fastrl.rewards import ContinuationReward  # noqa: E402

RECIPE = """
algorithm = "grpo"
[model]
path = "some/model"
[data]
prompts = "prompts.jsonl"
[rewards]
functions = [
  {use = "mine.py:Scaled", factor = 3, functions = ["mine.py:one", {use = "mine.py:Scaled"}]},
  "package.module:brevity",
]
weights = [1, 0.5]
[train]
learning_rate = 1e-5
temperature = 0.5
[train.a2c]
learning_rate = 1e-4
advantage = "gae"
gae_lambda = 0.9
[train.reinforce]
baseline = "rloo"
[over_optimization]
gold = {use = "mine.py:Scaled"}
kl_budget = 20
"""
MINE = """
def one(completions, **columns):
    return [1.0] * len(completions)

class Scaled:
    calls = []
    def __init__(self, factor=1, functions=(), tokenizer=None):
        if factor < 0:
            raise ValueError("Scaled: expected factor >= 0, got less. Leave it out.")
        self.factor, self.functions, self.tokenizer = factor, functions, tokenizer
    def __call__(self, completions, **columns):
        sums = [sum(f(completions=[c])[0] for f in self.functions) for c in completions]
        return [self.factor * (total + 1) for total in sums]

def make(size):
    return size
"""


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


def test_tables_have_absolute_paths_and_are_written_as_they_are(recipe, tmp_path):
    read = read_recipe(recipe)
    mine = f"{tmp_path}/mine.py"
    assert read.rewards.functions == [
        {"use": f"{mine}:Scaled", "factor": 3,
         "functions": [f"{mine}:one", {"use": f"{mine}:Scaled"}]},
        "package.module:brevity",
    ]  # fmt: skip
    assert read.over_optimization.gold == {"use": f"{mine}:Scaled"}
    copy = tmp_path / "run.toml"
    copy.write_text(toml.write_toml(read.to_dict()))
    assert dataclasses.replace(read_recipe(copy), source="") == dataclasses.replace(read, source="")
    other = read_recipe(recipe, ['rewards.functions=[{use="mine.py:Scaled", factor=2}, "a:b"]'])
    assert other.rewards.functions[0]["factor"] == 2


def test_paths_among_arguments_are_those_of_the_recipes_folder(recipe, tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    text = recipe.read_text().replace(
        "factor = 3", 'factor = 3, model = ["run/model", "no/model"], url = "http://a/b"'
    )
    recipe.write_text(text)
    table = read_recipe(recipe).rewards.functions[0]
    assert table["model"] == [f"{tmp_path}/run/model", "no/model"] and table["url"] == "http://a/b"


def test_functions_are_built_with_their_arguments(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    read = read_recipe(recipe)
    entries = [read.rewards.functions[0]]
    (scaled,) = load_reward_functions(entries, {"tokenizer": lambda: "ours", "texts": list})
    assert scaled(completions=["a"]) == [3 * (1 + 1 + 1)]  # itself, one, and a Scaled within
    assert scaled.tokenizer == scaled.functions[1].tokenizer == "ours"
    named = load_reward_functions([{**entries[0], "tokenizer": "mine"}], {"tokenizer": lambda: 1})
    assert named[0].tokenizer == "mine"
    given = {"texts": lambda: ["a b"], "token_bytes": lambda: [b"a", b" b"]}
    parts = {"a": "mine.py:one", "b": {"use": "mine.py:make", "size": 3}}
    (mapped,) = load_reward_functions([{**entries[0], "functions": parts}])
    assert mapped.functions["a"](["x"]) == [1.0] and mapped.functions["b"] == 3
    (by_name,) = load_reward_functions(
        [{"use": "ContinuationReward", "repetition_penalty": 0.0}], given
    )
    assert isinstance(by_name, ContinuationReward) and by_name.repetition_penalty == 0
    rewards = by_name(["a"], [""], [[1]], reference=[" b"])
    assert rewards == [[pytest.approx(1.0)]]
    shaping = {"use": "PotentialShaping", "reward_function": "ChrF", "potential": "DistinctN"}
    (shaped,) = load_reward_functions([shaping])
    assert shaped.__name__ == "shaped_chrf" and shaped.potential.__name__ == "distinct_2"


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"use": "mine.py:Scaled", "fcator": 2}, "with arguments that it has, got fcator. Did you "
         "mean factor"),
        ({"use": "mine.py:Scaled", "zzz": 2}, "got zzz. It has factor, functions, tokenizer"),
        ({"use": "mine.py:Scaled", "factor": -1}, "Scaled: Scaled: expected factor >= 0"),
        ({"use": "mine.py:make"}, "make: make.. missing 1 required positional argument: 'size'"),
        ({"use": "mine.py:make", "size": 3}, "to make a function, got int"),
        ({"factor": 2}, "to name a class or factory in use, got {'factor': 2}"),
        ({"use": "Continuation"}, "Did you mean ContinuationReward"),
        ({"use": "mine.py:Scaled", "functions": [{"use": "mine.py:no"}]}, "got .*mine.py:no"),
    ],
)  # fmt: skip
def test_a_table_that_cannot_be_built(recipe, tmp_path, monkeypatch, entry, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=message):
        load_reward_functions([entry])


def test_fields_of_one_algorithm(recipe, tmp_path):
    def config(*sets):
        return read_recipe(recipe, sets).config()

    assert (config().learning_rate, config().temperature) == (1e-5, 0.5)
    a2c = config("algorithm=a2c")
    assert (a2c.learning_rate, a2c.gae_lambda, a2c.temperature) == (1e-4, 0.9, 0.5)
    assert config("algorithm=reinforce").baseline == "rloo"
    assert config("algorithm=ppo").learning_rate == 1e-5
    assert config("algorithm=a2c", "train.learning_rate=2.0").learning_rate == 2.0
    both = "train.learning_rate=2.0", "train.a2c.learning_rate=3.0"
    assert config("algorithm=a2c", *both).learning_rate == 3.0
    written = tmp_path / "written.toml"  # with the fields of its own algorithm alone
    written.write_text(toml.write_toml(read_recipe(recipe, ["algorithm=a2c"]).to_dict()))
    assert read_recipe(written).config() == a2c


@pytest.mark.parametrize(
    "sets, message",
    [
        (["train.critic_coef=1"], r"train.critic_coef with an algorithm of .*a2c.*, got grpo. Say "
         r"it in \[train.a2c\]"),
        (["train.a2c.critic_cof=1"], "The nearest is train.a2c.critic_coef"),
        (["train.a2c=3"], "train.a2c to be a table, got 3"),
        (["train.ppo.reward_weights=[1]"], "it is rewards.weights"),
        (["algorithm=a2c", "train.a2c.gamma=3"], r"gamma .*in \[0, 1\], got 3"),
        (["rewards.functions=[3, 4]"], "a list, each entry a text or a table"),
        (["over_optimization.gold=3"], "to be a text or a table, got 3"),
        (["data.pairs=pairs.jsonl"], "data.pairs with algorithm preference, got grpo"),
        (["preference.epochs=2"], r"\[preference\] in .* with algorithm preference, got grpo"),
        (["data.builder=multi30k_pairs"], "data.prompts in .* without data.builder, got both"),
        (["model.vocab_size=3"], "vocab_size >= 257, got 3"),
        (["supervised.learning_rate=0.0"], "learning_rate > 0, got 0.0"),
        (["supervised.steps=1", "model.lora={r = 2}"], "model.lora without model.start and"),
    ],
)  # fmt: skip
def test_keys_that_do_not_fit(recipe, sets, message):
    with pytest.raises(RecipeError, match=message):
        read_recipe(recipe, sets)


GOLD = """
def gold(completions, **columns):
    return [float(len(text)) for text in completions]
"""


def monitored(tmp_path, *more):
    """Options of a run with a monitor."""
    (tmp_path / "gold.py").write_text(GOLD)
    (tmp_path / "held_out.txt").write_text("".join(f"prompt {i}\n" for i in range(20)))
    sets = [
        "model.random.hidden_size=16", "model.random.intermediate_size=16",
        "train.max_steps=2", "train.max_new_tokens=4", "log.tensorboard=false",
        f"data.eval={tmp_path}/held_out.txt", f"over_optimization.gold={tmp_path}/gold.py:gold",
        "over_optimization.every=1", "over_optimization.kl_budget=50",
        "over_optimization.proxy={use='DistinctN', n=1}",
    ]  # fmt: skip
    return [option for text in (*sets, *more) for option in ("--set", text)]


def test_a_monitor_watches_a_run(tmp_path):
    options = monitored(tmp_path)
    assert train.main(["tiny_grpo", *options, "--output", str(tmp_path / "run")]) == 0
    run = tmp_path / "run"

    def records():
        return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]

    assert len(records()) == 2
    assert {"gold/gold", "gold/kl", "gold/alarm"} <= records()[0].keys()
    assert all(0 < record["gold/proxy"] <= 1 for record in records())  # the rewards give more
    assert (run / "best" / "trainer.json").is_file()
    seen = json.loads((run / "results.json").read_text())["monitor"]
    assert [evaluation["step"] for evaluation in seen] == [0, 1, 2] and seen[0]["gold/kl"] == 0
    assert seen[2]["gold/gold"] == records()[1]["gold/gold"]
    made = json.loads((run / "versions.json").read_text())["starts"]
    assert [start["step"] for start in made] == [0] and made[0]["fastrl"] == fastrl.__version__
    # As if it had been killed before its first one, while it cleared away the last but one best.
    shutil.rmtree(run / "checkpoint")
    (run / ".best.previous").mkdir()
    assert train.main(["--resume", str(run)]) == 0
    assert train.main(["--resume", str(run), "--set", "train.max_steps=3"]) == 0
    assert [record["step"] for record in records()] == [1, 2, 3]
    results = json.loads((run / "results.json").read_text())
    assert results["after"]["step"] == 3 and len(results["monitor"]) == 4
    made[0]["torch"] = "2.9.0"  # as if another one had begun
    (run / "versions.json").write_text(json.dumps({"starts": made}))
    assert train.main(["--resume", str(run)]) == 0
    assert [s["step"] for s in json.loads((run / "versions.json").read_text())["starts"]] == [0, 3]
    assert report.main([str(run)]) == 0
    page = (run / "report.html").read_text()
    assert f"from step 3: fastrl {fastrl.__version__}" in page


@pytest.mark.filterwarnings("ignore:KL budget")
def test_a_run_that_its_monitor_has_stopped_stays_stopped(tmp_path, capsys):
    options = monitored(tmp_path, 'over_optimization.action="stop"', "train.max_steps=5")
    options += ["--set", "over_optimization.kl_budget=1e-9"]
    run = tmp_path / "run"
    assert train.main(["tiny_grpo", *options, "--output", str(run)]) == 0
    after = json.loads((run / "results.json").read_text())["after"]
    assert after["step"] == 1 and after["stopped"]
    assert "Stopped by [over_optimization] after step 1." in capsys.readouterr().out
    # Finished, or ended while what it is worth was measured.
    for _ in range(2):
        assert train.main(["--resume", str(run)]) == 0
        assert len((run / "metrics.jsonl").read_text().splitlines()) == 1
        results = json.loads((run / "results.json").read_text())
        assert results["after"]["stopped"]
        (run / "results.json").write_text(json.dumps({"before": results["before"]}))


def test_a_monitor_needs_a_gold_reward(tmp_path):
    tiny = built_in.find_recipe("tiny_grpo")
    with pytest.raises(RecipeError, match="gold in .* with other keys of that table, got nothing"):
        read_recipe(tiny, ['over_optimization.action="stop"'])
    off = read_recipe(tiny, ["over_optimization.gold=''", 'over_optimization.action="stop"'])
    nowhere = tmp_path / "no"
    parts = Parts.load(off, tmp_path, tokenizer=nowhere, start=nowhere, workers=Workers())
    assert parts.gold is None


def test_a_monitor_needs_held_out_prompts(tmp_path, capsys):
    options = monitored(tmp_path, "data.eval=[]")
    assert train.main(["tiny_grpo", *options, "--output", str(tmp_path / "run")]) == 2
    assert "held-out prompts with over_optimization.gold, got none" in capsys.readouterr().err
