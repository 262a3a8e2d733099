import dataclasses
import json
import math

import pytest

pytest.importorskip("rich")
pytest.importorskip("transformers")

from fastrl.cli.recipes import prompts, rewards, toml
from fastrl.cli.recipes.built_in import BUILT_IN, find_recipe
from fastrl.cli.recipes.parse import read_recipe
from fastrl.cli.recipes.toml import RecipeError
from fastrl.trainers import ActorCriticConfig, PolicyGradientConfig

RECIPE = """
algorithm = "grpo"
[model]
path = "some/model"
[data]
prompts = "prompts.jsonl"
[rewards]
functions = ["rewards.py:correct", "package.module:brevity"]
weights = [1, 0.5]
[train]
max_steps = 7
learning_rate = 1e-5
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


def test_a_recipe_becomes_a_config_and_absolute_paths(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    read = read_recipe(recipe)
    assert read.rewards.functions == [
        f"{tmp_path}/rewards.py:correct", "package.module:brevity",
    ]  # fmt: skip
    assert read.data.prompts == f"{tmp_path}/prompts.jsonl"
    assert read.model.path == "some/model"  # a name: nothing of it stands beside the recipe
    config = read.config(max_new_tokens=9, max_steps=1000)
    expected = PolicyGradientConfig(
        algorithm="grpo", max_steps=7, learning_rate=1e-5, max_new_tokens=9,
        reward_weights=(1.0, 0.5),
    )  # fmt: skip
    assert config == expected


def test_set_takes_the_place_of_the_recipes_values(recipe, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "model").mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    sets = [
        "algorithm=ppo", "train.learning_rate=2e-4", "train.max_steps = 3", "model.path=model",
        'model.lora={r=8, target_modules=["q_proj"]}', "model.lora.r=16", "rewards.weights=[2, 3]",
        "log.tensorboard=false", "data.prompts=other.txt", 'data.column="a=b"',
    ]  # fmt: skip
    read = read_recipe(recipe, sets)
    assert isinstance(read.config(), ActorCriticConfig)
    assert read.train == {"max_steps": 3, "learning_rate": 2e-4}
    assert read.model.path == str(elsewhere / "model")  # --set is said here, not beside the recipe
    assert read.data.prompts == str(elsewhere / "other.txt")
    assert read.model.lora == {"r": 16, "target_modules": ["q_proj"]}
    assert (read.rewards.weights, read.log.tensorboard, read.data.column) == ([2, 3], False, "a=b")


def test_set_to_nothing_takes_a_key_out(recipe):
    def read(*sets):
        return read_recipe(recipe, sets)

    assert read("train.learning_rate=").train.keys() == read().train.keys() - {"learning_rate"}
    assert read("train.learning_rate=", "train.learning_rate=3").train["learning_rate"] == 3
    assert read("data.limit=3", "data.limit= ").data.limit is None
    assert read('data.column=""').data.column == ""
    tables = read("train.a2c.gae_lambda=0.5", "train.a2c=", "supervised.steps=3", "supervised=")
    assert tables == read() and not read("train=").train
    for text, message in {"data.limits=": "data.limits", "algorithm=": "one of", "x=": "x"}.items():
        with pytest.raises(RecipeError, match=message):
            read(text)


def test_what_is_written_reads_as_the_same(recipe, tmp_path):
    lora = 'model.lora={"odd key"=[1, -2.5e-7, true], nested={a="é\\"\\n"}}'
    read = read_recipe(recipe, [lora, "train.learning_rate=3e-6"])
    assert read.model.lora["nested"] == {"a": 'é"\n'}
    copy = tmp_path / "run" / "recipe.toml"
    copy.parent.mkdir()
    copy.write_text(toml.write_toml(read.to_dict()))
    assert dataclasses.replace(read_recipe(copy), source="") == dataclasses.replace(read, source="")
    assert read_recipe(copy).differences(read) == []
    other = read_recipe(copy, ["train.max_steps=9", "train.kl_coef=0.5", "eval.every=2"])
    assert other.differences(read) == ["train.kl_coef"]


def test_toml_of_every_type_goes_there_and_back():
    document = {
        "text": 'a "quoted" \\ é \u2028 \x7f\t\n', "flag": True, "int": -3, "big": 1e22,
        "small": 5e-324, "none": [], "inf": math.inf,
        "table": {"odd key.": {"x": [1, [2.5, "a"], {"y": False}]}, "empty": {}},
    }  # fmt: skip
    assert toml.tomllib.loads(toml.write_toml(document)) == document
    assert toml.write_toml({"a": {"gone": None}}) == "[a]\n"


def without(text):
    return RECIPE.replace(text, "")


@pytest.mark.parametrize(
    "text, sets, message",
    [
        ("algorithm = grpo", [], "in TOML, got Invalid value"),
        (without('algorithm = "grpo"'), [], r"algorithm in .*recipe.toml to be one of .*nothing"),
        (RECIPE.replace('"grpo"', '"grop"'), [], "got grop. Did you mean grpo"),
        (RECIPE, ["train.learning_rat=1"], "got --set train.learning_rat. The nearest is "
         "train.learning_rate"),
        (RECIPE + "lerning_rate = 1", [], r"got train.lerning_rate in .*recipe.toml. The nearest "
         "is train.learning_rate"),
        (RECIPE + "[trian]", [], "The nearest is train"),
        (RECIPE, ["max_steps=3"], "got --set max_steps. The nearest is"),
        (RECIPE, ["train.gamma=2"], r"in \[train\] of .*gamma .*in \[0, 1\], got 2"),
        (RECIPE, ["train.output_dir=x"], "it is the option --output"),
        (RECIPE, ["train.reward_weights=[1]"], "it is rewards.weights"),
        (RECIPE, ["model.path=3"], "--set model.path to be a text, got 3"),
        (RECIPE, ["log.tensorboard=1"], "--set log.tensorboard to be true or false, got 1"),
        (RECIPE, ["rewards.weights=[1,true]"], "a list, each entry a number"),
        (RECIPE, ["rewards.weights=[1]"], "a weight for each of 2 functions"),
        (RECIPE, ["data=3"], "--set data to be a table, got 3"),
        (RECIPE, ["data.prompts.x=3"], "to lead through tables"),
        (RECIPE, ["data.limit=0"], "--set data.limit >= 1, got 0"),
        (RECIPE, ["eval.temperature=nan"], "--set eval.temperature >= 0, got nan"),
        (RECIPE, ["model.random={a=1979-05-27}"], "--set model.random to be a table"),
        (RECIPE, ["model.lstm={}"], "exactly one of path, random and lstm, got path and lstm"),
        (without('path = "some/model"'), [], "exactly one of path, random and lstm, got none"),
        (RECIPE, ["model.critic=same"], "with actor-critic, got grpo. Actor-critic is a2c"),
        (RECIPE, ["model.dtype=int8"], "float32, bfloat16 or float16, got int8"),
        (without('prompts = "prompts.jsonl"'), [], "data.prompts in .* to name the prompts"),
        (RECIPE, ["data.eval=test"], "--set data.eval a split with a dataset by name alone, got"),
        (RECIPE, ["data.split=test"], "--set data.split with data.prompts a dataset by name, got"),
        (RECIPE, ["data.arguments={a=1}"], "--set data.arguments with data.builder, got none"),
        (RECIPE, ["no equals"], "expected --set section.key=value, got 'no equals'"),
    ],
)  # fmt: skip
def test_a_mistake_is_an_error_that_says_where(tmp_path, text, sets, message):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        read_recipe(path, sets)


def test_recipes_that_come_with_fastrl(tmp_path):
    names = sorted(path.stem for path in BUILT_IN.glob("*.toml"))
    tasks = ["continuation", "dialogue", "preference", "summarisation", "translation"]
    assert names == sorted([*tasks, "tiny_grpo", "tiny_ppo"])
    algorithms = [read_recipe(find_recipe(name)).algorithm for name in names]
    assert {"grpo", "ppo", "preference"} <= set(algorithms)
    for name in set(tasks) - {"preference"}:  # each for both kinds of trainer
        for algorithm in ("grpo", "reinforce", "a2c", "ppo"):
            read = read_recipe(find_recipe(name), [f"algorithm={algorithm}"])
            assert read.supervised.steps and read.data.builder and read.model.tokenizer == "bpe"
    with pytest.raises(RecipeError, match="tiny_grpo, tiny_ppo, translation, got tiny_grop"):
        find_recipe("tiny_grop")
    with pytest.raises(RecipeError, match="a file that can be read, got No such file"):
        read_recipe(find_recipe("nowhere.toml"))
    (tmp_path / "latin.toml").write_bytes("a = 'é'".encode("latin-1"))
    with pytest.raises(RecipeError, match="can't decode byte 0xe9"):
        read_recipe(tmp_path / "latin.toml")


def load(path, **options):
    return prompts.load_prompts(str(path), key="data.prompts", **options)


def test_prompts_of_each_kind(tmp_path):
    rows = [{"question": "a?", "answer": "1"}, {"question": "b?", "answer": "2", "prompt": "old"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "p.json").write_text(json.dumps(rows))
    (tmp_path / "p.txt").write_text("first line\n\nzweite Zeile ü\n")
    expected = [{"answer": "1", "prompt": "a?"}, {"answer": "2", "prompt": "b?"}]
    assert load(tmp_path / "p.jsonl", column="question") == expected
    assert load(tmp_path / "p.json", column="question", limit=1) == expected[:1]
    assert load(tmp_path / "p.txt") == [{"prompt": "first line"}, {"prompt": "zweite Zeile ü"}]
    assert prompts.load_prompts(["x"], key="k") == [{"prompt": "x"}]
    # A mark that editors put before a text is not of it, and only a line feed ends a line.
    (tmp_path / "p.txt").write_bytes("\ufeffone\u2028line\r\n\x0btwo\n".encode())
    assert load(tmp_path / "p.txt") == [{"prompt": "one\u2028line"}, {"prompt": "\x0btwo"}]
    (tmp_path / "r.jsonl").write_text('{"prompt": "a", "x": 1}\n{"prompt": "b", "y": 2}\n"c"\n')
    found = [(row["prompt"], row["x"], row["y"]) for row in load(tmp_path / "r.jsonl")]
    assert found == [("a", 1, None), ("b", None, 2), ("c", None, None)]
    (tmp_path / "m.jsonl").write_bytes("\ufeff".encode() + json.dumps(rows[0]).encode())
    assert load(tmp_path / "m.jsonl", column="question") == expected[:1]
    datasets = pytest.importorskip("datasets")
    parquet = tmp_path / "set" / "train.parquet"
    parquet.parent.mkdir()
    datasets.Dataset.from_list([{**row, "prompt": "old"} for row in rows]).to_parquet(parquet)
    found = load(parquet.parent, column="question", limit=1)
    assert list(found) == expected[:1]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "line 2, to be JSON, got Expecting value"),
        (
            "p.jsonl",
            b'{"question": "a"}\n',
            'line 1, to have "prompt", got "question". data.column',
        ),
        ("p.jsonl", b"3\n", "line 1, to be a text or an object, got 3"),
        ("p.jsonl", b"\n", "at least one prompt, got none"),
        ("p.json", b"{}", "a list of prompts, got dict"),
        ("p.txt", b"caf\xe9\n", "UTF-8, got byte 0xe9 at offset 3"),
        ("p.txt", None, "can be read, got .*p.txt: No such file"),
        ("p.csv", b"prompt\na\n", "a file .jsonl, .json, .txt, got .*p.csv. Write it as one"),
        ("p.jsonl", b'{"prompt": "a\\ud83d"}\n', "line 1, .* got half a character, '.ud83d'"),
    ],
)
def test_prompts_that_cannot_be_read(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        load(tmp_path / name)


def test_reward_functions_by_name(tmp_path, monkeypatch):
    (tmp_path / "helper.py").write_text("VALUE = 3.0\n")
    (tmp_path / "mine.py").write_text(
        "import helper\n"
        "def three(completions, **columns):\n    return [helper.VALUE] * len(completions)\n"
        "class Counting:\n    def __call__(self, completions, **columns):\n        return [0.0]\n"
        "SIZE = 3\n"
    )
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    three, counting, lower = rewards.load_reward_functions(
        [f"{tmp_path}/mine.py:three", f"{tmp_path}/mine.py:Counting",
         "fastrl.cli.recipes.toy_rewards:lower_case"]
    )  # fmt: skip
    assert three(completions=["a", "b"]) == [3.0, 3.0]
    assert counting(completions=["a"]) == [0.0]
    assert lower(completions=["ab C", ""]) == [0.75, 0.0]
    (tmp_path / "broken.py").write_text("1 / 0\n")
    for name, message in {
        "mine.py": "The colon stands before the function",
        f"{tmp_path}/none.py:f": "a file that exists",
        f"{tmp_path}/mine.py:tree": "Did you mean three",
        f"{tmp_path}/mine.py:SIZE": "to name a function",
        f"{tmp_path}/broken.py:f": "raised ZeroDivisionError: division by zero",
        "no.such.module:f": "raised ModuleNotFoundError",
    }.items():
        with pytest.raises(RecipeError, match=message):
            rewards.load_reward_functions([name])
