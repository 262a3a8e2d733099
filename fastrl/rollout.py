"""Sampling: each prompt is read once, the state is carried, finished rows leave the batch."""

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from fastrl import ops as fast_ops
from fastrl.models.protocol import PolicyModel


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Completions and what is known of them, packed: N tokens of C completions, no padding.

    Attributes:
        prompts: P tensors [P_g] int64.
        token_ids: [N] int64, the completions back to back, those of a prompt together; an EOS is
            a completion's last token.
        cu_seqlens: [C+1] int32, where each completion starts and ends.
        group_ids: [C] int64, the prompt of each completion.
        ended: [C] bool, True where EOS came, False where the length ran out.
        logprobs: [N] float32, of the tokens as they were sampled.
        rewards: [N] float32, following each token; None until they are known.
        is_used: [C] bool, False where a completion's reward is unusable; None until it is known.
    """

    prompts: list[Tensor]
    token_ids: Tensor
    cu_seqlens: Tensor
    group_ids: Tensor
    ended: Tensor
    logprobs: Tensor
    rewards: Tensor | None = None
    is_used: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        """[C] int64, tokens of each completion, EOS included."""
        return self.cu_seqlens.diff().long()

    @property
    def loss_mask(self) -> Tensor:
        """[N] bool, the tokens of the completions that are used."""
        if self.is_used is None:
            return torch.ones_like(self.token_ids, dtype=torch.bool)
        return self.is_used.repeat_interleave(self.lengths)

    @property
    def completion_ids(self) -> list[Tensor]:
        """Each completion's token ids."""
        return list(self.token_ids.split(self.lengths.tolist()))


@torch.no_grad()
def generate(
    model: PolicyModel,
    prompts: list[Tensor],
    *,
    completions_per_prompt: int = 1,
    max_new_tokens: int,
    seeds: Tensor,
    temperature: float = 1.0,
    eos_token_id: int | None = None,
    ops: ModuleType = fast_ops,
) -> Rollout:
    """Sample completions of each prompt.

    Args:
        model: the policy.
        prompts: P tensors [P_g] int64, P_g >= 1, of any lengths, on the model's device.
        completions_per_prompt: G; there are C = P · G completions.
        max_new_tokens: where a completion stops without EOS.
        seeds: [C] int64, as `completion_seeds` gives them. A completion's draws depend on its
            seed alone: not on the other rows, nor on torch's generator.
        temperature: of the sampling; 0 takes the likeliest token.
        eos_token_id: ends a completion and is its last token; None: all have max_new_tokens.
        ops: `fastrl.ops` or `fastrl.reference`.
    Returns:
        A Rollout without rewards.
    Raises:
        ValueError: no prompts, an empty prompt, or seeds of another shape.
        TypeError: prompts that are not int64.
    """
    num_completions = len(prompts) * completions_per_prompt
    _check(prompts, seeds, num_completions, max_new_tokens)
    device = prompts[0].device
    seeds = seeds.to(device)
    hidden, state = model.prefill(prompts)
    # The first token's logits are the prompt's: computed once, sampled from by each completion.
    logits = model.lm_head(hidden).repeat_interleave(completions_per_prompt, dim=0)
    state = model.repeat_state(state, completions_per_prompt)
    rows = torch.arange(num_completions, device=device)
    ended = torch.zeros(num_completions, dtype=torch.bool, device=device)
    steps: list[tuple[Tensor, Tensor, Tensor]] = []  # of the rows still running
    for step in range(max_new_tokens):
        token_ids, logprobs = ops.sample_tokens(
            logits, temperature=temperature, seeds=seeds, step=step
        )
        steps.append((rows, token_ids, logprobs))
        if eos_token_id is not None:
            is_eos = token_ids == eos_token_id
            running = torch.nonzero(~is_eos).squeeze(1)
            if running.numel() < rows.numel():
                ended[rows[is_eos]] = True
                rows, token_ids, seeds = rows[running], token_ids[running], seeds[running]
                state = model.select_state(state, running)
        if rows.numel() == 0 or step + 1 == max_new_tokens:
            break
        hidden, state = model.decode(token_ids, state)
        logits = model.lm_head(hidden)

    return _packed(prompts, steps, ended)


def _packed(
    prompts: list[Tensor], steps: list[tuple[Tensor, Tensor, Tensor]], ended: Tensor
) -> Rollout:
    """The Rollout of what each step's running rows sampled: (rows, token_ids, logprobs)."""
    num_completions = ended.numel()
    rows, token_ids, logprobs = (torch.cat(column) for column in zip(*steps, strict=True))
    order = torch.argsort(rows, stable=True)  # by completion; time order stays within each
    lengths = torch.bincount(rows, minlength=num_completions)
    group_ids = torch.arange(len(prompts), device=rows.device)
    return Rollout(
        prompts=prompts,
        token_ids=token_ids[order],
        cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
        group_ids=group_ids.repeat_interleave(num_completions // len(prompts)),
        ended=ended,
        logprobs=logprobs[order],
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


def _check(prompts: list[Tensor], seeds: Tensor, num_completions: int, max_new_tokens: int) -> None:
    if not prompts:
        raise ValueError("generate: expected prompts, got none. Pass at least one.")
    for index, prompt in enumerate(prompts):
        if prompt.dtype != torch.int64:
            raise TypeError(
                f"generate: expected prompts int64, got {prompt.dtype} at {index}. "
                "Convert them with .long()."
            )
        if prompt.dim() != 1 or prompt.numel() == 0:
            raise ValueError(
                "generate: expected prompts [P_g] with P_g >= 1, got "
                f"{tuple(prompt.shape)} at {index}. Start an empty prompt with a BOS token."
            )
    if seeds.shape != (num_completions,):
        raise ValueError(
            f"generate: expected seeds [C] = ({num_completions},), one for each completion, got "
            f"{tuple(seeds.shape)}. Make them with completion_seeds."
        )
    if max_new_tokens < 1:
        raise ValueError(
            f"generate: expected max_new_tokens >= 1, got {max_new_tokens}. Sample one at least."
        )
