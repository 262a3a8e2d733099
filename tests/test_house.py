"""What holds for the whole tree: who may import whom, and that both namespaces agree."""

import ast
import inspect
import sys
from pathlib import Path

import pytest

import fastrl
import fastrl.models
import fastrl.rewards
import fastrl.trainers
from fastrl import reference

PACKAGE = Path(fastrl.__file__).parent
# Each layer may import itself and those after it; rewards, models and rollout are one layer.
LAYERS = [
    {"cli"},
    {"trainers", "compat"},
    {"rollout", "_sampling", "rewards", "models", "hf"},
    {"ops"},
    {"kernels", "_C", "reference"},
    {"layout", "_batch", "_notation", "_paths", "_picture", "_schedule", "_segments", "_split"}
    | {"_tiles", "_transfer", "_vocabulary"},
]
ALONE = {
    "reference": {"torch", "fastrl"},
    "layout": {"torch", "fastrl"},
    "_batch": {"torch", "fastrl"},
    "_notation": {"torch"},
    "_paths": {"torch"},
    "_picture": {"torch", "fastrl", "matplotlib"},
    "_schedule": {"torch"},
    "_segments": {"torch"},
    "_split": {"torch"},
    "_tiles": {"torch"},
    "_transfer": {"torch"},
    "_vocabulary": {"torch"},
}
# The core's own dependencies may be imported anywhere; those of the extras not at import time.
EXTRAS = {"tokenizers", "safetensors", "rich", "matplotlib", "tyro", "transformers", "trl"}
EXTRAS |= {"torchrl", "tensordict", "tensorboard", "tomli", "peft"}
EXTRAS |= {"sacrebleu", "rouge_score", "bert_score", "nltk"}
FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports_of(path: Path, *, at_import_time: bool = False):
    tree = ast.parse(path.read_text())
    nodes = tree.body if at_import_time else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer_of(part: str) -> int | None:
    return next((i for i, layer in enumerate(LAYERS) if part in layer), None)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    part = part_of(path)
    if part in ("__init__", "__main__"):
        return
    layer = layer_of(part)
    assert layer is not None, f"{part} has no layer: add it to LAYERS"
    for name in imports_of(path):
        head, _, rest = name.partition(".")
        if part in ALONE and head not in sys.stdlib_module_names:
            assert head in ALONE[part], f"{path} imports {name}"
        target = layer_of(rest.split(".")[0]) if head == "fastrl" else None
        if target is not None:
            assert target >= layer, f"{path} imports {name}, which stands above it"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_the_core_imports_without_extras_and_without_triton(path):
    names = {name.split(".")[0] for name in imports_of(path, at_import_time=True)}
    forbidden = EXTRAS | ({"triton"} if part_of(path) != "kernels" else set())
    if part_of(path) == "cli" and path.name not in ("main.py", "info.py", "__init__.py"):
        forbidden -= EXTRAS  # main.py imports a command's module when that command is called
    assert not names & forbidden


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_are_short_and_read_no_environment(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    # Keys of services are taken from the environment alone, and by one file.
    if part_of(path) != "cli" and path != PACKAGE / "rewards" / "_secret.py":
        assert "os.environ" not in text and "os.getenv" not in text


@pytest.mark.parametrize("name", reference.__all__)
def test_ops_and_reference_have_the_same_signatures_and_say_what_they_do(name):
    ours, plain = getattr(fastrl.ops, name), getattr(reference, name)
    parameters = [inspect.signature(f).parameters for f in (ours, plain)]
    assert [(p.name, p.kind, p.default) for p in parameters[0].values()] == [
        (p.name, p.kind, p.default) for p in parameters[1].values()
    ]
    assert getattr(fastrl, name) is ours
    for word in ("Args:", "Returns:", "Differentiable in:"):
        assert word in ours.__doc__ and word in plain.__doc__
    assert "Raises:" in ours.__doc__


def test_the_namespaces_list_the_same_names():
    assert sorted(fastrl.ops.__all__) == sorted(reference.__all__)


def test_every_op_with_kernels_has_its_files():
    root = PACKAGE.parent
    for name, kinds in fastrl.ops._binary.IMPLEMENTATIONS.items():
        assert (root / "fastrl" / "reference" / f"{name}.py").exists()
        assert (root / "fastrl" / "ops" / f"{name}.py").exists()
        if kinds["cpu"] == "C++":  # others are made of kernels of another op
            assert (root / "csrc" / "cpu" / f"{name}.cpp").exists()
        assert (root / "bench" / f"bench_{name}.py").exists()


@pytest.mark.parametrize("module", [fastrl.trainers, fastrl.rewards, fastrl.models])
def test_public_classes_say_what_they_take(module):
    for name in module.__all__:
        public = getattr(module, name)
        ours = inspect.isclass(public) and not issubclass(public, Exception)
        if ours and not getattr(public, "_is_protocol", False):
            parameters = inspect.signature(public).parameters
            assert not {"args", "kwargs"} & set(parameters), f"{name}({', '.join(parameters)})"
