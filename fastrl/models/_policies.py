"""Policies from what people have: models, names, folders. Public in storage.py."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastrl.models.hugging_face import HuggingFacePolicy
from fastrl.models.lstm import LSTMLanguageModel
from fastrl.models.protocol import PolicyModel
from fastrl.models.tensor_file import TensorFile, first_difference, kinds, write_tensors
from fastrl.ops._checks import fail, wrong_type

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_ADAPTER, _ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def as_policy(model: Any) -> Any:
    """A policy of what people have.

    Args:
        model: a policy, which comes back as it is; a causal language model of transformers, bare
            or in a PeftModel, which is wrapped and from then on uses fastrl's attention; or the
            name or folder of one, or a folder of `save_model`, which is loaded, in float32: small
            steps are lost on 16-bit weights (for these, load the model yourself).
    Returns:
        An nn.Module with the methods of `fastrl.models.PolicyModel`.
    Raises:
        ValueError: transformers' model is not one that `fastrl.hf` supports; a broken folder.
        TypeError: something else.
    """
    if isinstance(model, (str, Path)):
        return load_policy(model, torch.float32)
    if isinstance(model, nn.Module):
        if isinstance(model, PolicyModel):
            return model
        if hasattr(model, "peft_config") or _is_of_transformers(model):
            return HuggingFacePolicy(model)
    expected = "model with the methods of fastrl.models.PolicyModel or one of transformers"
    remedy = "Pass an LSTMLanguageModel, a ...ForCausalLM, a PeftModel, or a name."
    raise wrong_type("as_policy", expected, type(model).__name__, remedy)


def _is_of_transformers(model: nn.Module) -> bool:
    return any(cls.__module__.partition(".")[0] == "transformers" for cls in type(model).__mro__)


def check_saveable(policy: Any) -> None:
    """Raise what `save_policy` would, before there is anything to lose."""
    if isinstance(policy, HuggingFacePolicy):
        adapters = list(getattr(policy.adapter, "peft_config", ["default"]))
        if adapters != ["default"]:
            got, remedy = ", ".join(adapters), "Use its own save_pretrained."
            raise fail("save_model", 'one adapter, named "default"', got, remedy)
        if any(getattr(module, "merged", False) is True for module in policy.modules()):
            remedy = "Call unmerge_adapter() before."
            raise fail("save_model", "an adapter beside its model", "one merged with it", remedy)
    elif not isinstance(policy, LSTMLanguageModel):
        expected = "an LSTMLanguageModel, a HuggingFacePolicy or an ActorCritic of these"
        remedy = "Save its state_dict yourself."
        raise wrong_type("save_model", expected, type(policy).__name__, remedy)


def save_policy(policy: Any, folder: Path) -> None:
    """See `fastrl.models.save_model`."""
    check_saveable(policy)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(policy, LSTMLanguageModel):
        document = json.dumps(policy.config, indent=2) + "\n"
        (folder / _CONFIG).write_text(document, encoding="utf-8")
        write_tensors(folder / _WEIGHTS, policy.state_dict())
    else:
        # A training run has a progress bar of its own.
        with _without_progress_bars(), _on_any_rank(policy.causal):
            if policy.adapter is None:
                policy.model.save_pretrained(folder)  # type: ignore[operator]
            else:
                _save_adapter(policy, folder)


def _save_adapter(policy: HuggingFacePolicy, folder: Path) -> None:
    """The adapter; and where it does not say whose it is, the model below it too."""
    adapter: Any = policy.adapter
    if not adapter.peft_config["default"].base_model_name_or_path:
        weights = policy.causal.state_dict().items()
        below = {_name_below(policy.causal, name): weight for name, weight in weights}
        below.pop(None, None)
        policy.causal.save_pretrained(folder, state_dict=below)
    adapter.save_pretrained(folder)


def _name_below(model: Any, name: str) -> str | None:
    """What a weight is called without the adapter around its layer; None of the adapter's own."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    found, module = [], model
    for part in name.split("."):
        if not isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            found.append(part)
        elif part not in ("base_layer", "original_module", "token_adapter"):
            return None
        module = getattr(module, part)
    return ".".join(found)


def load_policy(name_or_folder: str | Path, dtype: torch.dtype | str = "auto") -> Any:
    """See `as_policy`; with "auto" weights have the dtype that they were saved in."""
    folder = Path(name_or_folder)
    if (folder / _ADAPTER).exists():
        return HuggingFacePolicy(_load_adapter(folder, dtype))
    if folder.is_dir():
        config = read_json(folder / _CONFIG)
        if config.get("model_type") == "lstm":
            arguments = {name: size for name, size in config.items() if name != "model_type"}
            model = LSTMLanguageModel(**arguments)
            load_tensors(model, folder / _WEIGHTS)
            return model
    return HuggingFacePolicy(_from_pretrained(name_or_folder, dtype))


def _from_pretrained(name_or_folder: str | Path, dtype: torch.dtype | str) -> Any:
    import fastrl.hf

    fastrl.hf.register()
    auto = _auto_class(Path(name_or_folder))
    options: Any = {"attn_implementation": "fastrl", "dtype": dtype, "output_loading_info": True}
    # What is perhaps downloaded, people want to see.
    quiet: Any = _without_progress_bars() if Path(name_or_folder).is_dir() else nullcontext()
    with quiet:
        loaded: Any = auto.from_pretrained(name_or_folder, **options)
    model, info = loaded
    if info["missing_keys"]:  # transformers draws them, and only warns
        got, remedy = ", ".join(sorted(info["missing_keys"])[:3]), "Is it a causal language model?"
        expected = f"all weights of a {type(model).__name__} in {name_or_folder}"
        raise fail("load_model", expected, f"none for {got}", remedy)
    return model


def _auto_class(folder: Path) -> Any:
    """For models that see images too, which not all are causal language models to transformers."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto as auto

    if folder.is_dir():
        kind = read_json(folder / _CONFIG).get("model_type")
        if kind not in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            if kind in auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
                return AutoModelForImageTextToText
    return AutoModelForCausalLM


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


@contextmanager
def _on_any_rank(model: Any) -> Iterator[None]:
    """Where torch.distributed is at work, save_pretrained writes on rank 0 alone, and elsewhere it
    returns as if it had: a checkpoint there would be one without weights."""
    model.should_save_on_this_rank = lambda is_main_process: is_main_process
    try:
        yield
    finally:
        del model.should_save_on_this_rank


def _load_adapter(folder: Path, dtype: torch.dtype | str) -> Any:
    base = read_json(folder / _ADAPTER).get("base_model_name_or_path")
    if base:
        return _with_adapter(_from_pretrained(base, dtype), folder)
    # transformers would find the adapter here, and put it in where PEFT no longer sees it.
    with tempfile.TemporaryDirectory() as without_adapter:
        for path in folder.iterdir():
            if path.is_file() and not path.name.startswith("adapter_"):
                (Path(without_adapter) / path.name).symlink_to(path.resolve())
        model = _from_pretrained(without_adapter, dtype)
    model.config.name_or_path = model.name_or_path = ""
    return _with_adapter(model, folder)


def _with_adapter(model: Any, folder: Path) -> Any:
    """PEFT only warns of weights that it does not find, as where transformers converts their names,
    and leaves them as they were drawn. Copies of the model's own layers have its dtype, which may
    be a coarser one than was saved."""
    from peft import PeftModel, get_peft_model_state_dict

    loaded = PeftModel.from_pretrained(model, folder, is_trainable=True)
    path = folder / _ADAPTER_WEIGHTS
    if not path.exists():  # in the format of long ago
        return loaded
    saved = TensorFile(path)
    for name, weight in get_peft_model_state_dict(loaded, save_embedding_layers=False).items():
        if name not in saved.names or not torch.equal(saved.read(name).to(weight), weight):
            got = "other numbers" if name in saved.names else "nothing"
            remedy = "Leave its layer out of target_modules, or take another version of PEFT."
            raise fail("load_model", f"PEFT to load {name} of {path}", got, remedy)
    return loaded


def load_tensors(model: nn.Module, path: Path) -> None:
    """A module's weights, which must be those of the file, in shape and dtype."""
    try:
        file = TensorFile(path)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if difference := first_difference(kinds(model.state_dict()), file.kinds()):
        name, wanted, got = difference
        remedy = "Load the folder that the model was saved to."
        raise fail("load_model", f"{name} {wanted} in {path}", got, remedy)
    model.load_state_dict({name: file.read(name) for name in file.names})


def read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if not isinstance(document, dict):
        raise _unreadable(path, f"a {type(document).__name__}")
    return document


def _unreadable(path: Path, why: object) -> ValueError:
    return fail("load_model", f"{path} of a saved model", why, "Pass a folder of save_model.")
