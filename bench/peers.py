"""Who runs beside us: each named with its version, or listed with the reason why it does not run.

A peer is a function from a case and its arguments to a call. Views, next values and arrays in the
form that its library wants are made there once, outside what is timed, in its favour.
"""

import importlib
import importlib.metadata
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.case import Arguments, Case, Implementation, Outputs, Unavailable, bound
from fastrl import reference

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"


@dataclass(frozen=True)
class Peer:
    """An implementation by somebody else: `package` is what must be installed for it."""

    name: str
    package: str
    build: Implementation

    @property
    def version(self) -> str:
        return version_of(self.package) or "not installed"

    def call_for(self, case: Case, arguments: Arguments) -> Callable[[], Outputs]:
        """Raises Unavailable where it is not installed, or cannot do what the case asks for."""
        if version_of(self.package) is None:
            pin = pinned(self.package)
            raise Unavailable(f"not installed: pip install {self.package}{pin and '==' + pin}")
        return self.build(case, arguments)


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def pinned(package: str) -> str:
    """The version in constraints.txt, or nothing."""
    found = re.search(rf"^{re.escape(package)}==(\S+)$", CONSTRAINTS.read_text(), re.MULTILINE)
    return found[1] if found else ""


def eager(case: Case, arguments: Arguments) -> Callable[[], Outputs]:
    return bound(reference, case, arguments)


def compiled(function: Callable[[], Any]) -> Callable[[], Outputs]:
    torch.compiler.reset()  # else a second shape would be compiled as a dynamic one
    fast = torch.compile(function, dynamic=False)
    return lambda: as_tuple(fast())


def as_tuple(outputs: Any) -> Outputs:
    return outputs if isinstance(outputs, tuple) else (outputs,)


# Returns


def _numba_returns(case: Case, arguments: Arguments) -> Callable[[], Outputs]:
    if case.mode != "forward":
        raise Unavailable("has no gradient")
    if arguments["rewards"].device.type != "cpu":
        raise Unavailable("runs on the CPU alone")
    loops = importlib.import_module("bench.numba_loops")
    flat = {k: v.reshape(-1).numpy() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    bounds = flat.get("cu_seqlens")
    if bounds is None:
        rows, steps = case.shape
        bounds = torch.arange(0, rows * steps + 1, steps, dtype=torch.int32).numpy()
    names = {
        "gae": ("bootstrap_value", "next_values", "terminated", "mask"),
        "lambda_returns": ("bootstrap_value", "terminated"),
        "discounted_returns": ("terminated",),
    }[case.op]
    if unknown := set(case.inputs) - {"cu_seqlens", *names}:
        raise Unavailable(f"this loop knows no {', '.join(sorted(unknown))}")
    loop = getattr(loops, case.op)
    tensors = [flat[k] for k in ("rewards", "values") if k in flat]
    numbers = [flat["rewards"].dtype.type(x) for x in case.options.values()]
    given = [flat.get(k) for k in names]

    def run() -> Outputs:
        outputs = as_tuple(loop(*tensors, bounds, *given, *numbers))
        return tuple(torch.from_numpy(x).view(case.shape) for x in outputs)

    return run


def _torchrl_returns(name: str) -> Implementation:
    """torchrl wants [B, T, 1], the next values, and done beside terminated."""

    def build(case: Case, arguments: Arguments) -> Callable[[], Outputs]:
        if unable := {"cu_seqlens", "mask"} & set(case.inputs):
            raise Unavailable(f"has no {', '.join(sorted(unable))}")
        functional = importlib.import_module("torchrl.objectives.value.functional")
        rewards = arguments["rewards"]
        ended = arguments.get("terminated", torch.zeros_like(rewards, dtype=torch.bool))
        if name == "reward2go":
            given: dict[str, Any] = {"reward": rewards, "done": ended.clone()}
            given["done"][:, -1] = True  # it runs on into the next row otherwise
        else:
            given = {"reward": rewards, "done": ended, "terminated": ended}
            given["next_state_value"] = _next_values(arguments)
            if case.op == "gae":
                given["state_value"] = arguments["values"]
        given = {k: v.unsqueeze(-1) for k, v in given.items()}
        given["gamma"] = case.options["gamma"]
        if "gae_lambda" in case.options:
            given["lmbda"] = case.options["gae_lambda"]
        function = getattr(functional, name)

        def run() -> Outputs:
            return tuple(x.squeeze(-1) for x in as_tuple(function(**given)))

        return run

    return build


def _next_values(arguments: Arguments) -> Tensor:
    if "next_values" in arguments:
        return arguments["next_values"]
    values = arguments["values"]
    last = arguments.get("bootstrap_value", values.new_zeros(values.shape[0]))
    return torch.cat([values[:, 1:], last[:, None]], dim=1)


def _compiled_returns(case: Case, arguments: Arguments) -> Callable[[], Outputs]:
    if case.shape[-1] > 64 or "cu_seqlens" in case.inputs:
        raise Unavailable("unrolls the loop over time: compiling would take minutes")
    return compiled(bound(reference, case, arguments))


# Log-probabilities


def _log_softmax_gather(case: Case, arguments: Arguments) -> Callable[[], Outputs]:
    """What a training script writes; it has no entropy, and is given to forward passes as such."""
    if case.mode != "forward" and case.options.get("return_entropy"):
        raise Unavailable("has no entropy to differentiate")
    return lambda: (_plain_logprobs(arguments["logits"], arguments["token_ids"]),)


def _plain_logprobs(logits: Tensor, token_ids: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(-1, token_ids[:, None])[:, 0]


def _cross_entropy(case: Case, arguments: Arguments) -> Callable[[], Outputs]:
    if case.options.get("return_entropy"):
        raise Unavailable("has no entropy")
    cross_entropy = torch.nn.functional.cross_entropy
    logits, token_ids = arguments["logits"], arguments["token_ids"]
    return lambda: (-cross_entropy(logits.float(), token_ids, reduction="none"),)


def _compiled_logprobs(case: Case, arguments: Arguments) -> Callable[[], Outputs]:
    logits, token_ids = arguments["logits"], arguments["token_ids"]

    def plain() -> Outputs:
        return (_plain_logprobs(logits, token_ids),)

    def with_entropy() -> Outputs:
        log_p = logits.float().log_softmax(-1)
        return log_p.gather(-1, token_ids[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)

    return compiled(with_entropy if case.options.get("return_entropy") else plain)


def _trl(case: Case, arguments: Arguments) -> Callable[[], Outputs]:
    functions = importlib.import_module("trl.trainer.utils")
    if case.options.get("return_entropy"):
        function = functions.selective_log_softmax_and_entropy
    else:
        function = functions.selective_log_softmax
    return lambda: as_tuple(function(arguments["logits"], arguments["token_ids"]))


# Sampling


def _multinomial(case: Case, arguments: Arguments) -> Callable[[], Outputs]:
    """softmax and multinomial; its random numbers are its own, so only the log-probs compare."""
    logits = arguments["logits"]
    temperature = case.options.get("temperature", 1.0)
    top_k, top_p = case.options.get("top_k"), case.options.get("top_p")

    def run() -> Outputs:
        scaled = logits / temperature
        candidates, ids = scaled, None
        if top_k is not None:
            candidates, ids = scaled.topk(top_k, dim=-1)
        p = candidates.softmax(-1)
        if top_p is not None:
            p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)
        drawn = torch.multinomial(p, 1)
        token_ids = drawn if ids is None else ids.gather(-1, drawn)
        return token_ids[:, 0], scaled.log_softmax(-1).gather(-1, token_ids)[:, 0]

    return run


def _compiled_sampling(case: Case, arguments: Arguments) -> Callable[[], Outputs]:
    return compiled(_multinomial(case, arguments))


_TORCHRL = {
    "gae": ("generalized_advantage_estimate", "vec_generalized_advantage_estimate"),
    "lambda_returns": ("td_lambda_return_estimate", "vec_td_lambda_return_estimate"),
    "discounted_returns": ("reward2go",),
}
REFERENCE = Peer("fastrl.reference", "torch", eager)


def of(op: str) -> list[Peer]:
    """Every peer of this op, whether it is installed or not."""
    if op in _TORCHRL:
        return [
            REFERENCE,
            Peer("torch.compile", "torch", _compiled_returns),
            *(Peer(f"torchrl {f}", "torchrl", _torchrl_returns(f)) for f in _TORCHRL[op]),
            Peer("numba loop, one thread", "numba", _numba_returns),
        ]
    if op == "token_logprobs":
        return [
            REFERENCE,
            Peer("torch log_softmax + gather", "torch", _log_softmax_gather),
            Peer("torch cross_entropy", "torch", _cross_entropy),
            Peer("torch.compile", "torch", _compiled_logprobs),
            Peer("TRL selective_log_softmax(_and_entropy)", "trl", _trl),
        ]
    return [
        REFERENCE,
        Peer("torch multinomial", "torch", _multinomial),
        Peer("torch.compile", "torch", _compiled_sampling),
    ]
