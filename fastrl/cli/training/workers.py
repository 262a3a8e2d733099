"""The processes that torchrun starts for one run; usually a run has one."""

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import (
    AbstractContextManager,
    ExitStack,
    contextmanager,
    nullcontext,
    redirect_stderr,
    redirect_stdout,
)
from datetime import timedelta

import torch
import torch.distributed as dist

from fastrl.cli.recipes.toml import RecipeError
from fastrl.trainers._exchange import Exchange

# Rewards may take long, people's above all, and where a process has died, torchrun ends the others.
_LONGEST_WAIT = timedelta(days=30)


class Workers(Exchange):
    """The processes of one run, of which this is one.

    Each builds everything that the recipe describes, and all take the same way through the run. The
    first has the folder and the terminal: what depends on a file, it looks up and tells the others.

    Attributes:
        started: how many there are, before they are connected too.
    """

    def __init__(self) -> None:
        super().__init__(None)
        self.started = self.count if self.count > 1 else _number("WORLD_SIZE", 1)
        if self.count == 1 and self.started > 1:
            self.rank = _number("RANK", 0)  # so that what is wrong from the start is said once

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Within, they speak to each other.

        Raises:
            RecipeError: torchrun's variables are not all there.
        """
        if self.count == self.started:
            yield
            return
        if missing := [n for n in ("RANK", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ]:
            raise RecipeError(
                f"train: expected {', '.join(missing)} in the environment beside WORLD_SIZE = "
                f"{self.started}, got none. Start several processes with torchrun, or unset it."
            )
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=_LONGEST_WAIT)
        super().__init__(None)
        with warnings.catch_warnings():
            if not self.is_first:  # it says them too
                warnings.simplefilter("ignore", RuntimeWarning)
            yield
        dist.destroy_process_group()  # where the run has failed, others may be in the middle of it

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def speaks(self) -> bool:
        """Whether this is the process that says what has failed: the first in which it did."""
        return self.rank == min(self.failed, default=self.rank if self.count > 1 else 0)

    @property
    def local_rank(self) -> int | None:
        """This process's number on its machine, and that of its GPU; None where it is alone."""
        return _number("LOCAL_RANK", self.rank) if self.count > 1 else None

    @contextmanager
    def said_once(self) -> Iterator[None]:
        """Within, the first process alone prints."""
        with ExitStack() as stack:
            if not self.is_first:
                stack.enter_context(redirect_stdout(io.StringIO()))
                stack.enter_context(redirect_stderr(io.StringIO()))
            yield

    def first_in(self, context: AbstractContextManager[None]) -> AbstractContextManager[None]:
        """A context that the first process alone enters."""
        return context if self.is_first else nullcontext()


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else default
