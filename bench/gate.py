"""Correctness before timing: our op within the error budget of the tests, against float64."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bench.case import Arguments, Case, Outputs, Workload, WrongResult, call_by_name, cut, double
from fastrl import reference


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


def evaluate(
    function: Callable[[Arguments], Outputs],
    case: Case,
    workload: Workload,
    arguments: Arguments,
    upstream: Outputs,
) -> Outputs:
    """What the function gives, and its gradients in the modes that have them."""
    arguments = with_leaves(case, workload, arguments)
    leaves = [arguments[k] for k in workload.learned]
    return run_once(lambda: function(arguments), case, leaves, upstream)


def run_once(
    call: Callable[[], Outputs], case: Case, leaves: list[Tensor], upstream: Outputs
) -> Outputs:
    """The outputs of one call, and after them the gradients with respect to the leaves."""
    if case.mode == "forward":
        with torch.no_grad():
            return call()
    outputs = call()
    grads = gradients(outputs, leaves, upstream)
    return (*(x.detach() for x in outputs), *grads)


def gradients(outputs: Outputs, leaves: list[Tensor], upstream: Outputs) -> Outputs:
    weights = [g.to(x.dtype) for g, x in zip(upstream, outputs, strict=False)]
    return torch.autograd.grad(outputs, leaves, weights)


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


def check(
    case: Case, workload: Workload, outputs: Outputs, arguments: Arguments, upstream: Outputs
) -> tuple[float, float]:
    """Our error and eager's, over the rows that the workload lists.

    Args:
        outputs: what `evaluate` gave for our op.
    Raises:
        WrongResult: an entry is outside the error budget, or an integer output is not eager's.
    """
    ours, eager = Errors(), Errors()
    for rows in workload.pieces(case):
        piece, weights, actual = _piece(rows, arguments, upstream, outputs)
        plain = evaluate(lambda a: call_by_name(reference, case, a), case, workload, piece, weights)
        truth = _truth(case, workload, piece, weights, actual)
        for i, (a, p, t) in enumerate(zip(actual, plain, truth, strict=True)):
            _compare(case, rows, i, a, p, t)
            if a.is_floating_point():
                ours.add(i, a, t)
                eager.add(i, p, t)
    return ours.worst, eager.worst


def _compare(case: Case, rows: slice | None, i: int, actual: Tensor, plain: Tensor, truth: Tensor):
    where = "" if rows is None else f", rows {rows.start} to {rows.stop - 1}"
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


def peer_error(
    case: Case, workload: Workload, outputs: Outputs, arguments: Arguments, upstream: Outputs
) -> float:
    """A peer's error over the first and the last piece: enough to see what it computes."""
    errors = Errors()
    pieces = list(workload.pieces(case))
    for rows in pieces if len(pieces) < 3 else (pieces[0], pieces[-1]):
        piece, weights, actual = _piece(rows, arguments, upstream, outputs)
        truth = _truth(case, workload, piece, weights, actual)
        # A peer may give fewer outputs than we do: the gradients stand last in both.
        count = len(truth) - (0 if case.mode == "forward" else len(workload.learned))
        given = len(actual) - (len(truth) - count)
        pairs = [*zip(actual[:given], truth, strict=False)]
        pairs += zip(actual[given:], truth[count:], strict=True)
        for i, (a, t) in enumerate(pairs):
            if a.is_floating_point():
                errors.add(i, a, t)
    return errors.worst


def _piece(rows: slice | None, arguments: Arguments, upstream: Outputs, outputs: Outputs):
    if rows is None:
        return arguments, upstream, outputs
    return (
        cut(arguments, rows),
        tuple(x[rows] for x in upstream),
        tuple(x[rows] for x in outputs),
    )


def _truth(
    case: Case, workload: Workload, piece: Arguments, upstream: Outputs, actual: Outputs
) -> Outputs:
    return evaluate(
        lambda a: workload.truth(case, a, actual), case, workload, double(piece), upstream
    )
