"""Correctness before timing: our op within the error budget of the tests, against float64."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bench.case import Arguments, Case, Outputs, Workload, WrongResult, double


def _load_budget():
    """tests/budget.py: one table of tolerances for the tests and for the gate."""
    path = Path(__file__).parents[1] / "tests" / "budget.py"
    spec = importlib.util.spec_from_file_location("fastrl_tests_budget", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.assert_within_budget


assert_within_budget = _load_budget()


def with_leaves(case: Case, workload: Workload, arguments: Arguments) -> Arguments:
    """The arguments, those that are differentiated being leaves of a graph of their own."""
    if case.mode == "forward":
        return arguments
    leaves = {k: arguments[k].detach().requires_grad_() for k in workload.learned}
    return arguments | leaves


def run_once(
    call: Callable[[], Outputs],
    case: Case,
    workload: Workload,
    arguments: Arguments,
    upstream: Outputs,
) -> Outputs:
    """The outputs of one call, and after them the gradients of the modes that have them.

    Args:
        arguments: those that the call uses, as `with_leaves` gives them.
    """
    if case.mode == "forward":
        with torch.no_grad():
            return call()
    outputs = call()
    grads = gradients(outputs, workload, arguments, upstream)
    return (*(x.detach() for x in outputs), *grads)


def gradients(
    outputs: Outputs, workload: Workload, arguments: Arguments, upstream: Outputs
) -> Outputs:
    differentiable = outputs[: workload.learns_from]
    weights = upstream_like(differentiable, upstream)
    return torch.autograd.grad(differentiable, [arguments[k] for k in workload.learned], weights)


def upstream_like(outputs: Outputs, upstream: Outputs) -> Outputs:
    """As many as both have, in the outputs' dtypes: made before the clock starts, they cost none of
    its time."""
    return tuple(g.to(x.dtype) for g, x in zip(upstream, outputs, strict=False))


class Errors:
    """The largest |x - truth| over the largest |truth|, of each output, as pieces come in."""

    def __init__(self) -> None:
        self._difference: dict[int, float] = {}
        self._scale: dict[int, float] = {}

    def add(self, index: int, actual: Tensor, truth: Tensor) -> None:
        # A wrong inf or nan is an infinite error, one that the truth has as well is none.
        actual, truth = actual.detach(), truth.detach()
        difference = (actual.double() - truth).masked_fill(actual == truth, 0)
        worst = float(difference.abs().nan_to_num(torch.inf).max()) if truth.numel() else 0.0
        scale = float(truth.abs().max()) if truth.numel() else 0.0
        self._difference[index] = max(worst, self._difference.get(index, 0.0))
        self._scale[index] = max(scale, self._scale.get(index, 0.0))

    @property
    def worst(self) -> float:
        return max(
            (d / max(self._scale[i], 1e-30) for i, d in self._difference.items()), default=0.0
        )


class Gate:
    """What is right for one case, in float64: worked out once, for our op and for every peer."""

    def __init__(
        self, case: Case, workload: Workload, arguments: Arguments, upstream: Outputs
    ) -> None:
        self._case, self._workload = case, workload
        self._arguments, self._upstream = arguments, upstream
        self._pieces = list(workload.pieces(case))
        self._truths: dict[int, Outputs] = {}

    def check(self, outputs: Outputs) -> tuple[float, float]:
        """Our error and eager's, over all of the pieces.

        Args:
            outputs: what `run_once` gave for our op.
        Raises:
            WrongResult: an entry is outside the error budget, or an integer output is not eager's.
        """
        ours, eager = Errors(), Errors()
        for i, piece in enumerate(self._pieces):
            actual = self._cut(piece, outputs)
            arguments, upstream = self._piece(piece)
            plain = self._evaluate(self._define, arguments, upstream)
            truth = self._truth(i, actual)
            for j, (a, p, t) in enumerate(zip(actual, plain, truth, strict=True)):
                _compare(self._case, piece, j, a, p, t)
                if a.is_floating_point():
                    ours.add(j, a, t)
                    eager.add(j, p, t)
        return ours.worst, eager.worst

    def peer_error(self, outputs: Outputs) -> float:
        """A peer's error over the first and the last piece: enough to see what it computes."""
        errors = Errors()
        for i in sorted({0, len(self._pieces) - 1}):
            actual = self._cut(self._pieces[i], outputs)
            truth = self._truth(i, actual)
            # A peer may give fewer outputs than we do: the gradients stand last in both.
            grads = 0 if self._case.mode == "forward" else len(self._workload.learned)
            given, count = len(actual) - grads, len(truth) - grads
            pairs = [*zip(actual[:given], truth[:count], strict=False)]
            pairs += zip(actual[given:], truth[count:], strict=True)
            for j, (a, t) in enumerate(pairs):
                if a.is_floating_point():
                    errors.add(j, a, t)
        return errors.worst

    def _truth(self, i: int, actual: Outputs) -> Outputs:
        arguments, upstream = self._piece(self._pieces[i])
        truth = self._workload.truth
        if truth is not None:  # of these very outputs: another peer's may differ, and be right
            return self._evaluate(
                lambda a: truth(self._case, a, actual), double(arguments), upstream
            )
        if i not in self._truths:
            self._truths[i] = self._evaluate(self._define, double(arguments), upstream)
        return self._truths[i]

    def _define(self, arguments: Arguments) -> Outputs:
        return self._workload.definition(self._case, arguments)

    def _evaluate(
        self, function: Callable[[Arguments], Outputs], arguments: Arguments, upstream: Outputs
    ) -> Outputs:
        arguments = with_leaves(self._case, self._workload, arguments)
        return run_once(
            lambda: function(arguments), self._case, self._workload, arguments, upstream
        )

    def _piece(self, piece: slice | None) -> tuple[Arguments, Outputs]:
        if piece is None:
            return self._arguments, self._upstream
        arguments = {
            k: self._workload.cut(self._case, v, piece) if isinstance(v, Tensor) else v
            for k, v in self._arguments.items()
        }
        return arguments, self._cut(piece, self._upstream)

    def _cut(self, piece: slice | None, tensors: Outputs) -> Outputs:
        if piece is None:
            return tensors
        return tuple(self._workload.cut(self._case, x, piece) for x in tensors)


def _compare(
    case: Case, piece: slice | None, i: int, actual: Tensor, plain: Tensor, truth: Tensor
) -> None:
    where = "" if piece is None else f" in its rows (heads) {piece.start} to {piece.stop - 1}"
    remedy = "Run the tests of this op; nothing was timed."
    if not actual.is_floating_point():
        wrong = int((actual != plain).sum())
        if wrong:
            raise WrongResult(
                f"{case.op}: expected output {i} as fastrl.reference gives it{where}, "
                f"got {wrong} other entries. {remedy}"
            )
        return
    try:
        assert_within_budget(actual, plain, truth, actual.dtype)
    except AssertionError as error:
        got = str(error).splitlines()[0] if str(error) else "another shape, or nan or inf"
        raise WrongResult(
            f"{case.op}: expected output {i} within the error budget{where}, got {got}. {remedy}"
        ) from error
