"""What a peer is: a function from a case and its arguments to a call.

Views, next values and arrays in the form that its library wants are made there once, outside what
is timed, in its favour.
"""

import importlib.metadata
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.case import Arguments, Case, Implementation, Outputs, Unavailable, bound
from fastrl import reference

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"


@dataclass(frozen=True)
class Peer:
    """An implementation by somebody else.

    package: what must be installed for it.
    overwrites: the arguments that it destroys where gradients are asked for: it gets copies.
    """

    name: str
    package: str
    build: Implementation
    overwrites: tuple[str, ...] = ()

    @property
    def version(self) -> str:
        return version_of(self.package) or "not installed"

    def call_for(self, case: Case, arguments: Arguments) -> Callable[[], Outputs]:
        """Raises Unavailable where it is not installed, or cannot do what the case asks for."""
        if version_of(self.package) is None:
            pin = pinned(self.package)
            raise Unavailable(f"not installed: pip install {self.package}{pin and '==' + pin}")
        return self.build(case, arguments)


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def pinned(package: str) -> str:
    """The version in constraints.txt (of a newer Python, where it names two), or nothing."""
    found = re.search(rf"^{re.escape(package)}==([^\s;]+)", CONSTRAINTS.read_text(), re.MULTILINE)
    return found[1] if found else ""


def eager(case: Case, arguments: Arguments) -> Callable[[], Outputs]:
    return bound(reference, case, arguments)


def compiled(function: Callable[[], Any]) -> Callable[[], Outputs]:
    fast = torch.compile(function, dynamic=False)
    return lambda: as_tuple(fast())


def compiled_reference(case: Case, arguments: Arguments) -> Callable[[], Outputs]:
    return compiled(bound(reference, case, arguments))


def on_cuda(x: Tensor) -> None:
    """For peers whose kernels are written for one kind of device."""
    if x.device.type != "cuda":
        raise Unavailable("runs on a GPU alone")


def as_tuple(outputs: Any) -> Outputs:
    return outputs if isinstance(outputs, tuple) else (outputs,)


REFERENCE = Peer("fastrl.reference", "torch", eager)
