"""What processes say to each other, so that what fails in one of them is an error in all."""

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")
Said = tuple[str, bytes, str | None]  # where a process is, what it says, and how it has failed
_ELSEWHERE = "elsewhere"  # what has failed there


class ProcessFailedError(RuntimeError):
    """Another process has failed, so this one cannot go on."""


class ConnectionLostError(ProcessFailedError):
    """Another process is gone, killed for instance."""


class Exchange:
    """The processes of a group, of which this is one: all come to the same places in one order.

    One that fails says so in place of what it would have said next, and there the others raise
    an error. So do all where they have come to different places. Tensors have no place for a
    failure: `add` and `broadcast` stand behind a `meet` or `told`, with nothing between that
    fails in one process alone.

    Args:
        group: of torch.distributed; None: its default group where that is initialised, else none.
    Attributes:
        count, rank: how many there are, and which one this is.
        device: of the tensors; the host's until theirs is known.
        failed: the processes in which it was that what was done together last has failed.
    """

    def __init__(self, group: "ProcessGroup | None") -> None:
        has_others = dist.is_available() and dist.is_initialized()
        self.count = dist.get_world_size(group) if has_others else 1
        self.rank = dist.get_rank(group) if has_others else 0
        self.device = torch.device("cpu")
        self.failed: list[int] = []
        self._group = group
        self._depth = 0  # of what is done together, within each other
        self._is_known = False  # to the others, what has failed here last
        if self.rank < 0:
            raise ValueError(
                "Trainer: expected process_group to have this process in it, got one without. "
                "Make the trainer in the processes of the group alone."
            )

    @contextmanager
    def together(self) -> Iterator[None]:
        """What all processes do, and end together: where it fails in this one, the others are told.

        One within another, as an evaluation in a callback, does not wait at its end.
        """
        self._is_known = False
        self._depth += 1
        try:
            yield
            if self._depth == 1:
                self.meet("the end")
        except (Exception, SystemExit) as error:
            if self.count > 1 and not self._is_known:
                place = _ELSEWHERE if isinstance(error, ProcessFailedError) else ""
                with suppress(RuntimeError):  # a lost connection says less than the error itself
                    said = self._said((place, b"", f"{type(error).__name__}: {error}"))
                    where = [failure is not None and p != _ELSEWHERE for p, _, failure in said]
                    self.failed = [rank for rank, here in enumerate(where) if here]
                self._is_known = True
            raise
        finally:
            self._depth -= 1

    def told(self, place: str, value: Any = None) -> list[Any]:
        """What each process says at a place that all of them come to.

        Raises:
            ProcessFailedError: another process has failed.
            RuntimeError: it is somewhere else.
        """
        if self.count == 1:
            return [value]
        said = self._said((place, pickle.dumps(value), None))
        self._is_known = True
        for rank, (_, _, failure) in enumerate(said):
            if failure is not None:
                raise ProcessFailedError(f"Trainer: process {rank} has failed with {failure}")
        for rank, (other, _, _) in enumerate(said):
            if other != place:
                raise RuntimeError(
                    f"Trainer: expected all processes to do the same, got process {self.rank} at "
                    f"{place} and process {rank} at {other}. Call train, evaluate, save and resume "
                    "in all of them, with the same arguments, and attach the same parts."
                )
        self._is_known = False
        return [pickle.loads(data) for _, data, _ in said]

    def meet(self, place: str) -> None:
        """Wait until all have come here; see `told`."""
        self.told(place)

    def on_first(self, place: str, function: Callable[[], T]) -> T:
        """What the function returns in the first process, where alone it is called."""
        if self.count == 1:
            return function()
        first: T = self.told(place, function() if self.rank == 0 else None)[0]
        return first

    def any(self, place: str, flag: bool) -> bool:
        """Whether one of the processes says so."""
        return any(self.told(place, flag))

    def add(self, *tensors: Tensor) -> None:
        """Add up what each process has, in place."""
        if self.count > 1:
            with self._sending():
                for tensor in tensors:
                    dist.all_reduce(tensor, group=self._group)

    def broadcast(self, tensor: Tensor, source: int = 0) -> None:
        """Give every process the bits of one, the first, in place."""
        own = tensor.detach()
        for dim in (d for d, stride in enumerate(own.stride()) if stride == 0):
            own = own.narrow(dim, 0, 1)  # all of them are this one
        dense = own.clone(memory_format=torch.contiguous_format)
        with self._sending():  # bytes, as some kinds of numbers cannot be sent
            dist.broadcast(dense.view(-1).view(torch.uint8), group=self._group, group_src=source)
        own.copy_(dense)

    def _said(self, own: Said) -> list[Said]:
        said: list[Any] = [None] * self.count
        with self._sending():
            dist.all_gather_object(said, own, group=self._group)
        return said

    @contextmanager
    def _sending(self) -> Iterator[None]:
        """NCCL sends from the current device, whatever the model's is."""
        is_cuda = self.device.type == "cuda"
        try:
            with torch.cuda.device(self.device) if is_cuda else nullcontext():
                yield
        except Exception as error:
            self._is_known = True  # who is not connected cannot be told
            if isinstance(error, dist.DistError) or "onnection" in str(error):  # gloo's has no type
                raise ConnectionLostError(
                    "Trainer: expected all processes to be there, got no answer from another: "
                    f"{str(error).splitlines()[0]}"
                ) from error
            raise
