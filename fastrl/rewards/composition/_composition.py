"""What all compositions share: their parts are called together, checked, and remembered by name."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastrl.rewards._calling import (
    Call,
    Caller,
    accepted,
    distinct_names,
    own_arguments,
    parameters_of,
)
from fastrl.rewards._states import check_keys, load_states, stateful, states
from fastrl.rewards.composition._entries import Entry, checked, usable_totals

Part = Callable[..., Any]
Parts = Mapping[str, Part] | Sequence[Part]


@dataclass(frozen=True)
class Batch:
    """What a composition knows of the completions, and where it logs.

    Attributes:
        prompts: of each completion.
        lengths: number of ids of each.
        firsts, lasts: index of the first and the last id that the policy wrote, of each; 0 and -1
            where none is known.
        step: trainer_state.global_step, or None.
        log_metric: the trainer's, or None.
        path: names of the compositions from the outermost in, with / between.
    """

    prompts: Sequence[Any]
    lengths: list[int]
    firsts: list[int]
    lasts: list[int]
    step: float | None
    log_metric: Callable[[str, float], None] | None
    path: str

    def log(self, part: str, kind: str, number: float) -> None:
        """A number about a part; slashes make it no name of the scorer's."""
        if self.log_metric is not None:
            self.log_metric(f"rewards/{self.path}/{part}/{kind}", number)


class Composition:
    """A reward function made of others.

    Its parts are called as a trainer calls reward functions, each with those arguments that it
    names and lists of its own, async ones beside each other: those of compositions inside it too.
    Each gives a number, a list of one number per id, or None for a completion. Where a completion
    has both numbers and lists, a number stands at the last id that the policy wrote, as a trainer's
    is_target says; without is_target at the last one. A completion without lists gets a number.
    What lists have at ids that the policy did not write counts here, and a trainer drops it.

    None is no opinion: such a part is left out of that completion; where all are, so is the
    composition. NaN and infinity are handed on, so that the trainer masks the completion; no
    statistic counts them.

    Where the trainer gives log_metric, each part's mean, before anything is done to it, goes to
    "rewards/<composition>/<part>/mean", over completions with a finite total; other figures stand
    beside it. The names of compositions inside stand between: give two compositions of one run
    different names.

    Args:
        parts: reward functions by name, or a list of them, named as they are called.
        name: what metrics call it.
    Raises:
        ValueError: no parts; a name is empty or has a slash.
        TypeError: a part cannot be called.
    """

    def __init__(self, parts: Parts, name: str) -> None:
        self.__name__ = name
        self._op = type(self).__name__
        self.parts = _named(self._op, parts)
        self._remembered: dict[str, Any] = {}  # what has a state beside the parts, by name
        leaves = dict(self.leaves())
        self._leaf_names = list(leaves)
        self._parameters = [parameters_of(leaf) for leaf in leaves.values()]
        self._caller = Caller(list(leaves.values()), timeout=None)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        **arguments: Any,
    ) -> list[Entry]:
        """Rewards of a batch.

        Args:
            prompts, completions, completion_ids: one for each completion.
            arguments: columns, is_target, log_metric, log_extra, trainer_state: handed on to the
                parts.
        Returns:
            For each completion a number, a list of one number per id, or None.
        Raises:
            ValueError: a part's list, or an entry of it, is of the wrong length; a schedule needs
                the step, and there is no trainer_state.
            TypeError: an entry is neither a number, nor a list of numbers, nor None.
            RuntimeError: a part raised; the cause stands in `__cause__`.
        """
        firsts, lasts = _ends(arguments.get("is_target"), len(completion_ids))
        batch = Batch(
            prompts=prompts,
            lengths=[len(ids) for ids in completion_ids],
            firsts=firsts,
            lasts=lasts,
            step=getattr(arguments.get("trainer_state"), "global_step", None),
            log_metric=arguments.get("log_metric"),
            path=self.__name__,
        )
        arguments |= {
            "prompts": prompts,
            "completions": completions,
            "completion_ids": completion_ids,
        }
        own = [own_arguments(accepted(arguments, names)) for names in self._parameters]
        calls = self._caller(own)
        # All of them checked before the first statistic changes.
        results = [
            checked(_result(call, self._op, name), batch.lengths, self._op, name)
            for call, name in zip(calls, self._leaf_names, strict=True)
        ]
        return self._evaluated(iter(results), batch)

    def state_dict(self) -> dict[str, Any]:
        """Its own statistics, and by name the states of the parts and schedules that have one."""
        own = {name: owner.state_dict() for name, owner in self._remembered.items()}
        return {"parts": states(self.parts), **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the state that `state_dict` had.

        Raises:
            ValueError: the composition, or its parts with a state, are others.
        """
        expected = f"{self._op} {self.__name__}: expected"
        check_keys(state, {"parts", *self._remembered}, f"{expected} a state with")
        check_keys(state["parts"], stateful(self.parts), f"{expected} states of the parts")
        load_states(self.parts, state["parts"])
        for name, owner in self._remembered.items():
            owner.load_state_dict(state[name])

    def _combined(self, given: dict[str, list[Entry]], batch: Batch) -> list[Entry]:
        """The composition's rewards from those of its parts."""
        raise NotImplementedError

    def leaves(self) -> Iterator[tuple[str, Part]]:
        """The functions to call, in the order of `_evaluated`."""
        for name, part in self.parts.items():
            if isinstance(part, Composition):
                yield from ((f"{name}/{path}", leaf) for path, leaf in part.leaves())
            else:
                yield name, part

    def _evaluated(self, results: Iterator[list[Entry]], batch: Batch) -> list[Entry]:
        given: dict[str, list[Entry]] = {}
        for name, part in self.parts.items():
            if isinstance(part, Composition):
                inner = replace(batch, path=f"{batch.path}/{name}")
                given[name] = part._evaluated(results, inner)
            else:
                given[name] = next(results)
            batch.log(name, "mean", mean_of(given[name]))
        return self._combined(given, batch)


def mean_of(entries: Sequence[Entry]) -> float:
    """The mean of the finite totals; NaN of none."""
    totals, _ = usable_totals(entries)
    return math.fsum(totals) / len(totals) if totals else math.nan


def _ends(is_target: Sequence[Sequence[bool]] | None, count: int) -> tuple[list[int], list[int]]:
    if is_target is None:
        return [0] * count, [-1] * count
    own = [[i for i, is_own in enumerate(row) if is_own] or [0, -1] for row in is_target]
    return [ids[0] for ids in own], [ids[-1] for ids in own]


def _named(op: str, parts: Parts) -> dict[str, Part]:
    wanted = "Pass functions f(prompts, completions, completion_ids, **columns) -> list."
    is_many = isinstance(parts, Mapping | Sequence) and not isinstance(parts, str)
    if not is_many or not parts:
        got = "none" if is_many else repr(parts)
        raise ValueError(
            f"{op}: expected parts in a list or dict, at least one, got {got}. {wanted}"
        )
    functions = list(parts.values() if isinstance(parts, Mapping) else parts)
    for function in functions:
        if not callable(function):
            raise TypeError(f"{op}: expected parts to be callable, got {function!r}. {wanted}")
    names = list(parts) if isinstance(parts, Mapping) else distinct_names(functions)
    for name in names:
        if not isinstance(name, str) or not name or "/" in name:
            raise ValueError(
                f"{op}: expected names of parts without a slash, got {name!r}. Pass a dict with a "
                "name for each part."
            )
    return dict(zip(names, functions, strict=True))


def _result(call: Call, op: str, part: str) -> Any:
    if call.error is not None:
        raise RuntimeError(
            f"{op}: expected part {part} to give rewards, got {type(call.error).__name__}: "
            f"{call.error}. Repair the part, or leave it out."
        ) from call.error
    return call.result
