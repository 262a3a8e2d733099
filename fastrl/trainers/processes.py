"""Several processes train one model: what they share out, and what they tell each other."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastrl.layout import PackedBatch
from fastrl.rollout import Rollout
from fastrl.trainers._shares import shares
from fastrl.trainers.replay import joined, rollout_of_state, state_of_rollout

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from fastrl.trainers.trainer import Trainer

T = TypeVar("T")

_BUCKET = 1 << 25  # entries of gradients that are added up in one call


class Processes:
    """The processes that train one model together, of which this is one; usually it is alone.

    Each samples from its share of a step's prompts. Then all of them know all completions, so that
    rewards, advantages, the loss's denominators and the metrics are formed of the whole batch, as
    in one process. The passes over the tokens are shared out again, by completions of about as
    many tokens, and gradients are added up: weights stay the same everywhere.

    Args:
        group: of torch.distributed; None: its default group where that is initialised, else none.
        device: of the model.
    Attributes:
        count, rank: how many there are, and which one this is.
    """

    def __init__(self, group: "ProcessGroup | None", device: torch.device) -> None:
        has_others = dist.is_available() and dist.is_initialized()
        self.count = dist.get_world_size(group) if has_others else 1
        self.rank = dist.get_rank(group) if has_others else 0
        self._group, self._device = group, device
        if self.rank < 0:
            raise ValueError(
                "Trainer: expected process_group to have this process in it, got one without. "
                "Make the trainer in the processes of the group alone."
            )

    @torch.no_grad()
    def begin(self, trainer: "Trainer") -> None:
        """Give every process the first one's weights.

        Raises:
            ValueError: in all of them, where they were not told to do the same.
        """
        if self.count == 1:
            return
        self._check_equal("trainer", type(trainer).__name__)
        self._check_equal("config", trainer.config.to_dict())
        self._check_equal("dataset", (len(trainer.dataset), trainer.dataset.digest))
        model = trainer.model
        self._check_equal(
            "model", {n: str((x.dtype, x.shape)) for n, x in model.state_dict().items()}
        )
        with self._here():
            for tensor in (*model.parameters(), *model.buffers()):
                dense = tensor.detach().contiguous()
                dist.broadcast(dense.view(-1).view(torch.uint8), group=self._group, group_src=0)
                tensor.copy_(dense)

    def _check_equal(self, name: str, value: Any) -> None:
        first, *others = self._told(value)
        for other in others:
            if other != first:
                raise ValueError(
                    f"Trainer: expected the same {name} in all processes, got "
                    f"{_differences(first, other)}. They train one model: give all the same."
                )

    def slice_of(self, count: int) -> slice:
        """This process's of `count` prompts."""
        start, stop = (count * rank // self.count for rank in (self.rank, self.rank + 1))
        return slice(start, stop)

    def gathered(self, num_prompts: int, sample: Callable[[slice], Rollout]) -> Rollout:
        """The rollout of all prompts; sample(part) gives that of a slice of them.

        Raises:
            RuntimeError: sampling has failed in another process. Its own error is raised there.
        """
        own = self.slice_of(num_prompts)
        if self.count == 1:
            return sample(own)

        def state() -> Any:
            if own.start == own.stop:
                return None
            found = state_of_rollout(sample(own))
            found["group_ids"] = found["group_ids"] + own.start
            return {name: x.cpu() for name, x in found.items()}

        states = self._attempted(state)
        rollouts = [rollout_of_state(x, self._device) for x in states if x is not None]
        return joined(rollouts, renumber=False)

    def on_first(self, function: Callable[[], T]) -> T:
        """What the function returns in the first process, where alone it is called.

        Raises:
            RuntimeError: it has failed there, where its own error is raised.
        """
        if self.count == 1:
            return function()
        return self._attempted(function if self.rank == 0 else lambda: None)[0]

    def own(self, batch: PackedBatch, active: Tensor) -> Tensor:
        """[C] bool on the host: the active completions that this process computes."""
        if self.count == 1:
            return active
        return active & (shares(batch, active, self.count) == self.rank)

    def computed(
        self, batch: PackedBatch, function: Callable[[PackedBatch], tuple[Tensor, ...]], count: int
    ) -> tuple[Tensor, ...]:
        """function(batch): `count` tensors [M] of one dtype, each process computing some targets.

        Its numbers must not depend on the other completions.
        """
        every = torch.ones(len(batch._host_completion_segments), dtype=torch.bool)
        if self.count == 1:
            return function(batch)
        own = self.own(batch, every)
        found = torch.zeros(count, len(batch.target_ids), dtype=torch.float64, device=self._device)
        if own.any():
            part = batch.take(own)
            found[:, part.source_targets] = torch.stack(function(part)).double()
        self.add(found)
        return found.unbind()

    def add(self, *tensors: Tensor) -> None:
        """Add up what each process has, in place."""
        if self.count > 1:
            with self._here():
                for tensor in tensors:
                    dist.all_reduce(tensor, group=self._group)

    def add_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Give every process the sum of all gradients; what has none anywhere stays without."""
        if self.count == 1:
            return
        has = torch.tensor([float(p.grad is not None) for p in parameters], device=self._device)
        self.add(has)
        for some in _buckets([p for p, n in zip(parameters, has.tolist(), strict=True) if n]):
            wide = torch.float64 if some[0].dtype == torch.float64 else torch.float32
            flat = torch.cat(
                [
                    (torch.zeros_like(p) if p.grad is None else p.grad).flatten().to(wide)
                    for p in some
                ]
            )
            self.add(flat)
            for p, total in zip(some, flat.split([p.numel() for p in some]), strict=True):
                p.grad = total.view(p.shape).to(p.dtype)

    def any(self, flag: bool) -> bool:
        """Whether one of the processes says so."""
        return flag if self.count == 1 else any(self._told(flag))

    def _attempted(self, function: Callable[[], Any]) -> list[Any]:
        """What the function returns in each process; where one fails, all raise an error."""
        result, error = None, None
        try:
            result = function()
        except Exception as raised:
            error = raised
        told = self._told((result, None if error is None else f"{type(error).__name__}: {error}"))
        if error is not None:
            raise error
        for rank, (_, failure) in enumerate(told):
            if failure is not None:
                raise RuntimeError(f"Trainer: process {rank} has failed with {failure}")
        return [each for each, _ in told]

    def _told(self, value: Any) -> list[Any]:
        """What each process says."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        with self._here():
            dist.all_gather_object(values, value, group=self._group)
        return values

    def _here(self) -> AbstractContextManager[Any]:
        """NCCL sends from the current device, whatever the model's is."""
        is_cuda = self._device.type == "cuda"
        return torch.cuda.device(self._device) if is_cuda else nullcontext()


def _differences(first: Any, other: Any) -> str:
    """Of two dicts, the entries that differ."""
    if not (isinstance(first, dict) and isinstance(other, dict)):
        return f"{first!r} and {other!r}"
    names = [n for n in {**first, **other} if first.get(n) != other.get(n)]
    return ", ".join(f"{n} {first.get(n)!r} and {other.get(n)!r}" for n in names[:3])


def _buckets(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Runs of one dtype, of a bounded number of entries in all."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        is_other = bool(bucket) and bucket[0].dtype != parameter.dtype
        if bucket and (is_other or size + parameter.numel() > _BUCKET):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.numel()
    if bucket:
        yield bucket
