"""patch_trl: TRL's own trainers on our ops, and TRL as it was afterwards."""

import functools
import sys
import threading
import types

import pytest
import torch
from compat.tiny_trainers import VOCAB, history, language_model

from fastrl.compat import patch_trl
from fastrl.compat import trl as ours

NAMES = [
    "_ChunkedLogProbFunction",
    "selective_log_softmax",
    "entropy_from_logits",
    "selective_log_softmax_and_entropy",
    "_use_triton",
]


def held(utils):
    kernels = sys.modules["trl.kernels"]
    return [getattr(utils, name) for name in NAMES] + [kernels.ChunkedLogProbFunction]


@pytest.mark.parametrize(
    "name, options, calls",
    [
        # One for each step, one for each of the two batches sampled: its old log-probs.
        ("GRPO", {}, 5),
        ("GRPO", {"beta": 0.1, "temperature": 0.8, "entropy_coef": 0.05}, 7),  # and its reference
        ("RLOO", {"beta": 0.05}, 7),
    ],
    ids=["GRPO", "GRPO with KL and entropy", "RLOO"],
)
def test_trainers_log_the_same(trl_utils, tmp_path, name, options, calls):
    expected = history(name, tmp_path / "theirs", **options)
    with patch_trl() as patched:
        found = history(name, tmp_path / "ours", **options)
    assert patched.calls == {"ChunkedLogProbFunction": calls}
    assert len(found) == len(expected) == 4  # three steps and the summary
    assert all(entry["grad_norm"] > 0.1 for entry in expected[:3:2])
    assert abs(expected[1]["loss"]) > 0.01
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            assert mine[key] == pytest.approx(value, rel=1e-4, abs=2e-6), key


def fused(model, ids, labels):
    model.zero_grad()
    outputs = model(input_ids=ids, labels=labels, fused_lm_head=True)
    (outputs.loss + 0.1 * outputs.entropy.sum()).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    return {k: v for k, v in outputs.items() if v is not None}, gradients


@pytest.mark.parametrize("labelled", ["completions", "nothing"])
def test_every_output_of_the_fused_head(trl_utils, tmp_path, monkeypatch, labelled):
    """The other trainers ask for more than GRPO does; and only rows with a label are scored."""
    model = language_model(tmp_path)
    trl_utils.add_fused_lm_head(
        model, temperature=0.7, outputs=("log_probs", *ours.OPTIONAL_OUTPUTS)
    )
    ids = torch.randint(3, VOCAB, (4, 12))
    labels = ids.masked_fill(torch.arange(12) < 7, -100)
    labels[1, 9:] = -100
    if labelled == "nothing":
        labels.fill_(-100)
    expected, expected_gradients = fused(model, ids, labels)
    rows, real = [], ours.ChunkedLogProbFunction.apply

    @functools.wraps(real)
    def record(hidden, *arguments):
        rows.append(len(hidden))
        return real(hidden, *arguments)

    monkeypatch.setattr(ours.ChunkedLogProbFunction, "apply", staticmethod(record))
    with patch_trl():
        found, gradients = fused(model, ids, labels)
    assert rows == [int((labels != -100).sum())]
    assert found.keys() == expected.keys() >= {"is_top1", "mean_logits", "log_sum_sq_probs"}
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-5, atol=1e-5)
    for x, y in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_the_functions_are_replaced_and_counted(trl_utils):
    before = held(trl_utils)
    logits, index = torch.randn(2, 5), torch.tensor([1, 2])
    with patch_trl() as patched:
        assert not any(x is y for x, y in zip(held(trl_utils), before, strict=True))
        logprobs = trl_utils.selective_log_softmax(logits, index)
        trl_utils.entropy_from_logits(logits)
        trl_utils.entropy_from_logits(logits)
        trl_utils.selective_log_softmax_and_entropy(logits, index)
    assert torch.equal(logprobs, ours.selective_log_softmax(logits, index))
    assert patched.calls == {
        "selective_log_softmax": 1,
        "entropy_from_logits": 2,
        "selective_log_softmax_and_entropy": 1,
    }
    assert {f"trl.trainer.utils.{name}" for name in NAMES} <= set(patched.replaced)
    assert "trl.kernels.ChunkedLogProbFunction" in patched.replaced
    assert all(x is y for x, y in zip(held(trl_utils), before, strict=True))


def test_everything_is_restored_after_an_exception(trl_utils):
    before = held(trl_utils)
    with pytest.raises(KeyError, match="from inside"):
        with patch_trl():
            raise KeyError("from inside")
    assert all(x is y for x, y in zip(held(trl_utils), before, strict=True))
    with patch_trl() as patched:  # and it can be used again
        trl_utils.entropy_from_logits(torch.zeros(1, 2))
    assert patched.calls["entropy_from_logits"] == 1


def test_modules_that_imported_a_name_under_another(trl_utils, monkeypatch):
    """One of TRL's that was there before, one loaded inside the block, and one of somebody else."""
    original = trl_utils.selective_log_softmax
    early, late, foreign = (
        types.ModuleType(n) for n in ("trl.early", "trl.late", "trlx_like_but_not_trl")
    )
    early.scores = foreign.scores = original
    early.kept = kept = object()
    monkeypatch.setitem(sys.modules, "trl.early", early)
    monkeypatch.setitem(sys.modules, foreign.__name__, foreign)
    with patch_trl() as patched:
        late.scores = trl_utils.selective_log_softmax
        monkeypatch.setitem(sys.modules, "trl.late", late)
        assert early.scores is late.scores is not original
        assert foreign.scores is original
    assert early.scores is late.scores is original and early.kept is kept
    assert "trl.early.scores" in patched.replaced


def test_nested_use_is_refused_and_leaves_the_outer_one(trl_utils):
    with patch_trl() as outer:
        with pytest.raises(RuntimeError, match="patch_trl: expected TRL's own .*, got that of an"):
            with patch_trl():
                pass
        trl_utils.entropy_from_logits(torch.zeros(1, 2))
    assert outer.calls == {"entropy_from_logits": 1}


def test_two_threads_at_once(trl_utils, monkeypatch):
    """The second comes while the first is about to replace TRL's functions."""
    before, errors = held(trl_utils), []

    def second():
        try:
            with patch_trl():
                pass
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=second)
    module = sys.modules[patch_trl.__module__]
    real = module._replace

    def replace(swaps):
        if not thread.ident:
            thread.start()
            thread.join(0.2)
        return real(swaps)

    monkeypatch.setattr(module, "_replace", replace)
    with patch_trl() as patched:
        thread.join()
        trl_utils.entropy_from_logits(torch.zeros(1, 2))
        assert trl_utils._use_triton("cpu")
    assert len(errors) == 1 and patched.calls == {"entropy_from_logits": 1}
    assert all(x is y for x, y in zip(held(trl_utils), before, strict=True))


@pytest.mark.parametrize("name", NAMES[:-1])
def test_a_trl_whose_function_takes_other_arguments(trl_utils, monkeypatch, name):
    """TRL 1.14 has all of the names, and two results of the first where there are five now."""

    def other(last_hidden, weight, *, chunk_size=7):
        raise AssertionError("called")

    monkeypatch.setattr(trl_utils, name, other)
    before = dict(vars(trl_utils))
    with pytest.raises(ImportError, match=rf"{name}\(.*, got trl .* with \(last_hidden, weight, "):
        with patch_trl():
            pass
    assert vars(trl_utils) == before


@pytest.mark.parametrize("name", NAMES[:-1])
def test_a_trl_that_lacks_a_name(trl_utils, monkeypatch, name):
    monkeypatch.delattr(trl_utils, name)
    before = dict(vars(trl_utils))
    with pytest.raises(ImportError, match=rf"expected trl.trainer.utils.{name}, got trl "):
        with patch_trl():
            pass
    assert vars(trl_utils) == before


def test_without_trl(monkeypatch):
    for name in [n for n in sys.modules if n.partition(".")[0] == "trl"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Without("trl"), *sys.meta_path])
    with pytest.raises(ImportError, match="patch_trl: expected the module trl.*, got none"):
        with patch_trl():
            pass


def test_what_trl_itself_lacks_is_said_as_it_is(monkeypatch):
    def lacks(_):
        raise ModuleNotFoundError("No module named 'datasets'", name="datasets")

    monkeypatch.setattr("importlib.import_module", lacks)
    with pytest.raises(ModuleNotFoundError, match="^No module named 'datasets'"):
        with patch_trl():
            pass


class Without:
    """As if a package were not installed."""

    def __init__(self, package):
        self.package = package

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None
