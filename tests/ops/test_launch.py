"""From the dispatcher to a Triton launcher: what can be seen of it without a GPU."""

import sys

import pytest
import torch

from fastrl.ops import _binary

LAUNCHER = ("token_logprobs", "token_logprobs_fwd")


def forget(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("fastrl.kernels")]:
        monkeypatch.delitem(sys.modules, name)


def test_without_triton_it_says_so(monkeypatch):
    forget(monkeypatch)
    monkeypatch.setitem(sys.modules, "triton", None)
    message = "token_logprobs: expected the package triton for a GPU tensor, got none"
    with pytest.raises(ImportError, match=message):
        _binary.launcher(*LAUNCHER)(torch.zeros(1))


def test_another_missing_module_is_not_called_triton(monkeypatch):
    pytest.importorskip("triton")
    forget(monkeypatch)
    monkeypatch.setitem(sys.modules, "fastrl.kernels._math", None)
    with pytest.raises(ModuleNotFoundError, match="fastrl.kernels._math"):
        _binary.launcher(*LAUNCHER)(torch.zeros(1))
