"""Which models and which calls fastrl's attention can honour inside transformers."""

import functools
import sys
from typing import Any

import torch
from torch import Tensor, nn

from fastrl.ops._checks import fail

NAME = "fastrl"
_ELSEWHERE = "Load the model with another attn_implementation."

# What says nothing about the scores. Anything else that is set is refused: an argument that we do
# not know may be a bias or a pattern that a later transformers invents.
_HARMLESS = {
    "cache",
    "cache_position",
    "deterministic",
    "logits_to_keep",
    "max_length_k",
    "max_length_q",
    "num_items_in_batch",
    "output_hidden_states",
    "output_router_logits",
    "past_key_values",
    "position_embeddings",
    "return_dict",
    "seq_idx",
    "shift_labels",
    "token_type_ids",
    "use_cache",
}
_REFUSED = {
    "alibi": "attention without a bias on its scores",
    "attention_bias": "attention without a bias on its scores",
    "block_indices": "attention to all keys of a row",
    "indices": "attention to all keys of a row",
    "output_attentions": "no attention weights as an output",
    "position_bias": "attention without a bias on its scores",
    "sinks": "sinks of each head, as s_aux",
}
_CHECKED: set[type] = set()  # configurations whose models keep their promise
_ATTENDING = {"full_attention", "sliding_attention"}
# In a configuration: an index or a gate chooses the keys that a query sees, and each layer would
# write its choice into a mask of four dimensions.
_SPARSE = ("index_topk", "keep_window_size")
_RECURRENT = "recurrent layers"


def check_call(
    module: nn.Module, causal: object, dropout: float, arguments: dict[str, Any]
) -> None:
    """Refuses what would change the scores beyond our arguments."""
    where = type(module).__name__
    if causal is not True:
        raise fail("hf", f"causal attention in {where}", f"is_causal {causal}", _ELSEWHERE)
    if dropout:
        remedy = "Set the model's attention dropout to 0 (config.attention_dropout, attn_pdrop)."
        raise fail("hf", f"no dropout of attention weights in {where}", dropout, remedy)
    for name, x in arguments.items():
        if name in _HARMLESS or x is None or x is False:
            continue
        expected = _REFUSED.get(name, "no argument that attention does not know")
        raise fail("hf", f"{expected} in {where}", f"{name}=", f"Leave it out. {_ELSEWHERE}")


def check_packable(module: nn.Module) -> None:
    """Refuses a layer of a model in which other layers would mix what a layout keeps apart, or
    whose positions begin elsewhere than at 0."""
    config = getattr(module, "config", None)
    found = set(_unpackable(type(module).__module__))
    if _all_attend(config):  # a model that may have other layers, and has none
        found.discard(_RECURRENT)
    _refuse_packed(config, found)


def check_packable_layers(config: Any) -> None:
    """`check_packable` for who only knows the configuration."""
    _refuse_packed(config, set())


def _all_attend(config: Any) -> bool:
    kinds = getattr(config, "layer_types", None) or ()
    return len(kinds) > 0 and _ATTENDING.issuperset(kinds)


def _refuse_packed(config: Any, found: set[str]) -> None:
    kinds = found | set(getattr(config, "layer_types", None) or ()) - _ATTENDING
    if getattr(config, "attention_chunk_size", None) is not None:
        kinds.add("chunked_attention")
    if kinds:
        expected = "attention in all layers, and positions from 0, in a model with packed rows"
        remedy = "Pass sequences as rows of a padded batch."
        raise fail("hf", expected, ", ".join(sorted(kinds)), remedy)


def _unpackable(module: str) -> list[str]:
    """What the model classes beside an attention class say of themselves, by its module."""
    found = set()
    for cls in vars(sys.modules[module]).values() if module in sys.modules else ():
        if getattr(cls, "_is_stateful", False) is True:
            found.add(_RECURRENT)
        if hasattr(cls, "create_position_ids_from_input_ids"):
            found.add("positions that are counted from the padding's id")
    return sorted(found)


def check_model(model: type) -> None:
    """transformers' own promise: arguments of the model's forward reach each attention layer."""
    if not model._supports_attention_backend:  # type: ignore[attr-defined]
        raise fail(
            "hf",
            "a model that hands its arguments on to its attention (_supports_attention_backend)",
            model.__name__,
            _ELSEWHERE,
        )


def check_config(config: Any) -> None:
    """`check_model` for who only knows the configuration, as a mask function does."""
    for name in _SPARSE:
        if getattr(config, name, None) is not None:
            where = type(config).__name__
            raise fail("hf", f"attention to all keys of a row in {where}", name, _ELSEWHERE)
    _check_promise(type(config))


def _check_promise(config: type) -> None:
    if config in _CHECKED:
        return
    from transformers import PreTrainedModel

    models = [c for c in _subclasses(PreTrainedModel) if getattr(c, "config_class", None) is config]
    package = config.__module__.rpartition(".")[0]
    # Wrappers that people write around a model have its configuration, and know less than it.
    models = [c for c in models if c.__module__.rpartition(".")[0] == package] or models
    if models and not any(c._supports_attention_backend for c in models):
        check_model(models[0])
    _CHECKED.add(config)


def _subclasses(cls: Any) -> set[Any]:
    below = set(cls.__subclasses__())
    return below.union(*(_subclasses(c) for c in below))


def refuse_models() -> None:
    """Lets `check_model` speak where a model is built or told to change its attention."""
    from transformers import PreTrainedModel

    original = PreTrainedModel.get_correct_attn_implementation
    if hasattr(original, "checks_fastrl"):
        return

    @functools.wraps(original)
    def checked(self: Any, requested_attention: str | None, *args: Any, **kwargs: Any) -> str:
        if requested_attention == NAME:
            check_model(type(self))
        return original(self, requested_attention, *args, **kwargs)

    checked.checks_fastrl = True  # type: ignore[attr-defined]
    PreTrainedModel.get_correct_attn_implementation = checked  # type: ignore[method-assign]


def tell_dynamo() -> None:
    """What torch.compile need not trace. Not at import: Dynamo's own import takes more than a
    second, and transformers' models have it anyway."""
    torch.compiler.assume_constant_result(_unpackable)


def check_mask(mask: object, expected: str) -> None:
    """A mask that ours is not: four dimensions, another class."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        remedy = "Pass attention_mask [B, S], 1 where there is a token, or none."
        raise fail("hf", expected, got, remedy)
