"""The gate: a planted error is caught before anything is timed."""

import copy
import types
import weakref
from dataclasses import replace

import pytest
import torch

import fastrl
from bench import gate, memory, run
from bench.case import Case, Unavailable
from bench.peers import REFERENCE, Peer
from bench.run import Bench
from bench.timing import Budget
from bench.workloads import WORKLOADS

CPU = torch.device("cpu")
TINY = Budget(seconds=0.001, least_rounds=2, most_rounds=3, turn_seconds=1e-5)
GAE = Case("gae", (4, 40), "small", options={"gamma": 0.99, "gae_lambda": 0.95})
LOGPROBS = Case("token_logprobs", (8, 1000), "small", mode="both")
SAMPLE = Case("sample_tokens", (4, 100), "small", inputs=("seeds",))


class SmallCopy:
    bytes = 8

    def __call__(self):
        torch.ones(1).clone()


def bench(ops=fastrl.ops, peers=()):
    return Bench(CPU, TINY, ops=ops, peers_of=lambda op: list(peers), copy=SmallCopy())


def skips_last_block(**arguments):
    advantages, returns = fastrl.gae(**arguments)
    advantages[:, -16:] = 0
    return advantages, returns


def skips_last_row(logits, token_ids, **options):
    logprobs = fastrl.token_logprobs(logits[:-1], token_ids[:-1], **options)
    return torch.cat([logprobs, torch.zeros(1)])


class _GradientOfOneBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits):
        return logits.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad[:, -100:] = 0
        return grad


def gradient_skips_last_block(logits, token_ids, **options):
    return fastrl.token_logprobs(_GradientOfOneBlock.apply(logits), token_ids, **options)


def draws_other_ids(logits, **options):
    token_ids, logprobs = fastrl.sample_tokens(logits, **options)
    return token_ids.flip(0), logprobs


@pytest.mark.parametrize(
    ("case", "planted"),
    [
        (GAE, skips_last_block),
        (LOGPROBS, skips_last_row),
        (LOGPROBS, gradient_skips_last_block),
        (SAMPLE, draws_other_ids),
    ],
)
def test_a_planted_error_is_caught_and_not_timed(case, planted):
    result = bench(types.SimpleNamespace(**{case.op: planted})).run(case)
    assert result.wrong is not None and result.wrong.startswith(f"{case.op}: expected output")
    assert result.entries == []


def test_an_op_that_breaks_is_wrong_and_the_run_goes_on(capsys):
    def breaks(**arguments):
        raise RuntimeError("out of something")

    result = bench(types.SimpleNamespace(gae=breaks)).run(GAE)
    assert result.wrong == "gae: raised RuntimeError: out of something" and not result.entries
    assert "in breaks" in capsys.readouterr().err


def forwards_and_backwards(case):
    """How often the op is called, and how often its backward pass."""
    counts = {"forward": 0, "backward": 0}

    def counted(**arguments):
        counts["forward"] += 1
        outputs = getattr(fastrl, case.op)(**arguments)
        if outputs.requires_grad:
            outputs.register_hook(lambda _: counts.update(backward=counts["backward"] + 1))
        return outputs

    assert bench(types.SimpleNamespace(**{case.op: counted})).run(case).wrong is None
    return counts


def test_a_backward_pass_alone_has_a_forward_pass_before_each():
    counts = forwards_and_backwards(replace(LOGPROBS, mode="backward"))
    assert 0 < counts["backward"] <= counts["forward"]
    assert forwards_and_backwards(replace(LOGPROBS, mode="forward"))["backward"] == 0


@pytest.mark.parametrize(
    "case", [GAE, LOGPROBS, replace(LOGPROBS, mode="backward"), SAMPLE],
    ids=lambda case: f"{case.op} {case.mode}",
)  # fmt: skip
def test_the_right_op_passes_and_is_timed(case):
    result = bench().run(case)
    assert result.wrong is None
    ours = result.ours
    assert ours is not None and ours.ratio == 1.0 and 0 < ours.time_us["p20"] <= ours.time_us["p80"]
    assert ours.error < 1e-5


def test_the_gate_looks_at_the_first_and_the_last_rows_of_a_large_matrix():
    case = Case("token_logprobs", (1001, 151936), "large")
    pieces = list(WORKLOADS[case.op].pieces(case))
    assert pieces[0].start == 0 and pieces[-1].stop == 1001 and len(pieces) == 8


def test_nan_is_an_infinite_error_unless_the_truth_is_nan_too():
    errors = gate.Errors()
    errors.add(0, torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 2.0]).double())
    assert errors.worst == torch.inf


def raises(reason):
    def build(case, arguments):
        raise reason

    return build


def test_a_missing_peer_is_listed_with_its_reason():
    peers = [
        Peer("gone", "no-such-distribution", raises(AssertionError)),
        Peer("unable", "torch", raises(Unavailable("has no mask"))),
        Peer("broken", "torch", raises(RuntimeError("no kernel\nand more"))),
        Peer("another", "torch", lambda case, a: lambda: (2 * fastrl.gae(**a, **case.options)[0],)),
    ]
    result = bench(peers=peers).run(GAE)
    reasons = {m["name"]: m["reason"] for m in result.missing}
    assert reasons["gone"] == "not installed: pip install no-such-distribution"
    assert reasons["unable"] == "has no mask"
    assert reasons["broken"] == "raised RuntimeError: no kernel"
    assert reasons["another"].startswith("computes something else here: off by")
    assert [entry.name for entry in result.entries] == ["fastrl"]


def tired(calls):
    """A gae that has no memory left once it has been let in."""
    made = []

    def gae(**arguments):
        made.append(1)
        if len(made) > calls:
            raise MemoryError("no more")
        return fastrl.gae(**arguments)

    return gae


def test_a_peer_that_breaks_while_timed_is_missing_and_the_others_are_timed():
    gae = tired(4)
    peer = Peer("tired", "torch", lambda case, a: lambda: gae(**a, **case.options))
    result = bench(peers=[peer, REFERENCE]).run(GAE)
    assert [entry.name for entry in result.entries] == ["fastrl", "fastrl.reference"]
    (missing,) = result.missing
    assert missing["name"] == "tired"
    assert missing["reason"] == "while being timed, raised MemoryError: no more"
    assert result.wrong is None


def test_an_op_that_breaks_while_timed_costs_its_case_alone(capsys):
    result = bench(types.SimpleNamespace(gae=tired(6)), [REFERENCE]).run(GAE)
    assert result.wrong == "gae: while being timed, MemoryError: no more" and not result.entries
    capsys.readouterr()


def test_our_figures_are_kept_before_a_peer_enters():
    kept = []

    def build(case, arguments):
        assert [[e.name for e in result.entries] for result in kept] == [["fastrl"]]
        assert kept[0].copy_gb_s
        assert kept[0].missing[-1]["reason"] == "the run ended before they were timed"
        raise Unavailable("has seen enough")

    found = bench(peers=[Peer("witness", "torch", build), REFERENCE])
    result = found.run(GAE, keep=lambda case: kept.append(copy.deepcopy(case)))
    assert [e.name for e in result.entries] == ["fastrl", "fastrl.reference"]
    assert [m["reason"] for m in result.missing] == ["has seen enough"] and found.lost is None


@pytest.mark.parametrize("when", ["entering", "timed"])
def test_who_breaks_the_device_costs_the_other_peers_and_not_us(monkeypatch, capsys, when):
    def release(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(memory, "release", release)
    monkeypatch.setattr(run, "unusable", lambda device: "raised RuntimeError: CUDA error")
    gae = tired({"entering": 0, "timed": 4}[when])
    peers = [Peer("faulty", "torch", lambda case, a: lambda: gae(**a, **case.options)), REFERENCE]
    found = bench(peers=peers)
    result = found.run(GAE, keep=lambda case: None)
    assert result.wrong is None and [e.name for e in result.entries] == ["fastrl"]
    assert [m["name"] for m in result.missing] == ["faulty", "the other peers"]
    assert "raised MemoryError: no more" in result.missing[0]["reason"]
    assert "lost to this process: raised RuntimeError" in found.lost
    assert result.missing[1]["reason"] == found.lost
    capsys.readouterr()


def test_inputs_that_do_not_fit_cost_their_case_alone(monkeypatch, capsys):
    def make(case, device):
        raise MemoryError("too large")

    monkeypatch.setitem(WORKLOADS, "gae", replace(WORKLOADS["gae"], make=make))
    result = bench().run(GAE)
    assert result.wrong == "gae: raised MemoryError: too large" and not result.entries
    capsys.readouterr()


def test_what_a_peer_could_not_hold_is_free_for_the_next_one(monkeypatch):
    """The error's frames hold the peer's tensors for as long as the error is looked at."""
    held, left = [], []

    def build(case, arguments):
        def call():
            large = torch.zeros(1000)
            held.append(weakref.ref(large))
            raise MemoryError("no more")

        return call

    monkeypatch.setattr(memory, "release", lambda device: left.append(held[-1]() is not None))
    bench(peers=[Peer("large", "torch", build)]).run(GAE)
    assert left == [False]


def no_kernel(**arguments):
    raise NotImplementedError("gae: expected a CPU tensor")


def test_where_we_have_no_kernel_that_is_listed_and_the_peers_are_timed():
    result = bench(types.SimpleNamespace(gae=no_kernel), [REFERENCE]).run(GAE)
    assert result.missing[0] == {
        "name": "fastrl", "version": "", "reason": "gae: expected a CPU tensor",
    }  # fmt: skip
    (plain,) = result.entries
    assert result.ours is None and result.wrong is None and plain.ratio is None
    assert plain.time_us["p50"] > 0 and 0 < plain.share_of_ceiling
    assert result.eager_error == plain.error < 1e-5
    assert bench(types.SimpleNamespace(gae=no_kernel)).run(GAE).entries == []


def destroys_its_input(case, arguments):
    def call():
        outputs = fastrl.token_logprobs(arguments["logits"].clone(), arguments["token_ids"])
        with torch.no_grad():
            arguments["logits"].fill_(torch.nan)
        return (outputs,)

    return call


def test_a_peer_that_overwrites_its_input_gets_a_fresh_copy_each_time():
    case = Case("token_logprobs", (8, 100), "small", mode="both")
    rude = Peer("rude", "torch", destroys_its_input, overwrites=("logits",))
    result = bench(peers=[rude, REFERENCE]).run(case)
    assert [e.name for e in result.entries] == ["fastrl", "rude", "fastrl.reference"]
    assert all(e.error < 1e-5 for e in result.entries)


def test_matrix_products_are_held_against_their_own_ceiling():
    case = Case("linear_token_logprobs", (16, 32, 64), "small", mode="both")
    result = bench(peers=[REFERENCE]).run(case)
    ours, plain = result.entries
    assert result.counted_flops == 3 * 2 * 16 * 32 * 64
    assert result.product_tflop_s > 0 and result.ceiling in ("copy", "product")
    for entry in (ours, plain):
        assert entry.tflop_s == pytest.approx(result.counted_flops / entry.time_us["p50"] / 1e6)
    assert bench(peers=[REFERENCE]).run(GAE).product_tflop_s is None
