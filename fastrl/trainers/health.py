"""What keeps a run sound: one policy in sampling and learning, and no state that is not finite."""

from typing import TYPE_CHECKING

from torch import nn

from fastrl.trainers import checkpoint

if TYPE_CHECKING:
    from fastrl.trainers.trainer import Trainer


class TrainingDivergedError(FloatingPointError):
    """The numbers went bad and stayed bad; the last good checkpoint stands."""


def check_finite(trainer: "Trainer") -> None:
    """Raise a TrainingDivergedError where a weight or an optimizer moment is not finite."""
    weights = trainer.model.state_dict().values()
    tensors = [*weights, *checkpoint.optimizer_tensors(trainer).values()]
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise TrainingDivergedError(
            f"{type(trainer).__name__}: expected finite weights and optimizer moments at step "
            f"{trainer.step}, got NaN or infinite ones, and wrote no checkpoint. Lower "
            "learning_rate and resume from the last one."
        )


def without_dropout(model: nn.Module) -> None:
    """Make every pass compute the same: the policy that samples is the one that learns."""
    model.eval()
    for name, module in model.named_modules():
        if not isinstance(module, nn.RNNBase):
            continue
        if module.dropout > 0:
            raise ValueError(
                f"Trainer: expected model without dropout in {name}, got {module.dropout}. "
                "Set it to 0: sampling and learning have to see the same policy."
            )
        module.train()  # cuDNN has a backward pass in training mode only
