"""One case from its inputs to its figures: gate, memory, then everybody takes turns."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastrl.ops
from bench import gate, memory, peers
from bench.case import (
    Arguments,
    Case,
    Outputs,
    Unavailable,
    Workload,
    WrongResult,
    bound,
)
from bench.ceiling import Copy
from bench.peers import Peer
from bench.results import CaseResult, Entry
from bench.timing import Budget, Contestant, RunRounds, synchronize, take_turns
from bench.workloads import WORKLOADS

_ANOTHER_FUNCTION = 0.05  # a peer whose error is larger does not compute what the case asks for
_COPY_ROUNDS = 5


class Bench:
    """What the cases of a run share: device, budget, the copy that is the ceiling."""

    def __init__(
        self,
        device: torch.device,
        budget: Budget,
        *,
        ops: Any = fastrl.ops,
        peers_of: Callable[[str], list[Peer]] = peers.of,
        copy: Copy | None = None,
    ) -> None:
        self.device = device
        self.budget = budget
        self.ops = ops
        self.peers_of = peers_of
        self._copy = copy or Copy(device)

    def run(self, case: Case, *, run_rounds: RunRounds | None = None) -> CaseResult:
        """The figures of a case; `wrong` is set, and nothing timed, where our op fails the gate."""
        workload = WORKLOADS[case.op]
        arguments = workload.make(case, self.device)
        result = CaseResult(
            op=case.op,
            name=case.name,
            reason=case.reason,
            shape=list(case.shape),
            dtype=str(case.dtype).removeprefix("torch."),
            mode=case.mode,
            counted_bytes=workload.count_bytes(case, arguments),
        )
        field = _Field(self, case, workload, arguments, result)
        try:
            field.enter_ours()
        except NotImplementedError as error:
            result.missing.append({"name": "fastrl", "version": "", "reason": str(error)})
            return result
        except WrongResult as error:
            result.wrong = str(error)
            return result
        for peer in self.peers_of(case.op):
            field.enter_peer(peer)
        copy = Contestant(self._copy, rounds=min(_COPY_ROUNDS, self.budget.least_rounds))
        with torch.set_grad_enabled(case.mode != "forward"):
            others = [*list(field.contestants.values())[1:], copy]
            take_turns(field.contestants["fastrl"], others, self.device, run_rounds=run_rounds)
        result.copy_gb_s = self._copy.bytes / statistics.median(copy.times.values()) / 1e9
        field.record()
        return result


class _Field:
    """The contestants of one case, each correct and planned before it may take part."""

    def __init__(
        self,
        bench: Bench,
        case: Case,
        workload: Workload,
        arguments: Arguments,
        result: CaseResult,
    ) -> None:
        self._bench, self._case, self._workload, self._result = bench, case, workload, result
        self._arguments = gate.with_leaves(case, workload, arguments)
        generator = torch.Generator().manual_seed(0)
        shape = case.shape if "logits" not in arguments else case.shape[:1]
        self._upstream = tuple(
            torch.randn(shape, generator=generator).to(bench.device) for _ in range(2)
        )
        self.contestants: dict[str, Contestant] = {}
        self._facts: dict[str, tuple[str, float, float | None]] = {}

    def enter_ours(self) -> None:
        """Raises WrongResult, or NotImplementedError where this device has no kernel."""
        error, self._result.eager_error = self._enter_op("fastrl", self._arguments, None, {})
        if self._case.in_place:
            logits = self._arguments["logits"]
            scratch = self._arguments | {"logits": logits.detach().clone().requires_grad_()}

            def restore() -> None:
                with torch.no_grad():
                    scratch["logits"].copy_(logits)

            self._enter_op("fastrl inplace_backward", scratch, restore, {"inplace_backward": True})

    def _enter_op(
        self,
        name: str,
        arguments: Arguments,
        restore: Callable[[], None] | None,
        options: dict[str, Any],
    ) -> tuple[float, float]:
        call = bound(self._bench.ops, self._case, arguments, **options)
        outputs = gate.run_once(call, self._case, self._leaves(arguments), self._upstream)
        errors = gate.check(self._case, self._workload, outputs, self._arguments, self._upstream)
        del outputs
        self._enter(name, fastrl.__version__, call, self._leaves(arguments), errors[0], restore)
        return errors

    def enter_peer(self, peer: Peer) -> None:
        """Into the list of contestants, or into that of the missing, with the reason."""
        case, arguments = self._case, self._arguments
        leaves = self._leaves(arguments)
        try:
            call = peer.call_for(case, arguments)
            outputs = gate.run_once(call, case, leaves, self._upstream)
            error = gate.peer_error(case, self._workload, outputs, arguments, self._upstream)
            del outputs
            if not error <= _ANOTHER_FUNCTION:
                raise Unavailable(f"computes something else here: off by {error:.1e}")
            self._enter(peer.name, peer.version, call, leaves, error, None)
        except Unavailable as reason:
            self._miss(peer, str(reason))
        except Exception as raised:  # whatever a foreign library does: it is shown, not hidden
            first_line = str(raised).strip().split("\n")[0][:120]
            self._miss(peer, f"raised {type(raised).__name__}: {first_line}")

    def _miss(self, peer: Peer, reason: str) -> None:
        entry = {"name": peer.name, "version": peer.version, "reason": reason}
        self._result.missing.append(entry)

    def _leaves(self, arguments: Arguments) -> list[Tensor]:
        if self._case.mode == "forward":
            return []
        return [arguments[k] for k in self._workload.learned]

    def _enter(
        self,
        name: str,
        version: str,
        call: Callable[[], Outputs],
        leaves: list[Tensor],
        error: float,
        restore: Callable[[], None] | None,
    ) -> None:
        contestant = _contestant(call, self._case.mode, leaves, self._upstream, restore)
        device = self._bench.device
        extra = None
        with torch.set_grad_enabled(self._case.mode != "forward"):
            if device.type == "cpu" and memory.can_measure():
                contestant.ready()
                extra = memory.peak_extra_mib(contestant.call)
            contestant.ready()
            # By itself: measuring memory takes longer than a small call does.
            start = time.perf_counter()
            contestant.call()
            synchronize(device)
            contestant.plan(self._bench.budget, device, time.perf_counter() - start)
        self.contestants[name] = contestant
        self._facts[name] = (version, error, extra)

    def record(self) -> None:
        ours = statistics.median(self.contestants["fastrl"].times.values())
        assert self._result.copy_gb_s is not None
        for name, contestant in self.contestants.items():
            version, error, extra = self._facts[name]
            times = sorted(contestant.times.values())
            p50 = statistics.median(times)
            gb_s = self._result.counted_bytes / p50 / 1e9
            entry = Entry(
                name=name,
                version=version,
                rounds=len(times),
                launches=contestant.launches,
                time_us={
                    "p20": 1e6 * quantile(times, 0.2),
                    "p50": 1e6 * p50,
                    "p80": 1e6 * quantile(times, 0.8),
                },
                gb_s=gb_s,
                share_of_copy=gb_s / self._result.copy_gb_s,
                ratio=p50 / ours,
                error=error,
                extra_memory_mib=extra,
            )
            entry.targets = _targets(self._case, entry)
            self._result.entries.append(entry)


def _contestant(
    call: Callable[[], Outputs],
    mode: str,
    leaves: list[Tensor],
    upstream: Outputs,
    restore: Callable[[], None] | None,
) -> Contestant:
    if mode == "forward":
        return Contestant(call)
    if mode == "both":
        return Contestant(lambda: gate.gradients(call(), leaves, upstream), before=restore)
    pending: list[Outputs] = []

    def forward() -> None:
        pending[:] = [call()]

    return Contestant(lambda: gate.gradients(pending.pop(), leaves, upstream), before=forward)


def quantile(ordered: list[float], q: float) -> float:
    """Linear between the neighbours."""
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def _targets(case: Case, entry: Entry) -> list[dict[str, Any]]:
    found = []
    for target in case.targets:
        if not target.matches(entry.name):
            continue
        value = entry.time_us["p50"] if target.figure == "time_us" else getattr(
            entry, target.figure
        )  # fmt: skip
        if value is not None:
            found.append({"text": target.text, "reached": target.holds(value)})
    return found
