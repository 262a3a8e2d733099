"""attention's launchers as on a given chip with a small L2, for the interpreter, which has none."""

from unittest.mock import patch

from fastrl.kernels import _attention_configs, _attention_operands, attention


def _on(chip, descriptors, launcher, arguments):
    def fit(chip, *tensors):
        return descriptors and _attention_configs.descriptors_fit(chip, *tensors)

    with (
        patch.object(_attention_configs, "chip", lambda: chip),
        patch.object(_attention_configs, "_L2_SHARE", 80_000),
        patch.object(_attention_operands, "chip", lambda: chip),
        patch.object(_attention_operands, "descriptors_fit", fit),
    ):
        return launcher(*arguments)


def attention_fwd(chip, descriptors, *arguments):
    return _on(chip, descriptors, attention.attention_fwd, arguments)


def attention_bwd(chip, descriptors, *arguments):
    return _on(chip, descriptors, attention.attention_bwd, arguments)
