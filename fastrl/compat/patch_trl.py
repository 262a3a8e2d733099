"""TRL's trainers on fastrl's ops, for as long as a `with` block lasts."""

import importlib
import inspect
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from fastrl.compat import trl as ours

_UTILS = "trl.trainer.utils"
# What each is called in trl.trainer.utils, and here. add_fused_lm_head, through which every trainer
# of TRL 1.16 gets its log-probs, looks the first one up at each call.
_NAMES = {
    "_ChunkedLogProbFunction": "ChunkedLogProbFunction",
    "selective_log_softmax": "selective_log_softmax",
    "entropy_from_logits": "entropy_from_logits",
    "selective_log_softmax_and_entropy": "selective_log_softmax_and_entropy",
}
_REMEDY = "Use the trl that constraints.txt pins, or call fastrl.compat's functions yourself."

# Whoever comes second has to see all that the first one replaces and puts back.
_SWAPPING = threading.Lock()


@dataclass
class PatchedTrl:
    """What `patch_trl` has done.

    calls: how often each of our functions was called inside the block, by its name.
    replaced: "module.name" of everything in TRL that was replaced when the block began.
    """

    calls: Counter[str] = field(default_factory=Counter)
    replaced: list[str] = field(default_factory=list)


@contextmanager
def patch_trl() -> Iterator[PatchedTrl]:
    """Inside the block, TRL's trainers get log-probs and entropy from fastrl. For a whole process.

        with patch_trl() as patched:
            trainer = GRPOTrainer(...)
            trainer.train()
        print(patched.calls)        # Counter({'ChunkedLogProbFunction': 96})

    Replaces `trl.trainer.utils._ChunkedLogProbFunction`, `selective_log_softmax`,
    `entropy_from_logits` and `selective_log_softmax_and_entropy`, wherever a loaded module of TRL
    holds them under whatever name, by the functions of `fastrl.compat`, and puts everything back at
    the end, also after an exception and in modules of TRL first loaded inside. Other people's
    modules that imported them by name keep TRL's. The trainer may be made before the block.

    In float32 the numbers are TRL's. In 16 bits, autocast included, TRL rounds each logit to them
    and these functions keep float32: on the same hidden states, the logged KL is nearer to float64
    by three digits. (Against a model that is float64 throughout both are as far: its hidden states
    are not rounded.) TRL's cast_lm_head_to_fp32 takes the difference away.

    Off a GPU, TRL scores the prompts and the padding as well and throws the result away; inside the
    block it scores only what has a label, as it does on a GPU.

    Returns:
        A context manager that gives a `PatchedTrl`.
    Raises:
        ImportError: trl is not installed, lacks one of the names, or has it with other arguments.
        RuntimeError: inside another patch_trl.
    """
    utils = _utils()
    patched = PatchedTrl()
    with ExitStack() as stack:
        with _SWAPPING:
            # Found before anything is replaced: a name that is missing leaves TRL as it was.
            originals = {name: _original(utils, name) for name in _NAMES}
            swaps = [
                (originals[name], _counting(patched.calls, mine)) for name, mine in _NAMES.items()
            ]
            # Says there whether to score only what has a label. In trl.kernels, where the same
            # function chooses TRL's own kernels, it stays; a TRL without it has no such choice.
            use_triton = vars(utils).get("_use_triton")
            stack.callback(_restore, utils, swaps, use_triton)
            patched.replaced = _replace(swaps)
            if use_triton is not None:
                setattr(utils, "_use_triton", _always)  # noqa: B010  (mypy knows no such attribute)
                patched.replaced.append(f"{_UTILS}._use_triton")
        yield patched


def _utils() -> ModuleType:
    try:
        return importlib.import_module(_UTILS)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "trl":
            raise
        raise ImportError(
            f"patch_trl: expected the module {_UTILS}, got none ({error}). "
            "Install it with `pip install trl`."
        ) from error


def _original(utils: ModuleType, name: str) -> Any:
    found = vars(utils).get(name)
    if found is None:
        raise ImportError(
            f"patch_trl: expected {_UTILS}.{name}, got trl {_version()} without it. {_REMEDY}"
        )
    if getattr(found, "_from_patch_trl", False):
        raise RuntimeError(
            f"patch_trl: expected TRL's own {name}, got that of an enclosing patch_trl. "
            "Leave that one first; one is enough."
        )
    theirs, mine = _parameters(found), _parameters(getattr(ours, _NAMES[name]))
    if theirs != mine:
        raise ImportError(
            f"patch_trl: expected {_UTILS}.{name}({', '.join(mine)}), got trl {_version()} with "
            f"({', '.join(theirs)}). {_REMEDY}"
        )
    return found


def _version() -> str:
    return getattr(sys.modules["trl"], "__version__", "of unknown version")


def _parameters(function: Any) -> list[str]:
    """The arguments that a caller may give, with their defaults."""
    if isinstance(function, type):
        function = getattr(function, "forward", None) or function.apply  # type: ignore[attr-defined]
    given = inspect.signature(function).parameters.values()
    plain = (p.replace(annotation=p.empty) for p in given if p.name != "ctx")
    return [str(p) for p in plain]


def _counting(calls: Counter[str], name: str) -> Any:
    """Our function of that name, made to count its calls; a class with `apply` for the first."""
    mine = getattr(ours, name)
    is_class = isinstance(mine, type)
    call: Callable[..., Any] = mine.apply if is_class else mine

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        return call(*args, **kwargs)

    if is_class:
        return type(name, (mine,), {"apply": staticmethod(counted), "_from_patch_trl": True})
    counted.__name__, counted.__doc__ = name, mine.__doc__
    counted._from_patch_trl = True  # type: ignore[attr-defined]
    return counted


def _replace(swaps: list[tuple[Any, Any]]) -> list[str]:
    """Puts the second of each pair where a loaded module of TRL holds the first."""
    replaced = []
    for module_name, module in list(sys.modules.items()):
        if module is None or module_name.partition(".")[0] != "trl":
            continue
        for name, value in list(vars(module).items()):  # not getattr: TRL's lazy modules import
            for old, new in swaps:
                if value is old:
                    setattr(module, name, new)
                    replaced.append(f"{module_name}.{name}")
    return replaced


def _restore(utils: ModuleType, swaps: list[tuple[Any, Any]], use_triton: Any) -> None:
    with _SWAPPING:
        _replace([(new, old) for old, new in swaps])
        if use_triton is not None:
            setattr(utils, "_use_triton", use_triton)  # noqa: B010


def _always(device: object) -> bool:
    return True
