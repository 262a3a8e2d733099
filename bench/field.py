"""The contestants of one case: each correct before it may take part, then planned, then timed."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import fastrl
from bench import gate, memory, peers
from bench.case import Arguments, Case, Outputs, Unavailable, Workload, bound
from bench.gate import Gate
from bench.peers import Peer
from bench.results import CaseResult, Entry
from bench.timing import SLOW, Budget, Contestant, described, synchronize

_ANOTHER_FUNCTION = 0.05  # a peer whose error is larger does not compute what the case asks for


@dataclass
class _Entered:
    """A contestant with what is known of it before it is timed."""

    version: str
    contestant: Contestant
    error: float
    extra_memory_mib: float | None


class Field:
    """The contestants of one case, each correct and planned before it may take part."""

    def __init__(
        self,
        case: Case,
        workload: Workload,
        arguments: Arguments,
        result: CaseResult,
        *,
        device: torch.device,
        budget: Budget,
        ops: Any,
    ) -> None:
        self._case, self._workload, self._result = case, workload, result
        self._device, self._budget, self._ops = device, budget, ops
        self._arguments = gate.with_leaves(case, workload, arguments)
        generator = torch.Generator(device).manual_seed(0)
        shape = workload.upstream_shape(case)
        self._upstream = tuple(
            torch.randn(shape, generator=generator, device=device) for _ in range(2)
        )
        self._gate = Gate(case, workload, self._arguments, self._upstream)
        self._entered: dict[str, _Entered] = {}

    @property
    def contestants(self) -> dict[str, Contestant]:
        return {name: entered.contestant for name, entered in self._entered.items()}

    def failed(self) -> list[dict[str, str]]:
        """Those that raised while being timed."""
        return [
            {"name": name, "version": entered.version, "reason": f"while being timed, {why}"}
            for name, entered in self._entered.items()
            if (why := entered.contestant.failed) is not None
        ]

    @contextmanager
    def for_itself(self, result: CaseResult, rounds: int) -> Iterator[None]:
        """What is recorded inside goes to `result`, of at most so many rounds, and the contestants
        are afterwards as they were."""
        before, entered = self._result, self._entered
        self._result = result
        self._entered = {
            name: replace(e, contestant=e.contestant.fresh(rounds)) for name, e in entered.items()
        }
        try:
            yield
        finally:
            self._result, self._entered = before, entered

    def enter_ours(self) -> None:
        """Raises WrongResult, or NotImplementedError where this device has no kernel."""
        self._result.eager_error = self._enter_op("fastrl", (), {})
        if self._case.in_place:
            self._enter_op("fastrl inplace_backward", ("logits",), {"inplace_backward": True})

    def _enter_op(self, name: str, overwrites: tuple[str, ...], options: dict[str, Any]) -> float:
        """The error of eager."""
        arguments, restore = self._scratch(overwrites)
        call = bound(self._ops, self._case, arguments, **options)
        outputs = gate.run_once(call, self._case, self._workload, arguments, self._upstream)
        ours, eager = self._gate.check(outputs)
        upstream = gate.upstream_like(outputs, self._upstream)
        del outputs
        self._enter(name, fastrl.__version__, call, arguments, upstream, ours, restore)
        return eager

    def enter_peer(self, peer: Peer) -> None:
        """Into the list of contestants, or into that of the missing, with the reason."""
        if not self._try_to_enter(peer):
            # Out here, where the frames that held what did not fit are gone.
            memory.release(self._device)

    def _try_to_enter(self, peer: Peer) -> bool:
        """False where it has raised what it should not."""
        try:
            arguments, restore = self._scratch(peer.overwrites)
            call = peer.call_for(self._case, arguments)
            outputs = gate.run_once(call, self._case, self._workload, arguments, self._upstream)
            error = self._gate.peer_error(outputs)
            upstream = gate.upstream_like(outputs, self._upstream)
            del outputs
            if not error <= _ANOTHER_FUNCTION:
                raise Unavailable(f"computes something else here: off by {error:.1e}")
            self._enter(peer.name, peer.version, call, arguments, upstream, error, restore)
            if peer is peers.REFERENCE and self._result.eager_error is None:
                self._result.eager_error = error
        except Unavailable as reason:
            self.miss(peer.name, peer.version, str(reason))
        except Exception as raised:  # whatever a foreign library does: it is shown, not hidden
            self.miss(peer.name, peer.version, described(raised))
            return False
        return True

    def miss(self, name: str, version: str, reason: str) -> None:
        """Into the list of those that did not take part."""
        self._result.missing.append({"name": name, "version": version, "reason": reason})

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
        upstream: Outputs,
        error: float,
        restore: Callable[[], None] | None,
    ) -> None:
        contestant = self._contestant(call, arguments, upstream, restore)
        device = self._device
        extra = None
        with torch.set_grad_enabled(self._case.mode != "forward"):
            once = 0.0
            if memory.can_measure(device):
                contestant.ready()
                start = time.perf_counter()
                extra = memory.peak_extra_mib(contestant.call, device)
                once = time.perf_counter() - start
            if once < SLOW:  # by itself: measuring memory takes longer than a small call does
                contestant.ready()
                synchronize(device)
                start = time.perf_counter()
                contestant.call()
                synchronize(device)
                once = time.perf_counter() - start
            contestant.plan(self._budget, device, once)
        self._entered[name] = _Entered(version, contestant, error, extra)

    def _contestant(
        self,
        call: Callable[[], Outputs],
        arguments: Arguments,
        upstream: Outputs,
        restore: Callable[[], None] | None,
    ) -> Contestant:
        mode, pending = self._case.mode, []

        def backward(outputs: Outputs) -> Outputs:
            return gate.gradients(outputs, self._workload, arguments, upstream)

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
        our_p50 = None if ours is None else statistics.median(ours.contestant.kept)
        self._result.missing += self.failed()
        for name, entered in self._entered.items():
            if entered.contestant.failed is not None:
                continue
            times = sorted(entered.contestant.kept)
            p50 = statistics.median(times)
            flops = self._result.counted_flops
            entry = Entry(
                name=name,
                version=entered.version,
                rounds=len(times),
                disturbed=len(entered.contestant.times) - len(times),
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
            if target.device != self._device.type or not target.matches(entry.name):
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
