"""Models and tokenizers: those that a recipe asks for."""

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastrl.cli.recipes.device import find_device
from fastrl.cli.recipes.schema import Model, Recipe
from fastrl.cli.recipes.toml import RecipeError
from fastrl.models import ActorCritic, LSTMLanguageModel, storage
from fastrl.models.storage import as_policy
from fastrl.rewards import byte_level_token_bytes
from fastrl.trainers import ActorCriticConfig
from fastrl.trainers._random_state import seed_generators

END_OF_TEXT = "<|endoftext|>"
SPECIAL = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}


def build_model(
    recipe: Recipe,
    tokenizer: Any,
    seed: int,
    start: Path | None = None,
    *,
    local_rank: int | None = None,
) -> nn.Module:
    """What is trained: a policy, or a policy with its critic, with random weights from the seed.

    Args:
        start: a folder with the policy, in the place of what the recipe names.
        local_rank: as for `find_device`.
    Raises:
        RecipeError: the model cannot be loaded or built, or its vocabulary is too small.
    """
    model = recipe.model
    device = find_device(model.device, "model.device", local_rank)
    seed_generators(seed)
    if start is None:
        policy: Any = _language_model(model, tokenizer, lora=True)
    else:
        policy = load_start(start)
    size = policy.vocab_size
    if len(tokenizer) > size:
        raise RecipeError(
            f"train: expected the model of {recipe.source} to have an entry for each of the "
            f"tokenizer's {len(tokenizer)} tokens, got {size}. Take the model's own tokenizer, or "
            "a larger vocab_size."
        )
    if recipe.config_class is not ActorCriticConfig:
        return policy.to(device)
    if model.critic is None:
        critic = None
    elif model.critic == "same" and start is not None:
        critic = load_start(start)
    else:
        critic = _critic(model, tokenizer)
    return ActorCritic(policy, critic=critic).to(device)


def load_start(folder: Path) -> Any:
    """The policy that a supervised part has written.

    Raises:
        RecipeError: there is none.
    """
    try:
        return storage.load_model(folder)
    except (ValueError, OSError) as error:
        raise RecipeError(
            f"train: expected {folder} to hold the model of a [supervised] part, got {error}"
        ) from error


def _critic(model: Model, tokenizer: Any) -> nn.Module:
    if model.critic == "same":
        return _language_model(model, tokenizer, lora=False)
    return _language_model(Model(path=model.critic, dtype=model.dtype), tokenizer, lora=False)


def _language_model(model: Model, tokenizer: Any, *, lora: bool) -> nn.Module:
    if model.lstm is not None:
        try:
            return LSTMLanguageModel(**{"vocab_size": len(tokenizer), **model.lstm})
        except (TypeError, ValueError) as error:
            raise RecipeError(f"train: in model.lstm: {error}") from error
    need("transformers", "hf")
    if model.random is not None:
        base = _random(model, tokenizer)
    else:
        assert model.path is not None, "the parser has looked"
        base = _pretrained(model.path, model.dtype)
    return _policy_of(_with_lora(base, model.lora) if lora and model.lora is not None else base)


def load_policy(name: str, dtype: str) -> nn.Module:
    """A causal language model of transformers, by name or from a folder, as a policy.

    Raises:
        RecipeError: it cannot be loaded.
    """
    need("transformers", "hf")
    return _policy_of(_pretrained(name, dtype))


def _policy_of(base: Any) -> nn.Module:
    try:
        return as_policy(base)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise RecipeError(f"train: expected a model that can be trained, got {error}") from error


def _pretrained(name: str, dtype: str) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype))
    except Exception as error:  # of the hub, of the files, of a config that transformers lacks
        raise RecipeError(
            f"train: expected a model that AutoModelForCausalLM loads, got {name}: {error}"
        ) from error


def _random(model: Model, tokenizer: Any) -> Any:
    """A fresh model; what its config needs of the tokenizer is filled in."""
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

    given = dict(model.random or {})
    kind = given.pop("model_type", None)
    of_tokenizer = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if kind not in CONFIG_MAPPING:
        near = difflib.get_close_matches(str(kind), CONFIG_MAPPING, 1)
        raise RecipeError(
            f"train: expected model.random with a model_type of transformers, got {kind}. "
            + (f"Did you mean {near[0]}?" if near else 'For example model_type = "llama".')
        )
    try:
        config = AutoConfig.for_model(kind, **{**of_tokenizer, **given})
        _check_known(given, config)
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, model.dtype))
    except RecipeError:
        raise
    except Exception as error:  # of a config's own checks
        raise RecipeError(
            "train: expected model.random to be a config of transformers with its model_type, got "
            f"{model.random}: {error}"
        ) from error


def _check_known(given: dict[str, Any], config: Any) -> None:
    """Raise where transformers has put a key aside: its configs take any, and look at their own."""
    default = type(config)()
    for key in given:
        # Older names of rope_parameters are read, and may stay as well.
        if hasattr(config, key) and not hasattr(default, key) and not key.startswith("rope"):
            without = type(config)(**{k: v for k, v in given.items() if k != key}).to_dict()
            both = type(config)(**given).to_dict()
            if any(both.get(k) != v for k, v in without.items() if k != key):
                continue  # an older name that is read too
            near = difflib.get_close_matches(key, (k for k in vars(default) if k[0] != "_"), 1)
            raise RecipeError(
                f"train: expected keys of model.random that a config of {config.model_type} has, "
                f"got {key}. " + (f"Did you mean {near[0]}?" if near else "Take it out.")
            )


def _with_lora(base: Any, arguments: dict[str, Any]) -> Any:
    need("peft", None)
    from peft import LoraConfig, get_peft_model

    try:
        return get_peft_model(base, LoraConfig(**{"task_type": "CAUSAL_LM", **arguments}))
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f"train: expected model.lora to be arguments of peft.LoraConfig, got {arguments}: "
            f"{error}"
        ) from error


def load_tokenizer(source: str) -> Any:
    """A tokenizer of transformers: by name, from a folder or a tokenizer.json, or "bytes".

    Raises:
        RecipeError: it cannot be loaded.
    """
    need("transformers", "hf")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if source == "bytes":
        return _bytes_tokenizer()
    try:
        if Path(source).is_file():
            return PreTrainedTokenizerFast(tokenizer_file=source)
        if is_ours(Path(source)):  # AutoTokenizer would ask transformers what model that is
            return PreTrainedTokenizerFast.from_pretrained(source)
        return AutoTokenizer.from_pretrained(source)
    except Exception as error:  # of the hub, of the files
        raise RecipeError(
            f'train: expected model.tokenizer to be a name, a folder, a tokenizer.json or "bytes", '
            f"got {source}: {error}"
        ) from error


def is_ours(folder: Path) -> bool:
    """Whether a folder holds a model that transformers does not know."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") in ("lstm", "actor_critic")


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Any:
    """Byte-level BPE of the texts, with the end of a text: any text has ids.

    Args:
        vocab_size: tokens at most; short texts give fewer.
    """
    need("transformers", "hf")
    from transformers import PreTrainedTokenizerFast

    from fastrl.cli.training import text_data

    tokenizer = text_data.train_tokenizer(texts, vocab_size)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def token_bytes_of(tokenizer: Any) -> list[bytes]:
    """The bytes of each token id, of a byte-level tokenizer.

    Raises:
        ValueError: it is none.
    """
    return byte_level_token_bytes(tokenizer.get_vocab(), set(tokenizer.all_special_tokens))


def _bytes_tokenizer() -> Any:
    """256 bytes and the end of a text: any text has ids, without a file to load."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {END_OF_TEXT: 0, **{symbol: i for i, symbol in enumerate(alphabet, 1)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def end_ids(policy: Any, tokenizer: Any, given: Any = "auto") -> list[int]:
    """What ends a completion: `given` as a config has it; "auto": as the model, else the tokenizer.

    Raises:
        RecipeError: an id outside the vocabulary.
    """
    found = given
    if found == "auto":
        found = getattr(policy, "eos_token_id", None)
        found = tokenizer.eos_token_id if found is None else found
    ids = [] if found is None else [found] if isinstance(found, int) else list(found)
    for token in ids:
        if token >= policy.vocab_size:
            raise RecipeError(
                f"train: expected an EOS in [0, {policy.vocab_size}), got {token}. "
                "Use the tokenizer that the model was built for."
            )
    return ids


def need(package: str, extra: str | None) -> None:
    """Raise a RecipeError where a package is not installed."""
    import importlib.util

    if importlib.util.find_spec(package) is None:
        install = package if extra is None else f'"fastrl[{extra}]"'
        raise RecipeError(
            f"train: expected the package {package}, got none. Install it: pip install {install}"
        )
