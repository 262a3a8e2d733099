"""Sampling: each prompt is read once, finished rows make room for the next, and the Rollout."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from fastrl import ops as fast_ops
from fastrl._sampling import Completions, Environment, Stop, check_lengths, check_sampling
from fastrl._transfer import on_device
from fastrl.layout import PackedBatch
from fastrl.models.protocol import PolicyModel

__all__ = ["Environment", "Rollout", "completion_seeds", "generate"]


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Completions and what is known of them, packed: M tokens that the policy wrote.

    A completion's tokens that it did not write (a tool's, a user's next turn) are in the batch but
    are no targets. Conversations that branch come from `PackedBatch.from_segments`; each of their
    segments with targets is a completion.

    Attributes:
        batch: the prompts and their C completions, each token once; its targets are the M tokens.
        group_ids: [C] int64, the prompt of each completion.
        ended: [C] bool, True where EOS or a stop string came, False where the length ran out.
        logprobs: [M] float32, of the tokens as they were sampled, at the temperature of sampling.
        values: [M] float32, V before each token, as the critic saw it while sampling; or None.
        rewards: [M] float32, following each token; None until they are known.
        is_used: [C] bool, False where a completion's reward is unusable; None until it is known.
    """

    batch: PackedBatch
    group_ids: Tensor
    ended: Tensor
    logprobs: Tensor
    values: Tensor | None = None
    rewards: Tensor | None = None
    is_used: Tensor | None = None

    @property
    def token_ids(self) -> Tensor:
        """[M] int64, the tokens that the policy wrote."""
        return self.batch.target_ids

    @property
    def cu_seqlens(self) -> Tensor:
        """[C+1] int32, where each completion's targets start and end."""
        return self.batch.completion_cu_seqlens

    @property
    def lengths(self) -> Tensor:
        """[C] int64, targets of each completion, EOS included."""
        return self.cu_seqlens.diff().long()

    @property
    def loss_mask(self) -> Tensor:
        """[M] bool, the targets of the completions that are used."""
        if self.is_used is None:
            return torch.ones_like(self.token_ids, dtype=torch.bool)
        return self.over_targets(self.is_used)

    def over_targets(self, x: Tensor) -> Tensor:
        """[C] -> [M]: each completion's number at its targets."""
        # Who is not told how many there are asks the device, and waits for it.
        return x.repeat_interleave(self.lengths, output_size=len(self.token_ids))

    def per_completion(self, x: Tensor, how: str, initial: float) -> Tensor:
        """[M] -> [C]: "sum", "min" or "max" over each completion's targets, and `initial`."""
        # Lengths that are not taken as they are, though they are the batch's, are waited for too.
        return torch.segment_reduce(x, how, lengths=self.lengths, initial=initial, unsafe=True)

    @property
    def completion_ids(self) -> list[Tensor]:
        """Each completion's token ids, those included that the policy did not write."""
        segments = self.batch.layout.unpack(self.batch.token_ids)
        return [segments[s] for s in self.batch._host_completion_segments.tolist()]

    @property
    def is_target(self) -> list[Tensor]:
        """For each completion's token ids, bool: True where the policy wrote them."""
        is_target = torch.zeros_like(self.batch.token_ids, dtype=torch.bool)
        is_target[self.batch.target_index] = True
        segments = self.batch.layout.unpack(is_target)
        return [segments[s] for s in self.batch._host_completion_segments.tolist()]

    def take(self, completions: Tensor) -> "Rollout":
        """Some of the completions, [C] bool; see `PackedBatch.take`."""
        batch = self.batch.take(completions)
        at, rows = batch.source_targets, batch.source_completions
        return Rollout(
            batch=batch,
            group_ids=self.group_ids[rows],
            ended=self.ended[rows],
            logprobs=self.logprobs[at],
            values=None if self.values is None else self.values[at],
            rewards=None if self.rewards is None else self.rewards[at],
            is_used=None if self.is_used is None else self.is_used[rows],
        )


@torch.no_grad()
def generate(
    model: PolicyModel,
    prompts: list[Tensor],
    *,
    completions_per_prompt: int = 1,
    max_new_tokens: int,
    seeds: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    stop_strings: Sequence[str] = (),
    decode: Callable[[list[int]], str] | None = None,
    environment: Environment | None = None,
    max_rows: int | None = None,
    value_fn: Callable[[Tensor], Tensor] | None = None,
    ops: ModuleType = fast_ops,
) -> Rollout:
    """Sample completions of each prompt.

    Args:
        model: the policy.
        prompts: P tensors [P_g] int64, P_g >= 1, of any lengths, on the model's device.
        completions_per_prompt: G; there are C = P · G completions.
        max_new_tokens: where a completion stops without EOS; the environment's tokens count.
        seeds: [C] int64, as `completion_seeds` gives them. A completion's draws depend on its
            seed alone: not on the other rows, nor on torch's generator.
        temperature: of the sampling; 0 takes the likeliest token.
        top_k, top_p: sample from the likeliest tokens alone (`fastrl.sample_tokens`). The
            log-probabilities stay those of the whole distribution.
        eos_token_id: one or several ids that end a completion and are its last token; None: none.
        stop_strings: a completion ends with the token whose text completes one of these.
        decode: ids to text, for stop_strings.
        environment: called as environment(index, prompt_ids, completion_ids) when completion
            `index` has ended; returns the ids of what it is answered, with which it goes on, or
            None. What it answers is read but is no target.
        max_rows: most completions that are sampled at a time; when some finish, the next take
            their places. None: all at once.
        value_fn: hidden [R, D] -> values [R], for `Rollout.values`.
        ops: `fastrl.ops` or `fastrl.reference`.
    Returns:
        A Rollout without rewards.
    Raises:
        ValueError: no prompts, an empty prompt, seeds of another shape, a number out of its range,
            more tokens than the model has positions for, where it has a table of them, or an answer
            of the environment with an id outside the vocabulary.
        TypeError: prompts that are not int64; an answer of the environment that is no list of ids.
    """
    num_completions = len(prompts) * completions_per_prompt
    check_sampling(prompts, seeds, num_completions, max_new_tokens, max_rows, stop_strings, decode)
    check_lengths(prompts, max_new_tokens, getattr(model, "num_positions", None))
    device = prompts[0].device
    (seeds,) = on_device([seeds], device)
    mixed_steps = _mix(torch.arange(max_new_tokens, device=device))
    stop = Stop(eos_token_id, stop_strings, decode, model.vocab_size)
    completions = Completions(
        prompts, completions_per_prompt, max_new_tokens, stop, environment, model.vocab_size
    )
    limit = min(num_completions, max_rows or num_completions)
    decoder = model.decoder(limit, max_new_tokens)
    logits_of = model.head.for_sampling(limit)
    # The logits of a prompt's first token are computed once, and sampled from by each completion.
    waiting: dict[int, Tensor] = {}  # last hidden states of prompts whose rows are not all open
    # The completions that are running, on the host: what is known there need not be waited for.
    rows = torch.empty(0, dtype=torch.int64, device="cpu")
    seeds_of_rows = steps = seeds[:0]  # their seeds, and how many tokens each one has
    hidden: Tensor | None = None
    num_read = num_opened = 0
    while True:
        left = num_completions - num_opened
        free = min(limit - rows.numel(), left)
        # Some at a time: few long reads of prompts are faster than many short ones.
        if left and (rows.numel() == 0 or free >= min(limit // 8 + 1, left)):
            new = range(num_opened, num_opened + free)
            owners = [completion // completions_per_prompt for completion in new]
            if owners[-1] >= num_read:
                read = decoder.read(prompts[num_read : owners[-1] + 1])
                waiting.update(enumerate(read.unbind(), num_read))
                num_read = owners[-1] + 1
            decoder.open(owners)
            first = torch.stack([waiting[owner] for owner in owners])
            hidden = first if hidden is None else torch.cat([hidden, first])
            rows = torch.cat([rows, torch.arange(new.start, new.stop, device="cpu")])
            seeds_of_rows = torch.cat([seeds_of_rows, seeds[new.start : new.stop]])
            steps = torch.cat([steps, torch.zeros_like(seeds[new.start : new.stop])])
            num_opened += free
            waiting = {p: x for p, x in waiting.items() if p >= owners[-1]}
        if rows.numel() == 0:
            break
        assert hidden is not None
        token_ids, logprobs = ops.sample_tokens(
            logits_of(hidden),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seeds=_mix(seeds_of_rows ^ mixed_steps[steps]),
        )
        steps = steps + 1
        values = None if value_fn is None else value_fn(hidden)
        token_ids, running = completions.add(rows, token_ids, logprobs, values)
        if running is not None:
            rows = rows[running]
            (running,) = on_device([running], device)
            token_ids, steps = token_ids[running], steps[running]
            seeds_of_rows = seeds_of_rows[running]
            decoder.keep(running)
        hidden = decoder.step(token_ids) if rows.numel() else None
    batch, logprobs, values = completions.packed()
    (ended,) = on_device([completions.ended], device)
    return Rollout(
        batch=batch,
        group_ids=torch.arange(num_completions, device=device) // completions_per_prompt,
        ended=ended,
        logprobs=logprobs,
        values=None if value_fn is None else values,
    )


def completion_seeds(seed: int, stream: int, keys: Tensor, completions_per_prompt: int) -> Tensor:
    """One seed for each completion, from what it is and not from when it is drawn.

    Args:
        seed: the run's.
        stream: keeps uses apart that share seed and keys (training, evaluation).
        keys: [P] int64, one for each prompt of the run.
        completions_per_prompt: G.
    Returns:
        [P · G] int64, not negative.
    """
    sample = torch.arange(completions_per_prompt)
    base = _mix(_mix(torch.tensor(seed & 0x7FFFFFFFFFFFFFFF)) + stream)
    return (_mix(_mix(base + keys)[:, None] + sample) & 0x7FFFFFFFFFFFFFFF).flatten()


def _mix(x: Tensor) -> Tensor:
    """splitmix64's output function; int64 products wrap around, masks make the shifts logical."""
    x = x - 0x61C8864680B583EB
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
