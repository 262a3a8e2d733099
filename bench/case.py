"""What a benchmark case is, and what must be known of an op to run it."""

import fnmatch
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastrl import reference

Arguments = dict[str, Any]  # what an op is called with, by name
Outputs = tuple[Tensor, ...]
# From a case and its arguments to a call without arguments, ready to be timed.
Implementation = Callable[["Case", Arguments], Callable[[], Outputs]]

MODES = ("forward", "backward", "both")
DEVICES = ("cpu", "cuda")


class Unavailable(Exception):
    """This peer cannot run this case here; the message is the reason that the table shows."""


class WrongResult(Exception):
    """Our op failed the error budget: there is nothing to time."""


@dataclass(frozen=True)
class Target:
    """A bound that a figure must keep, for the entries whose name matches `entry` (a glob)."""

    entry: str
    figure: str  # "ratio", "share_of_ceiling", "time_us" or "extra_memory_mib"
    at_least: float | None = None
    at_most: float | None = None
    device: str = "cpu"  # where the promise holds

    def matches(self, name: str) -> bool:
        return fnmatch.fnmatchcase(name, self.entry)

    @property
    def text(self) -> str:
        sign, bound = (">=", self.at_least) if self.at_most is None else ("<=", self.at_most)
        assert bound is not None
        return {
            "ratio": f"{sign} {bound:g}x",
            "share_of_ceiling": f"{sign} {bound:.0%} of the ceiling",
            "time_us": f"{sign} {bound:g} us",
            "extra_memory_mib": f"{sign} {bound:.0f} MiB",
        }[self.figure]

    def holds(self, value: float) -> bool:
        return (self.at_least is None or value >= self.at_least) and (
            self.at_most is None or value <= self.at_most
        )


@dataclass(frozen=True)
class Case:
    """One shape of one op, and why it is here."""

    op: str
    shape: tuple[int, ...]
    reason: str
    dtype: torch.dtype = torch.float32
    mode: str = "forward"
    inputs: tuple[str, ...] = ()  # optional arguments that this case passes
    options: Mapping[str, Any] = field(default_factory=dict)  # numbers and switches
    frozen: tuple[str, ...] = ()  # of what the op learns, the arguments that stay as they are
    layout: str = ""  # of attention: "512 + 16 x 128", a prompt with 16 completions of 128
    in_place: bool = False  # time inplace_backward=True as well
    quick: bool | str = False  # or the one kind of device where it is
    devices: tuple[str, ...] = DEVICES  # where this size makes sense
    targets: tuple[Target, ...] = ()

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"{self.op}: expected mode in {MODES}, got {self.mode}. Choose one.")
        if not self.devices or not set(self.devices) <= set(DEVICES):
            raise ValueError(
                f"{self.op}: expected devices in {DEVICES}, got {self.devices}. Name one or both."
            )

    @property
    def name(self) -> str:
        """Unique, and stable: results are compared by it."""
        details = [*self.inputs, *(_option(k, v) for k, v in self.options.items())]
        details += [f"frozen {name}" for name in self.frozen]
        if self.layout:
            details.append(f"layout {self.layout}")
        dtype = str(self.dtype).removeprefix("torch.")
        return ", ".join([f"{self.op} {list(self.shape)} {dtype} {self.mode}", *details])


def _option(name: str, value: Any) -> str:
    return name if value is True else f"{name}={value}"


def cut_rows(case: Case, x: Tensor, rows: slice) -> Tensor:
    return x[rows]


def bound(
    namespace: Any, case: Case, arguments: Arguments, **options: Any
) -> Callable[[], Outputs]:
    """A call of the op of that name in fastrl.ops, fastrl.reference or a stand-in, made ready: what
    is timed is the op, not the look-up of its arguments. It gives a tuple."""
    function, given = getattr(namespace, case.op), {**arguments, **case.options, **options}

    def call() -> Outputs:
        outputs = function(**given)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    return call


def call_reference(case: Case, arguments: Arguments) -> Outputs:
    return bound(reference, case, arguments)()


def whole_shape(case: Case) -> tuple[int, ...]:
    return case.shape


def no_flops(case: Case, arguments: Arguments) -> int:
    return 0


@dataclass(frozen=True)
class Workload:
    """How the cases of an op are fed, counted and held against the truth.

    make: the arguments of a case, from a fixed seed.
    count_bytes: each input read once and each output written once, in bytes.
    learned: the arguments that the modes with a backward pass differentiate.
    pieces: slices that the gate can look at one after the other; None is the whole.
    definition: what the op means; fastrl.reference, or the same in blocks where that would not fit.
    truth: what `outputs` should have been, from inputs in float64; None: what the definition gives.
    upstream_shape: of the gradients that come from above, one for each output.
    count_flops: floating-point operations of the fewest matrix products; 0 for an op without.
    product_shape: (m, k, n) of the product that is the ceiling of an op with them; None: a square.
    cut: the part of a tensor that belongs to a piece.
    learns_from: how many of the outputs, the first ones, gradients come through; None: all.
    """

    make: Callable[[Case, torch.device], Arguments]
    count_bytes: Callable[[Case, Arguments], int]
    learned: tuple[str, ...]
    pieces: Callable[[Case], Iterator[slice | None]]
    definition: Callable[[Case, Arguments], Outputs] = call_reference
    truth: Callable[[Case, Arguments, Outputs], Outputs] | None = None
    upstream_shape: Callable[[Case], tuple[int, ...]] = whole_shape
    count_flops: Callable[[Case, Arguments], int] = no_flops
    product_shape: Callable[[Case], tuple[int, int, int]] | None = None
    cut: Callable[[Case, Tensor, slice], Tensor] = cut_rows
    learns_from: int | None = None


def double(arguments: Arguments) -> Arguments:
    return {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in arguments.items()
    }
