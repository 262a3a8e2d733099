"""What a step's record says of its completions. The names that TRL has too are TRL's.

step, epoch, num_tokens (tokens in the rollouts so far, prompts once), learning_rate
reward (mean over used completions of the sum over their tokens), reward_std,
  rewards/<function>/mean and /std, rewards/bad, /none, /timeouts, /errors (completions),
  frac_reward_zero_std (prompts whose completions all have the same reward)
loss, grad_norm (before clipping), advantage: means; over the gradient steps, over the tokens
entropy (nats per token, over those learned from), kl (from the starting model, nats per token)
kl_coef, entropy_coef, temperature: as they were in the step
completions/mean_length, /min_length, /max_length, /clipped_ratio (ran out of length),
  /mean_terminated_length (0 where none has ended)
logprob_gap: largest difference between sampling and update, before the first gradient step (where
  nothing was learned from: of one prompt's completions, and so is the entropy)
sampling/sampling_logp_difference/mean, /max; sampling/importance_sampling_ratio/min, /mean, /max:
  with a rollout function
clip_ratio/low_mean, /high_mean, /region_mean: share of tokens whose ratio left its bounds
value, value_error (mean squared), explained_variance: of a critic
bad_steps (in a row), skipped_updates (of the run)
gold/...: of held-out prompts, in steps after which an attached `OverOptimizationMonitor` evaluates
tokens_per_second (that the policy wrote), time/rollout, /reward, /update, /step (s)
"""

from typing import TYPE_CHECKING, Any

import torch

from fastrl.rollout import Rollout
from fastrl.trainers.prompts import Example
from fastrl.trainers.scoring import Scores
from fastrl.trainers.tokens import to_numbers

if TYPE_CHECKING:
    from fastrl.trainers.trainer import Trainer


def rollout_metrics(rollout: Rollout) -> dict[str, float]:
    """Of the completions' lengths and rewards; computed on the host, from one transfer."""
    lengths = rollout.batch._host_completion_bounds.diff().double()
    columns = [rollout.ended.double()]
    if rollout.rewards is not None and rollout.is_used is not None and len(lengths):
        totals = rollout.per_completion(rollout.rewards.double(), "sum", initial=0)
        columns += [totals, rollout.is_used.double(), rollout.group_ids.double()]
    flags, *of_rewards = torch.stack(columns).cpu()
    ended, nan = flags > 0, lengths.new_full((), torch.nan)
    metrics = {
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min() if len(lengths) else nan,
        "completions/max_length": lengths.max() if len(lengths) else nan,
        "completions/clipped_ratio": 1 - ended.double().mean(),
        "completions/mean_terminated_length": lengths[ended].sum() / ended.sum().clamp(min=1),
    }
    if of_rewards:
        totals, is_used, group = of_rewards
        names, group = group.unique(return_inverse=True)
        used = is_used > 0
        ends = [
            torch.full((len(names),), fill, dtype=torch.float64).scatter_reduce_(
                0, group[used], totals[used], kind
            )
            for kind, fill in (("amin", torch.inf), ("amax", -torch.inf))
        ]
        metrics["frac_reward_zero_std"] = (ends[0] >= ends[1]).double().mean()
    return to_numbers(metrics)


def metrics_of_given_rewards(given: Rollout, rollout: Rollout) -> dict[str, float]:
    """Of a rollout that came with rewards: what a scorer would say of them.

    Args:
        given: as it came.
        rollout: the same with the completions that are used.
    """
    assert given.rewards is not None and rollout.rewards is not None
    if not len(rollout.lengths):
        return {}
    totals, bad = (
        rollout.per_completion(x.double(), "sum", initial=0)
        for x in (rollout.rewards, ~given.rewards.isfinite())
    )
    used = totals if rollout.is_used is None else totals[rollout.is_used]
    spread = used.std() if len(used) > 1 else used.new_full((), torch.nan)
    return to_numbers({"reward": used.mean(), "reward_std": spread, "rewards/bad": (bad > 0).sum()})


class Samples:
    """The last step's completions, made readable when somebody asks."""

    def __init__(
        self, trainer: "Trainer", examples: list[Example], rollout: Rollout, scores: Scores | None
    ) -> None:
        self._trainer, self._examples = trainer, examples
        self._rollout, self._scores = rollout, scores

    def rows(self) -> list[dict[str, Any]]:
        dataset, rollout = self._trainer.dataset, self._rollout
        eos = self._trainer.eos_token_ids
        completions = [dataset.decode(ids.tolist(), eos) for ids in rollout.completion_ids]
        assert rollout.rewards is not None and rollout.is_used is not None
        totals = rollout.per_completion(rollout.rewards.double(), "sum", initial=0)
        rewards = totals.where(rollout.is_used, torch.nan).tolist()
        columns = {} if self._scores is None else self._scores.columns
        return [
            {
                "prompt": self._examples[group].prompt,
                "completion": completion,
                "reward": total,
                **{f"rewards/{name}": column[index] for name, column in columns.items()},
            }
            for index, (group, completion, total) in enumerate(
                zip(rollout.group_ids.tolist(), completions, rewards, strict=True)
            )
        ]
