"""A trainer's outside, as checkpoints see it, around a few lines of training."""

import copy
from pathlib import Path

import torch

from fastrl.models import LSTMLanguageModel
from fastrl.trainers import PolicyGradientConfig, checkpoint
from fastrl.trainers.health import check_finite


class StandIn:
    def __init__(self, model=None, reward_functions=None, config=None, dataset=(1, 2, 3)):
        torch_state = torch.get_rng_state()
        torch.manual_seed(0)
        self.model = model or LSTMLanguageModel(8, 8, 24, 1)
        torch.set_rng_state(torch_state)
        self.reference = copy.deepcopy(self.model).requires_grad_(False)
        self.config = config or PolicyGradientConfig()
        self.reward_function = reward_functions
        self.dataset = list(dataset)
        self.tokenizer = None
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda n: 1 / (1 + n))
        self.step = 0
        self.baseline = torch.zeros(3, dtype=torch.float64)
        self.replay = []
        self.own_checkpoint = None

    @property
    def checkpoint_folder(self):
        output_dir = self.config.output_dir
        return None if output_dir is None else Path(output_dir) / "checkpoint"

    def train(self, max_steps=None, on_step=None):
        max_steps = max_steps or self.config.max_steps
        folder, every = self.checkpoint_folder, self.config.save_every
        if folder is not None and folder.resolve() != self.own_checkpoint:
            checkpoint.check_unused(folder)
        records = []
        while self.step < max_steps:
            records.append(self._step())
            if on_step:
                on_step(records[-1])
            if folder is not None and (self.step == max_steps or every and self.step % every == 0):
                self.save(folder)
        return records

    def _step(self):
        tokens = torch.randint(8, (4, 6), generator=torch.Generator().manual_seed(self.step))
        rewards = torch.tensor(self.reward_function(completion_ids=tokens.tolist()))
        logits, _ = self.model(tokens)
        loss = (logits.log_softmax(-1).mean((1, 2)) * rewards.mean(1)).sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.step += 1
        self.baseline += rewards.double().mean()
        self.replay = [*self.replay, tokens][-2:]
        return {"step": self.step, "loss": float(loss.detach())}

    def state_dict(self):
        functions = self.reward_function
        stateful = {"f": functions.state_dict()} if hasattr(functions, "state_dict") else {}
        return {
            "step": self.step,
            "baseline": self.baseline,
            "replay": list(self.replay),
            "scorer": stateful,
        }

    def load_state_dict(self, state):
        self.step, self.replay = state["step"], state["replay"]
        self.baseline.copy_(state["baseline"])
        for function in state["scorer"].values():
            self.reward_function.load_state_dict(function)

    def save(self, folder):
        check_finite(self)
        checkpoint.save(self, Path(folder))
        self.own_checkpoint = Path(folder).resolve()

    def resume(self, folder):
        checkpoint.resume(self, Path(folder))
        self.own_checkpoint = Path(folder).resolve()
        return self
