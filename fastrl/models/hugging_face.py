"""Causal language models of transformers as policies, bare or with a PEFT adapter."""

import functools
import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import fastrl.hf
from fastrl.hf._models import check_model, check_packable_layers
from fastrl.layout import PackedBatch
from fastrl.models._kv_decoder import KVDecoder
from fastrl.models._linear_layers import quick_layers
from fastrl.models._positions import check_positions, longest_path, num_positions
from fastrl.models.protocol import Head
from fastrl.ops._checks import fail, wrong_type

_OP = "HuggingFacePolicy"
# Where a model came from, in its configuration: not what it is.
_ORIGIN = {"_name_or_path", "transformers_version", "auto_mapping", "base_model_name_or_path"}
_ORIGIN |= {"inference_mode", "revision", "peft_version"}
_OTHER_HEAD = "Its log-probabilities would be others than the model's: take another model."


class HuggingFacePolicy(nn.Module):
    """A causal language model of transformers on fastrl's attention.

    Dropout is active in training mode, while sampling too, as in any module: `.eval()` turns it
    off, and nothing here needs training mode. Dropout of attention weights is refused in it.

    Args:
        model: a PreTrainedModel with a head on its vocabulary, whose attention is set to
            "fastrl"; or a PeftModel around one, with an adapter below the head.
    Raises:
        ValueError: the attention cannot be set (`fastrl.hf.register`); there is no linear head, or
            something else beside it; an adapter of anything but layers below it.
        TypeError: another model.
    """

    def __init__(self, model: nn.Module) -> None:
        from transformers import PreTrainedModel

        super().__init__()
        self.model = model
        fastrl.hf.register()
        causal = self.causal
        if not isinstance(causal, PreTrainedModel):
            expected = "a model of transformers, bare or in a PeftModel"
            raise wrong_type(_OP, expected, type(model).__name__, "Pass a causal language model.")
        _check_adapter(model)
        if causal.config._attn_implementation != "fastrl":
            causal.set_attn_implementation("fastrl")
        if causal.config._attn_implementation != "fastrl":  # of some it cannot be set, unsaid
            check_model(type(causal))
        fastrl.hf.check(causal)
        head = causal.get_output_embeddings()
        if not isinstance(getattr(head, "weight", None), Tensor) or causal.base_model is causal:
            got = type(causal).__name__
            raise fail(_OP, "a model with a head on its vocabulary", got, "Use a ...ForCausalLM.")
        text = causal.config.get_text_config()
        self._softcap: float | None = getattr(text, "final_logit_softcapping", None)
        self._scale = 1.0
        self.vocab_size, self.hidden_dim = head.weight.shape
        parameters = inspect.signature(causal.base_model.forward).parameters
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"
        self._checkpointed: list[Any] = []  # layers
        self.num_positions = num_positions(causal.base_model)  # None: as many as one likes
        self._check_head(_logit_scales(text))

    @property
    def adapter(self) -> Any:
        """The PeftModel, or None."""
        return self.model if hasattr(self.model, "peft_config") else None

    @property
    def causal(self) -> Any:
        """The model of transformers, in which an adapter's layers stand."""
        return self.model if self.adapter is None else self.adapter.get_base_model()

    @property
    def trunk(self) -> Any:
        """What is below the head."""
        return self.causal.base_model

    @property
    def config(self) -> dict[str, Any]:
        """What the model is, JSON types only; not what `model_from_config` takes."""
        of_model = json.loads(self.causal.config.to_json_string(use_diff=False))
        config = {"model_type": "hugging_face", "config": _without_origin(of_model)}
        if self.adapter is not None:
            config["adapters"] = {
                name: _without_origin(json.loads(json.dumps(adapter.to_dict(), default=_as_list)))
                for name, adapter in self.adapter.peft_config.items()
            }
        return config

    @property
    def head(self) -> Head:
        """The last layer."""
        head = self.causal.get_output_embeddings()
        return Head(head.weight, getattr(head, "bias", None), self._softcap, self._scale)

    @property
    def eos_token_id(self) -> int | list[int] | None:
        """What ends a text, as the model's configuration for generation has it."""
        for config in (getattr(self.causal, "generation_config", None), self.causal.config):
            found = getattr(config, "eos_token_id", None)
            if found is not None:
                return found
        return None

    def forward(self, token_ids: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """token_ids [B, T] -> logits [B, T, V], and the state after the last token."""
        hidden, state = self.hidden_states(token_ids, state)
        return self.head.logits(hidden), state

    def hidden_states(self, token_ids: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Hidden states after each token, without padding.

        Args:
            token_ids: [B, T] int64.
            state: what an earlier call returned, to go on from there; it is changed.
        Returns:
            hidden: [B, T, D].
            state: transformers' cache.
        Raises:
            ValueError: more tokens than the model has positions for.
        """
        begin = 0 if state is None else state.get_seq_length()
        end = token_ids.shape[1] + begin
        check_positions("hidden_states", self.num_positions, end, "texts of")
        output = self.trunk(
            input_ids=token_ids,
            use_cache=True,
            token_positions=_positions(begin, end, token_ids),
            **{self._cache_name: state},
        )
        return output.last_hidden_state, output[self._cache_name]

    def packed_hidden(self, batch: PackedBatch) -> Tensor:
        """hidden [M, D], row m of which predicts batch.target_ids[m]; each token is read once.

        Raises:
            ValueError: a path of more tokens than the model has positions for; layers that are no
                attention.
        """
        layout = batch.layout
        if layout.num_tokens == 0:
            return self.head.weight.new_zeros(0, self.hidden_dim)
        if self.num_positions is not None and layout.num_tokens > self.num_positions:
            length = longest_path(layout)
            check_positions(
                "packed_hidden", self.num_positions, length, "a prompt and completion of"
            )
        # Layers with attention ask too; a model may have none.
        check_packable_layers(self.causal.config.get_text_config())
        with quick_layers(self.trunk), _checkpointing(self._checkpointed):
            output = self.trunk(
                input_ids=batch.token_ids[None],
                position_ids=layout.position_ids[None],
                token_positions=layout.position_ids[None],
                layout=layout,
                use_cache=False,
            )
        # Indexing, not index_select: its backward is a sum in a fixed order everywhere.
        return output.last_hidden_state[0][batch.predict_index]

    def decoder(self, max_rows: int, max_new_tokens: int) -> KVDecoder:
        """See `fastrl.models.PolicyModel`."""
        return KVDecoder(self.trunk, max_rows, max_new_tokens)

    def gradient_checkpointing(self, enabled: bool) -> None:
        """Whether packed_hidden keeps each layer's input alone, and computes the rest of it twice.

        Gradients are the same. In evaluation mode too, unlike transformers' own switch.

        Raises:
            ValueError: the model has no layers that can.
        """
        from transformers.modeling_layers import GradientCheckpointingLayer

        layers = [x for x in self.trunk.modules() if isinstance(x, GradientCheckpointingLayer)]
        if enabled and not layers:
            got = type(self.causal).__name__
            remedy = "Use smaller micro-batches instead."
            raise fail(_OP, "a model with layers for gradient checkpointing", got, remedy)
        self._checkpointed = layers if enabled else []

    @torch.no_grad()
    def _check_head(self, scales: list[float]) -> None:
        """The head that we know of, with one of these scales, against the logits of the model."""
        token_ids = torch.arange(min(self.vocab_size, 4), device=self.head.weight.device)[None]
        given = {"input_ids": token_ids, "use_cache": False}
        given["token_positions"] = _positions(0, token_ids.shape[1], token_ids)
        with evaluating(self.model):
            hidden = self.trunk(**given).last_hidden_state
            expected = self.causal(**given).logits
        found = []
        for self._scale in scales:
            found.append(self._difference(hidden, expected))
            if found[-1] is None:
                return
        where = type(self.causal).__name__
        raise fail(_OP, f"{where} to end in weight, bias, softcap and scale", found[0], _OTHER_HEAD)

    def _difference(self, hidden: Tensor, expected: Tensor) -> str | None:
        if hidden.shape[-1] != self.hidden_dim or expected.shape[-1] != self.vocab_size:
            return f"hidden {tuple(hidden.shape)} and logits {tuple(expected.shape)}"
        logits = self.head.logits(hidden)
        is_rounded = {torch.float16, torch.bfloat16} & {logits.dtype, expected.dtype}
        error = (logits.float() - expected.float()).abs().max()
        worst = error / expected.abs().max().clamp(min=1e-30)
        if worst <= (0.05 if is_rounded else 1e-4):
            return None
        return f"logits that differ by {float(worst):.1e} of the largest"


def _positions(begin: int, end: int, token_ids: Tensor) -> Tensor:
    """[1, T], for layers that the model does not tell position_ids."""
    return torch.arange(begin, end, device=token_ids.device)[None]


def _logit_scales(config: Any) -> list[float]:
    """As Cohere's and Granite's models have one, or as HyperCLOVA X, whose logits_scaling is a
    factor."""
    factor, other = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    factor, other = float(factor or 1.0), float(other or 1.0)
    return [factor / other, factor * other]


def _check_adapter(model: Any) -> None:
    if not hasattr(model, "peft_config"):
        return
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    remedy = "Leave it out of target_modules and modules_to_save."
    got = None
    if any(adapter.is_prompt_learning for adapter in model.peft_config.values()):
        got = "one that adds tokens to the prompt"
    elif not isinstance(model.base_model, BaseTuner):
        got = type(model.base_model).__name__
    elif any(getattr(x, "alora_invocation_tokens", None) for x in model.peft_config.values()):
        got = "one that begins at its alora_invocation_tokens"
    if got is not None:
        raise fail(_OP, "an adapter of layers, like LoRA", got, "Use LoRA.")
    head = model.get_base_model().get_output_embeddings()
    if isinstance(head, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        raise fail(_OP, "no adapter on the output head", type(head).__name__, remedy)


def _without_origin(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in _ORIGIN}


def _as_list(x: Any) -> Any:
    return sorted(x) if isinstance(x, (set, frozenset)) else str(x)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards each module is as it was."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _checkpointing(layers: list[Any]) -> Iterator[None]:
    """transformers' layers ask their own `training` whether to checkpoint. The layer itself, and
    all that is computed again in the backward pass, is as it was: with dropout or without."""
    before = [(x, x.training, x.gradient_checkpointing) for x in layers]
    try:
        for layer, training, _ in before:
            layer._gradient_checkpointing_func = functools.partial(_checkpoint, layer, training)
            layer.training = layer.gradient_checkpointing = True
        yield
    finally:
        for layer, training, checkpointing in before:
            layer.training, layer.gradient_checkpointing = training, checkpointing


def _checkpoint(layer: nn.Module, training: bool, function: Any, *args: Any) -> Any:
    from torch.utils.checkpoint import checkpoint

    layer.training = training

    def again(*args: Any) -> Any:  # in the backward pass the layer is by itself
        with quick_layers(layer):
            return function(*args)

    return checkpoint(again, *args, use_reentrant=False)
