"""One case from its inputs to its figures: gate, memory, then everybody takes turns."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastrl.ops
from bench import gate, memory, peers
from bench.case import Arguments, Case, Outputs, Unavailable, Workload, WrongResult, bound
from bench.ceiling import Copy, Product
from bench.gate import Gate
from bench.peers import Peer
from bench.results import CaseResult, Entry
from bench.timing import Budget, Contestant, RunRounds, synchronize, take_turns
from bench.workloads import WORKLOADS

_ANOTHER_FUNCTION = 0.05  # a peer whose error is larger does not compute what the case asks for
_CEILING_ROUNDS = 5


class Bench:
    """What the cases of a run share: device, budget, the copy that is a ceiling."""

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
        """The figures of a case; `wrong` is set, and nothing timed, where our op fails the gate.

        Where we have no implementation, that is listed with its reason, and the peers are timed.
        """
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
            counted_flops=workload.count_flops(case, arguments),
        )
        field = _Field(self, case, workload, arguments, result)
        try:
            field.enter_ours()
        except NotImplementedError as error:
            result.missing.append({"name": "fastrl", "version": "", "reason": str(error)})
        except WrongResult as error:
            result.wrong = str(error)
            return result
        for peer in self.peers_of(case.op):
            field.enter_peer(peer)
        if field.contestants:
            self._take_turns(case, workload, field, result, run_rounds)
        return result

    def _take_turns(
        self,
        case: Case,
        workload: Workload,
        field: "_Field",
        result: CaseResult,
        run_rounds: RunRounds | None,
    ) -> None:
        ceilings: dict[str, Copy | Product] = {"copy": self._copy}
        if result.counted_flops:
            shape = workload.product_shape and workload.product_shape(case)
            ceilings["product"] = Product(self.device, case.dtype, shape)
        turns = {name: self._ceiling_turns(ceiling) for name, ceiling in ceilings.items()}
        first, *others = field.contestants.values()
        with torch.set_grad_enabled(case.mode != "forward"):
            take_turns(first, [*others, *turns.values()], self.device, run_rounds=run_rounds)
        seconds = {name: statistics.median(c.times.values()) for name, c in turns.items()}
        result.copy_gb_s = self._copy.bytes / seconds["copy"] / 1e9
        floors = {"copy": result.counted_bytes / result.copy_gb_s / 1e9}
        if "product" in ceilings:
            result.product_tflop_s = ceilings["product"].flops / seconds["product"] / 1e12
            floors["product"] = result.counted_flops / result.product_tflop_s / 1e12
        result.ceiling = max(floors, key=lambda name: floors[name])
        field.record(floors[result.ceiling])

    def _ceiling_turns(self, call: Callable[[], None]) -> Contestant:
        turns = Contestant(call)
        call()
        synchronize(self.device)
        start = time.perf_counter()
        call()
        synchronize(self.device)
        turns.plan(self.budget, self.device, time.perf_counter() - start)
        turns.rounds = min(_CEILING_ROUNDS, self.budget.least_rounds)
        return turns


@dataclass
class _Entered:
    """A contestant with what is known of it before it is timed."""

    version: str
    contestant: Contestant
    error: float
    extra_memory_mib: float | None


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
        generator = torch.Generator(bench.device).manual_seed(0)
        shape = workload.upstream_shape(case)
        self._upstream = tuple(
            torch.randn(shape, generator=generator, device=bench.device) for _ in range(2)
        )
        self._gate = Gate(case, workload, self._arguments, self._upstream)
        self._entered: dict[str, _Entered] = {}

    @property
    def contestants(self) -> dict[str, Contestant]:
        return {name: entered.contestant for name, entered in self._entered.items()}

    def enter_ours(self) -> None:
        """Raises WrongResult, or NotImplementedError where this device has no kernel."""
        self._result.eager_error = self._enter_op("fastrl", (), {})
        if self._case.in_place:
            self._enter_op("fastrl inplace_backward", ("logits",), {"inplace_backward": True})

    def _enter_op(self, name: str, overwrites: tuple[str, ...], options: dict[str, Any]) -> float:
        """The error of eager."""
        arguments, restore = self._scratch(overwrites)
        call = bound(self._bench.ops, self._case, arguments, **options)
        outputs = gate.run_once(call, self._case, self._workload, arguments, self._upstream)
        ours, eager = self._gate.check(outputs)
        del outputs
        self._enter(name, fastrl.__version__, call, arguments, ours, restore)
        return eager

    def enter_peer(self, peer: Peer) -> None:
        """Into the list of contestants, or into that of the missing, with the reason."""
        try:
            arguments, restore = self._scratch(peer.overwrites)
            call = peer.call_for(self._case, arguments)
            outputs = gate.run_once(call, self._case, self._workload, arguments, self._upstream)
            error = self._gate.peer_error(outputs)
            del outputs
            if not error <= _ANOTHER_FUNCTION:
                raise Unavailable(f"computes something else here: off by {error:.1e}")
            self._enter(peer.name, peer.version, call, arguments, error, restore)
            if peer is peers.REFERENCE and self._result.eager_error is None:
                self._result.eager_error = error
        except Unavailable as reason:
            self._miss(peer, str(reason))
        except Exception as raised:  # whatever a foreign library does: it is shown, not hidden
            first_line = str(raised).strip().split("\n")[0][:120]
            self._miss(peer, f"raised {type(raised).__name__}: {first_line}")

    def _miss(self, peer: Peer, reason: str) -> None:
        entry = {"name": peer.name, "version": peer.version, "reason": reason}
        self._result.missing.append(entry)

    def _scratch(self, overwrites: tuple[str, ...]) -> tuple[Arguments, Callable[[], None] | None]:
        """The arguments, copies in place of those that a call writes over, and what restores
        them."""
        given = {k: self._arguments[k] for k in overwrites if k in self._arguments}
        if not given or self._case.mode == "forward":
            return self._arguments, None
        copies: dict[str, Tensor] = {
            k: v.detach().clone().requires_grad_(v.requires_grad) for k, v in given.items()
        }

        def restore() -> None:
            with torch.no_grad():
                for k, copy in copies.items():
                    copy.copy_(given[k])

        return self._arguments | copies, restore

    def _enter(
        self,
        name: str,
        version: str,
        call: Callable[[], Outputs],
        arguments: Arguments,
        error: float,
        restore: Callable[[], None] | None,
    ) -> None:
        contestant = self._contestant(call, arguments, restore)
        device = self._bench.device
        extra = None
        with torch.set_grad_enabled(self._case.mode != "forward"):
            if memory.can_measure(device):
                contestant.ready()
                extra = memory.peak_extra_mib(contestant.call, device)
            contestant.ready()
            synchronize(device)
            # By itself: measuring memory takes longer than a small call does.
            start = time.perf_counter()
            contestant.call()
            synchronize(device)
            contestant.plan(self._bench.budget, device, time.perf_counter() - start)
        self._entered[name] = _Entered(version, contestant, error, extra)

    def _contestant(
        self,
        call: Callable[[], Outputs],
        arguments: Arguments,
        restore: Callable[[], None] | None,
    ) -> Contestant:
        mode, pending = self._case.mode, []

        def backward(outputs: Outputs) -> Outputs:
            return gate.gradients(outputs, self._workload, arguments, self._upstream)

        def forward() -> None:
            if restore is not None:
                restore()
            pending[:] = [call()]

        if mode == "forward":
            return Contestant(call)
        if mode == "both":
            return Contestant(lambda: backward(call()), before=restore)
        return Contestant(lambda: backward(pending.pop()), before=forward)

    def record(self, floor_seconds: float) -> None:
        """floor_seconds: what the ceiling that binds this case needs for it."""
        ours = self._entered.get("fastrl")
        our_p50 = None if ours is None else statistics.median(ours.contestant.times.values())
        for name, entered in self._entered.items():
            times = sorted(entered.contestant.times.values())
            p50 = statistics.median(times)
            flops = self._result.counted_flops
            entry = Entry(
                name=name,
                version=entered.version,
                rounds=len(times),
                launches=entered.contestant.launches,
                time_us={
                    "p20": 1e6 * quantile(times, 0.2),
                    "p50": 1e6 * p50,
                    "p80": 1e6 * quantile(times, 0.8),
                },
                gb_s=self._result.counted_bytes / p50 / 1e9,
                tflop_s=flops / p50 / 1e12 if flops else None,
                share_of_ceiling=floor_seconds / p50,
                ratio=None if our_p50 is None else p50 / our_p50,
                error=entered.error,
                extra_memory_mib=entered.extra_memory_mib,
            )
            entry.targets = self._targets(entry)
            self._result.entries.append(entry)

    def _targets(self, entry: Entry) -> list[dict[str, Any]]:
        found = []
        for target in self._case.targets:
            if target.device != self._bench.device.type or not target.matches(entry.name):
                continue
            value = (
                entry.time_us["p50"]
                if target.figure == "time_us"
                else getattr(entry, target.figure)
            )
            if value is not None:
                found.append({"text": target.text, "reached": target.holds(value)})
        return found


def quantile(ordered: list[float], q: float) -> float:
    """Linear between the neighbours."""
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])
