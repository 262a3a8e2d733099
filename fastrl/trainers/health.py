"""What keeps a run sound: one policy in sampling and learning, and no state that is not finite."""

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastrl.models.storage import check_saveable
from fastrl.trainers import checkpoint

if TYPE_CHECKING:
    from fastrl.trainers.experience import Experience
    from fastrl.trainers.trainer import Trainer

_STEPS_WITHOUT_AN_END = 5  # in a row: one or two of them a long run may have


class TrainingDivergedError(FloatingPointError):
    """The numbers went bad and stayed bad; the last good checkpoint stands."""


def check_finite(trainer: "Trainer") -> None:
    """Raise a TrainingDivergedError where a weight or an optimizer moment is not finite."""
    weights = trainer.model.state_dict().values()
    tensors = [*weights, *checkpoint.optimizer_tensors(trainer).values()]
    is_bad = not all(bool(tensor.isfinite().all()) for tensor in tensors)
    if trainer.processes.any("the check of numbers", is_bad):  # each has other moments
        raise TrainingDivergedError(
            f"{type(trainer).__name__}: expected finite weights and optimizer moments at step "
            f"{trainer.step}, got NaN or infinite ones, and wrote no checkpoint. Lower "
            "learning_rate and resume from the last one."
        )


class TruncationWatch:
    """Says once that mask_truncated has left nothing to learn from, for several steps in a row."""

    def __init__(self) -> None:
        self._steps = 0
        self._has_warned = False

    def look(self, trainer: "Trainer", known: "Experience") -> None:
        """At what a step is about to learn from."""
        if not trainer.config.mask_truncated or self._has_warned:
            return
        learns, is_usable = torch.stack(
            [known.is_learned.any(), known.rollout.loss_mask.any()]
        ).tolist()
        self._steps = 0 if learns or not is_usable else self._steps + 1
        if self._steps == _STEPS_WITHOUT_AN_END:
            self._has_warned = True
            warnings.warn(
                f"{type(trainer).__name__}: nothing was learned in {self._steps} steps in a row: "
                f"all completions reached max_new_tokens = {trainer.config.max_new_tokens} "
                f"without an end, and mask_truncated, with which this {trainer.config.algorithm} "
                "runs, leaves such out. Raise max_new_tokens, begin with a model that ends its "
                "texts, set stop_strings, or set mask_truncated=False.",
                RuntimeWarning,
                stacklevel=6,  # where train was called
            )


def warn_of_16_bit_weights(trainer: "Trainer") -> None:
    """Say where trained weights are of a dtype in which most of a step is rounded away."""
    narrow = [x for x in trainer.parameters if x.dtype in (torch.bfloat16, torch.float16)]
    if not narrow:
        return
    name = str(narrow[0].dtype).removeprefix("torch.")
    warnings.warn(
        f"{type(trainer).__name__}: weights of dtype {name} are trained. A step that is smaller "
        f"than {torch.finfo(narrow[0].dtype).eps / 2:.1g} of a weight leaves it as it is: with "
        "usual learning rates most of them never move. Load the model with dtype=torch.float32, "
        'and set precision="bfloat16" for layers in bfloat16.',
        RuntimeWarning,
        stacklevel=4,  # where train was called
    )


def without_dropout(model: nn.Module, *, will_learn_with_it: bool = False) -> None:
    """Make every pass compute the same: the policy that samples is the one that learns.

    Args:
        will_learn_with_it: `set_learning` will switch dropout on.
    Raises:
        ValueError: an LSTM's dropout, which cannot be off while it learns.
    """
    model.eval()
    for name, module in model.named_modules():
        if not isinstance(module, nn.RNNBase) or will_learn_with_it:
            continue
        if module.dropout > 0:
            raise ValueError(
                f"Trainer: expected model without dropout in {name}, got {module.dropout}. "
                "Set it to 0: sampling and learning have to see the same policy. "
                "Or set dropout=True."
            )
        module.train()  # cuDNN has a backward pass in training mode only


def set_learning(trainer: "Trainer", learning: bool) -> None:
    """Dropout and gradient checkpointing, where the config has them, are on while learning."""
    if trainer.config.dropout:
        trainer.model.train(learning)
    if trainer.config.gradient_checkpointing:
        for policy in _policies(trainer):
            policy.gradient_checkpointing(learning)


def _policies(trainer: "Trainer") -> list[Any]:
    """What learns: the policy, and a critic that is another model."""
    critic = getattr(trainer.model, "critic", None)
    return [trainer.policy] if critic is None else [trainer.policy, critic]


def check_trainable(trainer: "Trainer") -> None:
    """Raise an error where nothing would be trained, or what is could not be saved."""
    if not trainer.parameters:
        raise ValueError(
            f"{type(trainer).__name__}: expected a model with weights to train, got all of them "
            "frozen. Set requires_grad, or load the adapter with is_trainable=True."
        )
    if trainer.config.output_dir is not None:  # now, and not after the last step
        for policy in _policies(trainer):
            check_saveable(policy)


def weighs_importance(trainer: "Trainer") -> bool:
    """Whether some tokens are not the policy's own of this step."""
    return trainer.rollout_function is not None or getattr(trainer.config, "replay_size", 0) > 0


def check_importance(trainer: "Trainer") -> None:
    """Raise a ValueError where a cap is set and there is nothing to weigh."""
    config = trainer.config
    own = type(config).importance_cap
    if not weighs_importance(trainer) and config.importance_cap != own:
        raise ValueError(
            f"{type(trainer).__name__}: expected importance_cap {own} without rollout_function and "
            f"replay, got {config.importance_cap!r}. Leave it out for the default."
        )


def check_checkpointing(trainer: "Trainer") -> None:
    """Raise a ValueError where gradient checkpointing is asked of a model without it."""
    if not trainer.config.gradient_checkpointing:
        return
    for policy in _policies(trainer):
        if not hasattr(policy, "gradient_checkpointing"):
            raise ValueError(
                f"{type(trainer).__name__}: expected a model with gradient checkpointing, got "
                f"{type(policy).__name__}. Set gradient_checkpointing=False."
            )
        for is_on in (True, False):  # a model of transformers whose layers cannot says so
            policy.gradient_checkpointing(is_on)
