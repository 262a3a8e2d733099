"""One case from its inputs to its figures: gate, memory, then everybody takes turns."""

import copy
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

import fastrl.ops
from bench import memory, peers
from bench.case import Case, Workload, WrongResult
from bench.ceiling import Copy, Product
from bench.field import Field
from bench.peers import Peer
from bench.quiet import Probe
from bench.results import CaseResult
from bench.timing import Budget, Contestant, RunRounds, described, synchronize, take_turns
from bench.workloads import WORKLOADS

_CEILING_ROUNDS = 5
_ENTERING = 0.6  # of the time of a case, if that is short: then they take turns
_FIRST_ROUNDS = 3  # of our own, before the others


class Bench:
    """What the cases of a run share: device, budget, the copy that is a ceiling.

    lost: what has left the device unusable for this process, if anything has.
    """

    def __init__(
        self,
        device: torch.device,
        budget: Budget,
        *,
        ops: Any = fastrl.ops,
        peers_of: Callable[[str], list[Peer]] = peers.of,
        copy: Copy | None = None,
    ) -> None:
        self.lost: str | None = None
        self.device = device
        self.budget = budget
        self.ops = ops
        self.peers_of = peers_of
        self._copy = copy or Copy(device)
        self._probe = Probe(device)

    def run(
        self,
        case: Case,
        *,
        seconds: float | None = None,
        keep: Callable[[CaseResult], None] | None = None,
        run_rounds: RunRounds | None = None,
    ) -> CaseResult:
        """The figures of a case; `wrong` is set, and nothing timed, where our op fails the gate.

        Where we have no implementation, that is listed with its reason, and the peers are timed.

        Args:
            seconds: what the case should take. We are measured however long it takes; peers enter,
                in order, until most of it is gone.
            keep: called with our own figures, of a few rounds, before a peer enters: one that
                takes the process with it does not take them.
        """
        # Else a second shape would be compiled as a dynamic one. Between peers it would throw away
        # what is to be timed.
        torch.compiler.reset()
        with memory.settled():
            return self._run(case, seconds, keep, run_rounds)

    def _run(
        self,
        case: Case,
        seconds: float | None,
        keep: Callable[[CaseResult], None] | None,
        run_rounds: RunRounds | None,
    ) -> CaseResult:
        start = time.monotonic()
        stop = None if seconds is None else start + _ENTERING * seconds
        workload = WORKLOADS[case.op]
        learned = tuple(name for name in workload.learned if name not in case.frozen)
        workload = replace(workload, learned=learned)
        result = CaseResult(
            op=case.op,
            name=case.name,
            reason=case.reason,
            shape=list(case.shape),
            dtype=str(case.dtype).removeprefix("torch."),
            mode=case.mode,
            counted_bytes=0,
        )
        try:
            arguments = workload.make(case, self.device)
            result.counted_bytes = workload.count_bytes(case, arguments)
            result.counted_flops = workload.count_flops(case, arguments)
            field = Field(
                case, workload, arguments, result,
                device=self.device, budget=self.budget, ops=self.ops,
            )  # fmt: skip
            try:
                field.enter_ours()
            except NotImplementedError as error:
                result.missing.append({"name": "fastrl", "version": "", "reason": str(error)})
        except WrongResult as error:
            result.wrong = str(error)
            return result
        except Exception as error:  # shown, counted as wrong, and the other cases still run
            traceback.print_exc()
            result.wrong = f"{case.op}: raised {type(error).__name__}: {error}"
            self._look_at_the_device()
            return result
        ours = None
        try:
            if keep is not None and field.contestants:
                ours = self._first_figures(case, workload, field, result)
                keep(ours)
            for peer in self.peers_of(case.op):
                if stop is not None and time.monotonic() > stop:
                    reason = "the time was used up before it had its turn"
                    field.miss(peer.name, peer.version, reason)
                else:
                    field.enter_peer(peer)
            if field.contestants:
                patience = self.budget.patience_seconds
                if seconds is not None:
                    patience = min(patience, max(0.0, start + seconds - time.monotonic()))
                self._take_turns(case, workload, field, result, patience, run_rounds)
        except Exception as error:  # of ours: this case is lost, the others are not
            traceback.print_exc()
            self._look_at_the_device()
            if ours is not None and self.lost is not None:
                ours.missing = result.missing + field.failed()
                ours.missing.append({"name": "the other peers", "version": "", "reason": self.lost})
                return ours
            result.wrong = f"{case.op}: while being timed, {type(error).__name__}: {error}"
            result.entries.clear()
        return result

    def _look_at_the_device(self) -> None:
        if (reason := unusable(self.device)) is not None:
            self.lost = f"the {self.device.type} device is lost to this process: {reason}"

    def _first_figures(
        self, case: Case, workload: Workload, field: Field, result: CaseResult
    ) -> CaseResult:
        """Ours without peers; `result` and the contestants stay as they are."""
        found = copy.deepcopy(result)
        with field.for_itself(found, _FIRST_ROUNDS):
            self._take_turns(case, workload, field, found, 0.0, None)
        reason = "the run ended before they were timed"
        found.missing.append({"name": "the peers", "version": "", "reason": reason})
        return found

    def _take_turns(
        self,
        case: Case,
        workload: Workload,
        field: Field,
        result: CaseResult,
        patience: float,
        run_rounds: RunRounds | None,
    ) -> None:
        ceilings: dict[str, Copy | Product] = {"copy": self._copy}
        if result.counted_flops:
            shape = workload.product_shape and workload.product_shape(case)
            ceilings["product"] = Product(self.device, case.dtype, shape)
        turns = {name: self._ceiling_turns(ceiling) for name, ceiling in ceilings.items()}
        first, *others = field.contestants.values()
        with torch.set_grad_enabled(case.mode != "forward"):
            take_turns(
                first, [*others, *turns.values()], self.device, probe=self._probe,
                patience_seconds=patience, run_rounds=run_rounds,
            )  # fmt: skip
        seconds = {name: statistics.median(c.kept) for name, c in turns.items()}
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


def unusable(device: torch.device) -> str | None:
    """What the device answers where it does no more work, as a GPU behind an illegal access."""
    try:
        torch.zeros(1, device=device).add_(1)
        synchronize(device)
    except Exception as error:
        return described(error)
    return None
