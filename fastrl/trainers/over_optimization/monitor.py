"""The monitor: measures, tests, warns, and does what it was told to do about it."""

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastrl.models import reference_policy
from fastrl.rollout import completion_seeds
from fastrl.trainers import checkpoint
from fastrl.trainers._attachments import StopTraining
from fastrl.trainers.over_optimization._arguments import (
    check_arguments,
    check_prompts,
    digest,
    scorer_of,
)
from fastrl.trainers.over_optimization.measures import measure
from fastrl.trainers.over_optimization.sequential_test import PartingTest, Verdict
from fastrl.trainers.scoring import RewardFunction

if TYPE_CHECKING:
    from fastrl.trainers.trainer import Trainer

_EVALUATIONS = 5  # a stream of random numbers apart from the trainer's


class OverOptimizationMonitor:
    """Watches a run for the moment when more of its reward is less of what is wanted.

    Attach it, behind other parts: `trainer.attach("over_optimization", monitor)`. Before the first
    step and after every `every` steps it samples completions of held-out prompts from the policy,
    anew each time (the seed is a function of `seed` and the step), at the config's temperature, and
    scores them with the gold reward and with the trainer's own. The run's random numbers, optimizer
    and reward functions stay as they were.

    **The alarm** goes off where gold falls while the proxy rises, over any of the last 2, 3, 5,
    9, ... evaluations: a one-sided sign-flip test of each prompt's trends, both of which must be
    significant, at levels that add up to `alpha` over the whole run. So `alpha` is the chance that
    a run in which gold never falls, or never while the proxy rises, has an alarm at all. The test
    and what it rests on stand in `fastrl.trainers.over_optimization.sequential_test`; nothing in
    it is tuned. After an alarm it begins anew.

    Two weaker findings only warn, once a run, each with its own error rate of at most `alpha`:
    "falling", gold falls though the proxy is not shown to rise; and "stalled", in the second half
    of the run, gold has not risen since the middle of the evaluations and the proxy has, which
    would have been worth more gold before.

    **What an alarm does.** Each warns (RuntimeWarning), and stands in the record. "lower" also
    doubles `trainer.kl.coef`, or sets it to `kl_start` where it was 0, and halves the weights of
    the reward functions, and with them "reward" in the record (an algorithm that divides
    advantages by their deviation only notices the former). "stop" ends the run: `train` returns,
    and makes no further step when it is called again or after a resume. Where the trainer has an
    output_dir, the checkpoint with the highest mean of gold so far is kept in `output_dir/best`,
    with every action. It is the best as measured: the highest of several means is a little too
    high.

    **The KL budget**: an evaluation whose summed divergence per completion is above `kl_budget`
    sets off the same action; "warn" then warns again only when it has been below in between.

    **The record** of such a step has: "gold/gold", "gold/proxy", "gold/kl" (summed over a
    completion's tokens, nats), each with its standard error over prompts ("gold/gold_stderr", ...),
    "gold/entropy" (nats per token), "gold/distinct_2", "gold/length" (tokens), "gold/p_value",
    "gold/threshold", "gold/alarm" (1 or 0), "gold/falling", "gold/stalled", "gold/over_budget",
    with several gold functions "gold/gold/<function>", and "gold/disagreement" where it was asked
    for. `evaluations` lists those of all evaluations, that before the first step included.

    Args:
        trainer: whose run is watched.
        gold: the reward that counts, as reward functions: one, or a list that is added up. It
            must not be what is trained on. Where the proxy is a reward model, a model that was
            fitted on the other folds of the preferences is one, or a list of several.
        proxy: what is trained on, as a reward that means the same at every step, likewise; None:
            the trainer's, with its weights as they are now. One that is normalised over a group or
            a batch, or whose parts follow a schedule, does not: pass its parts.
        held_out: prompts that are not trained on, in the forms of a trainer's dataset. Too few of
            them are an error: the test could then never say anything.
        every: steps between two evaluations.
        completions_per_prompt: of each prompt, in each evaluation.
        alpha: the family-wise false-alarm rate over the whole run, in (0, 1).
        action: "warn" | "lower" | "stop".
        kl_budget: nats per completion; None: any divergence.
        seed: of the completions.
        disagreement: a reward function, or a list, whose mean is only recorded: for instance how
            far an ensemble of reward models disagrees.
        kl_start: what "lower" sets a KL coefficient of 0 to.
    Raises:
        ValueError: a number or an action out of its range; too few prompts; "lower" without a
            reference.
    """

    def __init__(
        self,
        trainer: "Trainer",
        gold: RewardFunction | Sequence[RewardFunction],
        held_out: Any,
        *,
        every: int = 10,
        completions_per_prompt: int = 1,
        alpha: float = 0.05,
        action: str = "warn",
        kl_budget: float | None = None,
        seed: int = 0,
        proxy: RewardFunction | Sequence[RewardFunction] | None = None,
        disagreement: RewardFunction | Sequence[RewardFunction] | None = None,
        kl_start: float = 0.05,
    ) -> None:
        self._trainer = trainer
        self._every, self._count, self._seed = every, completions_per_prompt, seed
        self._action, self._kl_budget, self._kl_start = action, kl_budget, kl_start
        check_arguments(trainer, every, completions_per_prompt, alpha, action, kl_budget, kl_start)
        self._prompts = trainer.prompts(held_out)
        planned = max(1, (trainer.config.max_steps - trainer.step) // every)
        check_prompts(len(self._prompts), planned, alpha)
        self._digest = digest(self._prompts)
        self._test = PartingTest(alpha, planned)
        self._gold = scorer_of(trainer, gold)
        self._proxy = None if proxy is None else scorer_of(trainer, proxy)
        self._disagreement = None if disagreement is None else scorer_of(trainer, disagreement)
        self._weights = list(trainer.scorer.weights)
        own = reference_policy(trainer.policy) if trainer.reference is None else None
        self._own_reference: Any = own
        self._lowered = 0  # how often
        self._said: list[str] = []  # what is said once
        self._best = -math.inf
        self.evaluations: list[dict[str, float]] = []

    @property
    def best_folder(self) -> Path | None:
        """Where the best checkpoint by gold is kept: `output_dir/best`."""
        output_dir = self._trainer.config.output_dir
        return None if output_dir is None else Path(output_dir) / "best"

    def start(self) -> None:
        """Evaluate the policy that the run starts from, unless that was done.

        Raises:
            StopTraining: with action "stop", at the step of an alarm, where a run has ended.
            ValueError: output_dir holds the best checkpoint of another run.
        """
        self._trainer.processes.check_equal("OverOptimizationMonitor", self._settings())
        if self.evaluations:
            last = self.evaluations[-1]
            is_alarm = last["gold/alarm"] or last["gold/over_budget"]
            if self._action == "stop" and is_alarm and last["step"] == self._trainer.step:
                raise StopTraining(f"Stopped by the alarm at step {last['step']:g}.")
            return
        folder = self.best_folder
        if folder is not None and folder.resolve() not in self._trainer.own_checkpoints:
            checkpoint.check_unused(folder)
        self._evaluate({})

    def __call__(self, record: dict[str, float]) -> None:
        """After a step: evaluate if it is time to, and add what was found to the step's record.

        Raises:
            StopTraining: an alarm, with action "stop".
        """
        if not self.evaluations or self._trainer.step % self._every == 0:
            self._evaluate(record)

    def _evaluate(self, record: dict[str, float]) -> None:
        trainer = self._trainer
        found = measure(
            trainer,
            self._prompts,
            self._own_reference if trainer.reference is None else trainer.reference,
            self._gold,
            self._proxy,
            self._disagreement,
            proxy_weights=self._weights,
            completions_per_prompt=self._count,
            seed=int(completion_seeds(self._seed, _EVALUATIONS, torch.tensor([trainer.step]), 1)),
        )
        verdict = self._test.add(found.gold, found.proxy)
        is_over = self._kl_budget is not None and found.numbers["gold/kl"] > self._kl_budget
        numbers = {
            **found.numbers,
            "gold/p_value": verdict.p_value,
            "gold/threshold": verdict.threshold,
            "gold/alarm": float(verdict.is_alarm),
            "gold/falling": float(verdict.is_falling),
            "gold/stalled": float(verdict.is_stalled),
            "gold/over_budget": float(is_over),
        }
        record.update(numbers)
        self.evaluations.append({"step": float(trainer.step), **numbers})
        alarms = self._alarms(verdict, is_over)
        if alarms and self._action == "lower":
            self._lower()
        self._keep_best(numbers["gold/gold"])
        for alarm in alarms:
            warnings.warn(alarm, RuntimeWarning, stacklevel=2)
        if alarms and self._action == "stop":
            raise StopTraining(" ".join(alarms))

    def _alarms(self, verdict: Verdict, is_over: bool) -> list[str]:
        """What sets off the action, in words; what only warns is said here."""
        now, since = self.evaluations[-1], self.evaluations[verdict.since]
        steps = f"from step {since['step']:g} to {now['step']:g}"
        change = ", ".join(
            f"{name} from {since[f'gold/{name}']:.4g} to {now[f'gold/{name}']:.4g}"
            for name in ("gold", "proxy")
        )
        alarms = []
        if verdict.is_alarm:
            alarms.append(
                f"Over-optimisation: {steps} gold falls while the proxy rises ({change}; p = "
                f"{verdict.p_value:.2g}, level {verdict.threshold:.2g}). {self._consequence}"
            )
        elif verdict.is_falling:
            self._say_once("falling", f"gold falls at step {now['step']:g}")
        if verdict.is_stalled:
            self._say_once("stalled", "the proxy rises, and gold has not since the run's middle")
        if is_over and not (self._action == "warn" and "budget" in self._said):
            alarms.append(
                f"KL budget: {now['gold/kl']:.4g} nats per completion at step {now['step']:g}, "
                f"above kl_budget = {self._kl_budget:g}. {self._consequence}"
            )
        self._said = [said for said in self._said if said != "budget"] + ["budget"] * is_over
        return alarms

    @property
    def _consequence(self) -> str:
        if self._action == "stop":
            return "Training stops."
        if self._action == "lower":
            return "The KL coefficient rises, and the weights of the rewards are halved."
        return "Training goes on: lower its pressure, or keep an earlier checkpoint."

    def _say_once(self, name: str, finding: str) -> None:
        if name not in self._said:
            self._said.append(name)
            warnings.warn(f"Reward {name}: {finding}.", RuntimeWarning, stacklevel=4)

    def _lower(self) -> None:
        kl = self._trainer.kl
        kl.coef = 2 * kl.coef if kl.coef > 0 else self._kl_start
        self._lowered += 1
        self._set_weights()

    def _set_weights(self) -> None:
        factor = 0.5**self._lowered
        self._trainer.scorer.weights = [weight * factor for weight in self._weights]

    def _keep_best(self, gold: float) -> None:
        if gold > self._best:
            self._best = gold
            if self.best_folder is not None:
                self._trainer.save(self.best_folder)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on exactly."""
        own = self._own_reference
        return {
            "settings": self._settings(),
            "test": self._test.state_dict(),
            "evaluations": [dict(evaluation) for evaluation in self.evaluations],
            "lowered": self._lowered,
            "said": list(self._said),
            "best": self._best,
            "reference": own.state_dict() if isinstance(own, nn.Module) else {},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            ValueError: the state is of a monitor with other arguments.
        """
        own = self._settings()
        for name, saved in state["settings"].items():
            if own.get(name) != saved:
                raise ValueError(
                    f"OverOptimizationMonitor: expected {name} {saved!r} as in the checkpoint, got "
                    f"{own.get(name)!r}. Build the monitor as it was then."
                )
        if isinstance(self._own_reference, nn.Module):
            self._own_reference.load_state_dict(state["reference"])
        self._test.load_state_dict(state["test"])
        self.evaluations = [dict(evaluation) for evaluation in state["evaluations"]]
        self._lowered, self._said = state["lowered"], list(state["said"])
        self._best = state["best"]
        self._set_weights()

    def _settings(self) -> dict[str, Any]:
        return {
            "every": self._every,
            "completions_per_prompt": self._count,
            "alpha": self._test.alpha,
            "seed": self._seed,
            "gold": self._gold.names,
            "proxy": (self._trainer.scorer if self._proxy is None else self._proxy).names,
            "number of held-out prompts": len(self._prompts),
            "held-out prompts with SHA-256": self._digest,
        }
