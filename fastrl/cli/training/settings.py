"""The options of `fastrl train`, as they stand on the command line and in a run's config.json."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

# What may differ when a run goes on: where it runs, not what it computes.
MACHINE_FIELDS = ("resume", "output", "threads", "device")


class SettingsError(ValueError):
    """An option has a value that cannot work; the message says which."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Train a language model on a text: by maximum likelihood, then with immediate rewards.

    Policy gradient and actor-critic each start from the warmed-up model. The reward of a token is
    how much closer it brings the completion to the true continuation, less what repeats or makes
    no sense.
    """

    corpus: Path | None = None
    """a UTF-8 text file; the default is the documentation that Python carries"""
    output: Path | None = None
    """the run's folder, new or empty; the default is runs/<date and time>"""
    resume: Path | None = None
    """go on with the run in this folder, with its settings"""
    seed: int = 0
    """decides the held-out text, the weights, the order of prompts and every sample"""
    ops: Literal["fastrl", "reference"] = "fastrl"
    """which implementation computes: the fast one, or plain PyTorch"""
    device: str = "auto"
    """auto, cpu or cuda; auto takes cuda where there is one"""
    threads: int = 1
    """CPU threads; two are 1.6 times as fast on an idle machine, far slower on a busy one"""

    max_characters: int = 4_000_000
    """the text is cut after so many characters"""
    held_out_fraction: float = 0.12
    """share of the text that is only evaluated on; half as much again picks the warm-up's best"""
    vocab_size: int = 2048
    """tokens of the BPE vocabulary, at most"""
    embed_dim: int = 128
    """width of the embedding"""
    hidden_dim: int = 256
    """width of each LSTM layer"""
    num_layers: int = 1
    """number of LSTM layers"""

    warmup_steps: int = 700
    """steps of maximum likelihood"""
    warmup_batch: int = 16
    """sequences in such a step"""
    warmup_length: int = 64
    """tokens of such a sequence"""
    warmup_learning_rate: float = 5e-3
    """AdamW's, falling linearly to a twentieth"""

    steps: int = 80
    """steps of policy gradient, and of actor-critic"""
    prompts_per_step: int = 16
    """prompts in such a step"""
    completions_per_prompt: int = 8
    """completions of each prompt, at least 2"""
    prompt_tokens: int = 32
    """tokens of a prompt"""
    completion_tokens: int = 24
    """tokens of a completion, at most, and of the true continuation"""
    learning_rate: float = 7e-4
    """AdamW's, of both"""
    temperature: float = 0.7
    """of the policy, when sampling and when learning"""
    gamma: float = 0.95
    """what a reward counts one token earlier, in [0, 1]; 0 is purely immediate"""
    kl_coef: float = 0.008
    """weight of the penalty on moving away from the warmed-up model"""
    entropy_coef: float = 0.0
    """weight of the entropy bonus"""
    repetition_penalty: float = 0.5
    """what saying three words in a row again costs, over the words of the true continuation"""
    strangeness_penalty: float = 0.25
    """what two words in a row that the training text never has cost, likewise"""

    evaluation_prompts: int = 400
    """held-out prompts to evaluate on, at most"""
    evaluation_completions: int = 4
    """completions of each of them"""
    save_every: int = 40
    """steps between checkpoints"""

    def check(self) -> None:
        """Raise a SettingsError for a value that cannot work."""
        least = {"seed": 0, "vocab_size": 320, "completions_per_prompt": 2, "completion_tokens": 2}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            low = least.get(field.name, 1 if isinstance(field.default, int) else 0)
            if not (math.isfinite(value) and value >= low):
                raise _bad(field.name, f">= {low}", value)
        for name in ("learning_rate", "warmup_learning_rate", "temperature"):
            if getattr(self, name) == 0:
                raise _bad(name, "> 0", 0)
        if self.gamma > 1:
            raise _bad("gamma", "in [0, 1]", self.gamma)
        if not 0 < self.held_out_fraction <= 0.4:
            raise _bad("held_out_fraction", "in (0, 0.4]", self.held_out_fraction)

    def to_json(self) -> dict[str, Any]:
        """The fields that make the run what it is."""
        fields = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in MACHINE_FIELDS
        }
        # Absolute: a resume may start in another directory.
        fields["corpus"] = None if self.corpus is None else str(self.corpus.absolute())
        return fields

    def resumed(self, saved: Any) -> "TrainSettings":
        """The settings of a saved run, on the machine that these ask for.

        Raises:
            SettingsError: these ask for something that the saved run has settled, or `saved` is not
                what `to_json` gave.
        """
        default = TrainSettings()
        names = default.to_json().keys()
        if not isinstance(saved, dict) or saved.keys() != names:
            raise SettingsError(
                "train: expected the settings of this version of fastrl in config.json, got "
                "others. Resume with the version that started the run."
            )
        changed = [name for name in names if getattr(self, name) != getattr(default, name)]
        if self.output is not None:
            changed.append("output")
        if changed:
            raise SettingsError(
                f"train: expected --resume without {_option(changed[0])}, got "
                f"{getattr(self, changed[0])}. A run goes on with its own settings, in its folder."
            )
        fields = {**saved, **{name: getattr(self, name) for name in MACHINE_FIELDS}}
        fields["corpus"] = None if saved["corpus"] is None else Path(saved["corpus"])
        return TrainSettings(**fields)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _bad(name: str, expected: str, got: object) -> SettingsError:
    return SettingsError(
        f"train: expected {_option(name)} {expected}, got {got}. Leave it out for the default."
    )
