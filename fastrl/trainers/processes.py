"""Several processes train one model: what they share out, and what they tell each other."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastrl.layout import PackedBatch
from fastrl.rollout import Rollout
from fastrl.trainers._digest import digest
from fastrl.trainers._exchange import Exchange
from fastrl.trainers._shares import shares
from fastrl.trainers.prompts import Example, PromptDataset
from fastrl.trainers.replay import joined, rollout_of_state, state_of_rollout

if TYPE_CHECKING:
    from fastrl.trainers.trainer import Trainer

_BUCKET = 1 << 25  # entries of gradients that are added up in one call


class Processes(Exchange):
    """The processes that train one model together, of which this is one; usually it is alone.

    Each samples from its share of a step's prompts. Then all of them know all completions, so that
    rewards, advantages, the loss's denominators and the metrics are formed of the whole batch, as
    in one process. The passes over the tokens are shared out again, by completions of about as
    many tokens, and gradients are added up: weights stay the same everywhere.
    """

    @torch.no_grad()
    def begin(self, trainer: "Trainer") -> None:
        """Give every process the first one's weights.

        Raises:
            ValueError: in all of them, where they were not told to do the same.
        """
        self.device = trainer.device
        if self.count == 1:
            return
        model = trainer.model
        self.check_equal("trainer", type(trainer).__name__)
        self.check_equal("config", trainer.config.to_dict())
        self.check_dataset(trainer.dataset)
        self.check_equal(
            "arguments",
            {
                "eos_token_ids": trainer.eos_token_ids,
                "ops": trainer.ops.__name__,
                "rollout_function": trainer.rollout_function is not None,
                "environment": trainer.environment is not None,
            },
        )
        tensors = dict([*model.named_parameters(), *model.named_buffers()])
        self.check_equal(
            "model",
            {n: (str(x.dtype), tuple(x.shape), x.requires_grad) for n, x in tensors.items()},
        )
        for tensor in tensors.values():
            self.broadcast(tensor)

    def check_equal(self, name: str, value: Any) -> None:
        """Raise a ValueError in all processes where they have different ones."""
        first, *others = self.told(f"the check of {name}", value)
        for other in others:
            if other != first:
                raise ValueError(
                    f"Trainer: expected the same {name} in all processes, got "
                    f"{_differences(first, other)}. They train one model: give all the same."
                )

    def check_dataset(self, dataset: PromptDataset) -> None:
        """Raise a ValueError in all processes where one has other prompts, a part for instance."""
        if self.count > 1:
            self.check_equal("dataset", (len(dataset), dataset.digest))

    def check_weights(self, trainer: "Trainer") -> None:
        """Raise a ValueError in all processes where one has other trained weights."""
        if self.count > 1:
            weights = {
                name: digest(weight)
                for name, weight in trainer.model.named_parameters()
                if weight.requires_grad
            }
            self.check_equal("weights", weights)

    def slice_of(self, count: int) -> slice:
        """This process's of `count` prompts."""
        start, stop = (count * rank // self.count for rank in (self.rank, self.rank + 1))
        return slice(start, stop)

    def examples(self, dataset: PromptDataset, indices: list[int]) -> list[Example]:
        """Entries as the first process reads them; their columns are for its reward functions."""
        own = [dataset[index] for index in indices] if self.rank == 0 else []
        if self.count == 1:
            return own
        first = self.told("reading", [Example(x.prompt, _sent(x.token_ids), {}) for x in own])[0]
        return own if self.rank == 0 else first

    def gathered(self, num_prompts: int, sample: Callable[[slice], Rollout]) -> Rollout:
        """The rollout of all prompts; sample(part) gives that of a slice of them."""
        own = self.slice_of(num_prompts)
        if self.count == 1:
            return sample(own)
        state = None
        if own.start < own.stop:
            found = state_of_rollout(sample(own))
            found["group_ids"] = found["group_ids"] + own.start
            state = {name: _sent(x) for name, x in found.items()}
        states = [state for state in self.told("sampling", state) if state is not None]
        _complete(states)
        return joined([rollout_of_state(x, self.device) for x in states], renumber=False)

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
        if self.count == 1:
            return function(batch)
        every = torch.ones_like(batch._host_completion_segments, dtype=torch.bool)
        own = self.own(batch, every)
        found = torch.zeros(count, len(batch.target_ids), dtype=torch.float64, device=self.device)
        if own.any():
            part = batch.take(own)
            found[:, part.source_targets] = torch.stack(function(part)).double()
        self.meet("computing")
        self.add(found)
        return found.unbind()

    def owned(self, parameters: list[nn.Parameter], rank: int | None = None) -> list[nn.Parameter]:
        """Those whose moments a process, this one or that of the rank, keeps and steps for all:
        about as many entries for each."""
        rank = self.rank if rank is None else rank
        loads, owners = [0] * self.count, [0] * len(parameters)
        for index in sorted(range(len(parameters)), key=lambda i: -parameters[i].numel()):
            owners[index] = loads.index(min(loads))
            loads[owners[index]] += parameters[index].numel()
        return [p for p, owner in zip(parameters, owners, strict=True) if owner == rank]

    @torch.no_grad()
    def give_stepped(self, parameters: list[nn.Parameter]) -> None:
        """Give every process what the owners' optimizers have made of those with a gradient."""
        if self.count == 1:
            return
        self.meet("the optimizer's step")
        for owner in range(self.count):
            stepped = [p for p in self.owned(parameters, owner) if p.grad is not None]
            for some in _buckets(stepped):
                flat = torch.cat([p.flatten() for p in some])
                self.broadcast(flat, owner)
                if owner != self.rank:
                    for p, new in zip(some, flat.split([p.numel() for p in some]), strict=True):
                        p.copy_(new.view(p.shape))

    def gathered_moments(
        self, moments: dict[str, dict[str, Tensor]], names: list[str]
    ) -> dict[str, dict[str, Tensor]]:
        """Those of all processes by the weights' names: in the first one, others get none.

        Args:
            moments: this one's.
            names: of all weights, in their order.
        """
        if self.count == 1:
            return moments
        shapes = {
            name: {s: (tuple(x.shape), x.dtype) for s, x in slots.items()}
            for name, slots in moments.items()
        }
        everyone = self.told("the moments", shapes)
        found: dict[str, dict[str, Tensor]] = {}
        for name in names:
            for owner, of_owner in enumerate(everyone):
                for slot, (shape, dtype) in of_owner.get(name, {}).items():
                    if owner == self.rank:
                        tensor = moments[name][slot].to(self.device)
                    else:
                        tensor = torch.empty(shape, dtype=dtype, device=self.device)
                    self.broadcast(tensor, owner)
                    if self.rank == 0:
                        found.setdefault(name, {})[slot] = tensor if owner == 0 else tensor.cpu()
        return found

    def add_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Give every process the sum of all gradients; what has none anywhere stays without.

        As `add`, behind a place where all have met.
        """
        if self.count == 1:
            return
        has = torch.tensor([float(p.grad is not None) for p in parameters], device=self.device)
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
                if p.grad is None:
                    p.grad = torch.empty_like(p)
                p.grad.copy_(total.view(p.shape))


def _sent(x: Tensor) -> Tensor:
    """On the host, and without the rest of a larger tensor that it may be a part of."""
    return x.to("cpu", copy=True)


def _complete(states: list[dict[str, Tensor]]) -> None:
    """All rollouts, each of some prompts, with what one of them has."""
    names = set[str]().union(*states)
    for state in states:
        if missing := sorted(names - state.keys() - {"is_used"}):
            raise ValueError(
                f"rollout_function: expected {', '.join(missing)} in the Rollouts of all processes "
                "or of none, got some without. Give all of them the same."
            )
        if "is_used" in names:
            state.setdefault("is_used", torch.ones_like(state["ended"]))


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
