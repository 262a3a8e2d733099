"""What fastrl.kernels holds, read from its source, against what the tests here reach."""

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class _Function:
    name: str  # module.function
    is_kernel_code: bool  # decorated with triton.jit
    mentions: set[str] = field(default_factory=set)  # bare names
    launches: bool = False

    @property
    def bare(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def is_private(self) -> bool:
        return any(part.startswith("_") for part in self.name.split("."))


def _is_jit(decorator: ast.expr) -> bool:
    node = decorator.func if isinstance(decorator, ast.Call) else decorator
    return getattr(node, "attr", getattr(node, "id", None)) == "jit"


def _functions(package: Path) -> Iterator[_Function]:
    for path in sorted(package.rglob("*.py")):
        module = ".".join(path.relative_to(package).with_suffix("").parts)
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.FunctionDef):
                continue
            jit = any(_is_jit(d) for d in node.decorator_list)
            function = _Function(f"{module}.{node.name}", jit)
            for part in ast.walk(node):
                if isinstance(part, ast.Name | ast.Attribute):
                    function.mentions.add(part.id if isinstance(part, ast.Name) else part.attr)
                if isinstance(part, ast.Call) and isinstance(part.func, ast.Subscript):
                    function.launches |= not jit  # kernel[grid](...)
            yield function


def kernels(package: Path) -> set[str]:
    """The jit functions that no other one calls: those are launched, or dead."""
    code = [f for f in _functions(package) if f.is_kernel_code]
    called = {name for f in code for name in f.mentions - {f.bare}}
    return {f.name for f in code if f.bare not in called}


def launchers(package: Path) -> set[str]:
    """The public functions that launch a kernel, by themselves or through another function."""
    functions = [f for f in _functions(package) if not f.is_kernel_code]
    launching = {f.bare for f in functions if f.launches}
    while more := {f.bare for f in functions if f.mentions & launching} - launching:
        launching |= more
    return {f.name for f in functions if f.bare in launching and not f.is_private}


def missing(
    package: Path, tests: Path, listed: Iterable[str], recorded: Iterable[str]
) -> list[str]:
    """What nobody tests: a line each.

    Args:
        package: the folder of kernel modules.
        tests: the folder of test_<module>.py, which run in the interpreter.
        listed: launchers called by the list of launches, as module.function.
        recorded: kernels that these calls reach, as module.function.
    """
    lines = [f"{name}: no call in launches.py" for name in launchers(package) - set(listed)]
    lines += [f"{name}: no launch reaches it" for name in kernels(package) - set(recorded)]
    for name in launchers(package):
        module, function = name.rsplit(".", 1)
        path = tests / f"test_{module}.py"
        if not path.exists() or f'"{function}"' not in path.read_text():
            lines.append(f"{name}: not run by {path.name}")
    return sorted(lines)
