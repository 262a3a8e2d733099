"""Blocks of transformers' models on a CPU in fewer operations than the models' own.

A step of sampling reads one token a row: its operations are many and small. Llama's block takes
about 45 between and around its products, here 10; with 64 rows of 256 they take longer than the
products themselves.

A block is computed this way if its code is, to the last instruction, that of a block which is
known, and if what that code calls does on a trial what is expected of it.
"""

import functools
import importlib
from collections.abc import Callable
from types import CodeType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrl.models._norms import Norm, norm_of
from fastrl.ops._quick_product import PackedWeight

# Whose attention is projections, norms of the heads if there are any, a rotation, the attention
# function and one more projection.
_ATTENTION: tuple[str, ...] = ("llama.Llama", "mistral.Mistral", "qwen2.Qwen2", "qwen3.Qwen3")
_ATTENTION += ("gemma2.Gemma2", "gemma3.Gemma3")
_MLP = ("llama.Llama",)
# As torch computes them, and what oneDNN calls them behind a product.
_ACTIVATIONS: tuple[tuple[Callable[..., Tensor], tuple[str, str]], ...] = (
    (F.silu, ("swish", "")),
    (F.gelu, ("gelu", "none")),
    (functools.partial(F.gelu, approximate="tanh"), ("gelu", "tanh")),
)
_WORST = 1e-6  # of the largest number of a trial
_WIDEST = 1024  # head that csrc/cpu/decode_attention_step.cpp takes

Forward = Callable[..., Any]


class Decoding(Protocol):
    """What a quick block asks of a decoder (`fastrl.models._kv_decoder.KVDecoder`)."""

    def knows(self, index: int) -> bool:
        """Whether a step was made through the layer's own code, which told the numbers of its
        attention."""
        ...

    def attend_projected(self, index: int, projected: Tensor, *rest: Any) -> Tensor:
        """See `fastrl.ops.decode_attention.decode_step`."""
        ...


def quick_mlp(module: Any, pack: Callable[[Any], PackedWeight]) -> Forward | None:
    """down(act(gate(x)) up(x)), act and the product of both behind the products that they follow;
    None of a module with other code or an activation that oneDNN does not have."""
    if not _is_like(module, "MLP", _MLP):
        return None
    watched = _hooks_of_parts(module)
    activation = None if any(watched) else _activation_of(module)
    if activation is None:
        return None
    gate, up, own = pack(module.gate_proj), pack(module.up_proj), module.forward

    def forward(x: Tensor) -> Any:
        if any(watched):
            return own(x)
        return module.down_proj(up.times(x, gate.activated(x, *activation)))

    return forward


def _activation_of(module: Any) -> tuple[str, str] | None:
    """What oneDNN calls it."""
    size = torch.linspace(-4.0, 4.0, 65, dtype=torch.float32, device="cpu")
    trial = torch.cat([size, 30.0 * size, 1e4 * size, 1e-4 * size])
    for function, name in _ACTIVATIONS:
        if torch.equal(module.act_fn(trial), function(trial)):
            return name
    return None


def quick_attention(module: Any, product: Callable[[Tensor], Tensor] | None) -> Forward | None:
    """The forward pass of an attention block while rows are decoded; None of a block whose code is
    not known. Whatever else it is called for goes to the block's own.

    Args:
        product: of the queries', keys' and values' weights; None: the layers one by one.
    """
    if not _is_like(module, "Attention", _ATTENTION):
        return None
    watched = _hooks_of_parts(module)
    if any(watched) or not hasattr(module, "layer_idx"):  # of the latter the decoder will complain
        return None
    of_query, of_key = (_head_norm(module, name) for name in ("q_norm", "k_norm"))
    if of_query is None or of_key is None or of_query.eps != of_key.eps:
        return None
    if not _rotates_halves(module):
        return None
    norms = (of_query.factor, of_key.factor, of_query.eps)
    own, width, index = module.forward, module.head_dim, module.layer_idx

    def projected(x: Tensor) -> Tensor:
        if product is not None:
            return product(x)
        return torch.cat([module.q_proj(x), module.k_proj(x), module.v_proj(x)], -1)

    def forward(*args: Any, **kwargs: Any) -> Any:
        x, angles = kwargs.get("hidden_states"), kwargs.get("position_embeddings")
        decoding: Decoding | None = kwargs.get("decoding")
        if args or x is None or angles is None or decoding is None or "layout" in kwargs:
            return own(*args, **kwargs)
        if any(watched):
            return own(**kwargs)
        usual = (len(x), 1, width)
        if not decoding.knows(index) or any(_is_other(y, usual) for y in angles):
            return own(**kwargs)
        output = decoding.attend_projected(index, projected(x)[:, 0], *angles, *norms)
        return module.o_proj(output[:, None]), None

    return forward


def _is_other(x: Tensor, shape: tuple[int, ...]) -> bool:
    return x.shape != shape or x.dtype != torch.float32


def _head_norm(module: Any, name: str) -> Norm | None:
    """Of queries or keys; one without a factor where there is none, None of an unknown kind."""
    if name not in _function_of(module).__code__.co_names:
        return Norm(None, 0.0)
    norm = norm_of(getattr(module, name))
    return (
        norm if norm and norm.factor is not None and len(norm.factor) == module.head_dim else None
    )


def _rotates_halves(module: Any) -> bool:
    """Whether what its code calls apply_rotary_pos_emb is x cos + (-x_2, x_1) sin."""
    width = module.head_dim
    rotate = _function_of(module).__globals__.get("apply_rotary_pos_emb")
    if rotate is None or width % 2 or width > _WIDEST:
        return False
    trial = torch.linspace(-2.0, 3.0, 4 * width, dtype=torch.float32, device="cpu").sin()
    query, key, cos, sin = trial.view(4, 1, width)
    found = rotate(query.view(1, 1, 1, -1), key.view(1, 1, 1, -1), cos[None], sin[None])
    for x, turned in zip((query, key), found, strict=True):
        a, b = x.chunk(2, -1)
        expected = x * cos + torch.cat([-b, a], -1) * sin
        if (turned - expected).abs().max() > _WORST:
            return False
    return True


def _is_like(module: Any, kind: str, names: tuple[str, ...]) -> bool:
    """Whether its forward pass is, instruction by instruction, that of a class of transformers.

    Args:
        kind: what the class's name ends in.
        names: package and beginning of the class's name.
    """
    if not type(module).__name__.endswith(kind) or "forward" in module.__dict__:
        return False
    code = getattr(_function_of(module), "__code__", None)
    return code is not None and any(_same_code(code, x) for x in _known_codes(kind, names))


@functools.cache
def _known_codes(kind: str, names: tuple[str, ...]) -> list[CodeType]:
    codes = []
    for name in names:
        package, _, beginning = name.partition(".")
        try:
            models = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
        except ImportError:  # a version without it
            continue
        known = _undecorated(getattr(getattr(models, beginning + kind, None), "forward", None))
        if getattr(known, "__globals__", None) is vars(models):  # else somebody has put it there
            codes.append(known.__code__)
    return codes


def _function_of(module: Any) -> Any:
    return _undecorated(type(module).forward)


def _undecorated(function: Any) -> Any:
    """Without transformers' own decorators; anybody else's may change what is computed."""
    while hasattr(function, "__wrapped__") and _is_of_transformers(function):
        function = function.__wrapped__
    return function


def _is_of_transformers(function: Any) -> bool:
    # Not __module__, which functools.wraps copies.
    scope: dict[str, Any] = getattr(function, "__globals__", {})
    return str(scope.get("__name__")).startswith("transformers.")


def _same_code(a: CodeType, b: CodeType) -> bool:
    def of(code: CodeType) -> tuple[Any, ...]:
        consts = tuple(x for x in code.co_consts if not isinstance(x, CodeType))
        return code.co_code, code.co_names, code.co_varnames, code.co_freevars, consts

    return a is b or of(a) == of(b)


def _hooks_of_parts(module: nn.Module) -> list[Any]:
    """Of who wants to see what its parts compute: torch's own dictionaries, in which later hooks
    are found too."""
    of_all = nn.modules.module
    hooks: list[Any] = [of_all._global_forward_hooks, of_all._global_forward_pre_hooks]
    for part in module.modules():
        if part is not module:
            hooks += part._forward_hooks, part._forward_pre_hooks
    return hooks
