"""The list of cases: complete, countable, and computed alike by those that stand beside us."""

import inspect

import pytest
import torch

import fastrl
from bench import peers
from bench.case import DEVICES, Case, call_reference, double
from bench.cases import CASES, select
from bench.gate import Gate, run_once, with_leaves
from bench.peers import attention
from bench.peers.attention import visible
from bench.workloads import WORKLOADS
from bench.workloads.attention import layout_of, visible_pairs

CPU = torch.device("cpu")
ALL = [case for cases in CASES.values() for case in cases]
# One for each thing that an attention case can ask for.
ATTENTION = [
    Case("attention", (2, 4, 2, 40, 40, 16), "causal", mode="both"),
    Case("attention", (2, 4, 4, 33, 33, 16), "not causal", options={"causal": False}),
    Case("attention", (1, 4, 2, 40, 40, 16), "window", options={"window": 7}),
    Case("attention", (1, 2, 2, 21, 21, 8), "softcap", options={"softcap": 5.0}),
    Case("attention", (3, 4, 2, 1, 64, 16), "decoding", inputs=("key_end",)),
    Case("attention", (1, 4, 2, 44, 44, 16), "group", mode="both", layout="20 + 3 x 8"),
    Case("attention", (1, 4, 2, 27, 27, 16), "ragged group", mode="both", layout="12 + 3 x 2..8"),
    Case("attention", (1, 4, 2, 18, 18, 16), "rows of their own", layout="3 x 4..8"),
    Case("attention", (1, 4, 2, 54, 54, 16), "ragged", layout="12 + 3 x 2..8, 9 + 2 x 4..14"),
]


def test_names_are_unique_and_every_case_has_a_reason_and_a_place_to_run():
    names = [case.name for case in ALL]
    assert len(names) == len(set(names))
    assert all(case.reason and case.devices for case in ALL)
    for case in ALL:
        assert all(target.device in case.devices for target in case.targets)


def test_every_op_with_kernels_or_without_has_cases_a_workload_and_peers():
    small = {
        "actor_critic_loss", "group_advantages", "kl_penalty", "policy_gradient_loss", "ppo_loss",
        "value_loss", "whiten",
    }  # fmt: skip
    assert set(CASES) == set(WORKLOADS) == set(fastrl.ops.__all__) - small
    for op in CASES:
        assert peers.of(op)[0].name == peers.REFERENCE.name
    assert {case.op for case in select([], quick=True)} == set(CASES)


def test_every_peer_is_pinned():
    found = {peer.package for op in CASES for peer in peers.of(op)}
    assert found >= {"torch", "trl", "torchrl", "numba", "liger-kernel", "cut-cross-entropy"}
    assert [package for package in found if not peers.pinned(package)] == []


def test_the_sizes_that_people_ask_about_are_there():
    vocabularies = {case.shape[1] for case in CASES["token_logprobs"]}
    assert {32000, 128256, 151936, 256000, 50257} <= vocabularies
    for device in DEVICES:
        rows = {c.shape[0] for c in select(["token_logprobs"], device=device)}
        assert min(rows) <= 8 and max(rows) >= 1024
    assert max(case.shape[-1] for case in CASES["gae"]) >= 16384
    assert any("cu_seqlens" in case.inputs for case in CASES["gae"])
    assert any(".." in case.layout for case in CASES["attention"])


def test_every_op_has_a_size_that_fills_a_gpu():
    filling = {c.op for c in select([], quick=True, device="cuda") if c.devices == ("cuda",)}
    assert filling == set(CASES)


def test_every_optional_input_is_one_that_the_op_takes():
    for case in ALL:
        parameters = inspect.signature(getattr(fastrl, case.op)).parameters
        assert {*case.inputs, *case.options} <= set(parameters)


@pytest.mark.parametrize("case", ATTENTION, ids=lambda case: case.reason)
def test_pairs_are_counted_as_the_mask_shows_them(case):
    arguments = WORKLOADS["attention"].make(case, CPU)
    assert visible_pairs(case, arguments) == int(visible(case, arguments).sum())


def test_layouts_are_read_from_their_text():
    layout = layout_of("20 + 3 x 8, 2 x 6..7, 5 + 2 x 1..4")
    assert layout.cu_seqlens.diff().tolist() == [20, 8, 8, 8, 6, 7, 5, 1, 4]
    assert layout.prefix.tolist() == [-1, 0, 0, 0, -1, -1, -1, 6, 6]


def peer_errors(case):
    """Of each peer that runs here uncompiled; a reason for the others."""
    workload = WORKLOADS[case.op]
    arguments = with_leaves(case, workload, workload.make(case, CPU))
    upstream = tuple(torch.randn(workload.upstream_shape(case)) for _ in range(2))
    gate = Gate(case, workload, arguments, upstream)
    found = {}
    for peer in peers.of(case.op):
        try:
            call = peer.call_for(case, arguments)
            found[peer.name] = gate.peer_error(run_once(call, case, workload, arguments, upstream))
        except Exception as reason:
            found[peer.name] = str(reason)
    return found


BLOCKWISE = [
    *ATTENTION,
    Case("linear_token_logprobs", (13, 8, 30), "rows", mode="both",
         options={"return_entropy": True, "softcap": 4.0}),
    Case("linear_token_loss", (13, 8, 30), "loss", mode="both"),
]  # fmt: skip


@pytest.mark.parametrize("case", BLOCKWISE, ids=lambda case: case.reason)
def test_a_definition_in_blocks_is_the_reference(case, monkeypatch):
    """Of the sizes that need it, nothing else could say what is right."""
    workload = WORKLOADS[case.op]
    arguments = double(workload.make(case, CPU))
    monkeypatch.setattr(f"{inspect.getmodule(workload.definition).__name__}.BLOCK", 300)
    results = []
    for definition in (call_reference, workload.definition):
        leaves = with_leaves(case, workload, arguments)
        upstream = (torch.ones(workload.upstream_shape(case)),) * 2
        outputs = run_once(
            lambda f=definition, a=leaves: f(case, a), case, workload, leaves, upstream
        )
        results.append(outputs)
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.mark.filterwarnings("ignore:.*flex_attention.*")
@pytest.mark.parametrize("case", ATTENTION, ids=lambda case: case.reason)
def test_the_other_attentions_compute_the_case_or_say_why_not(case, uncompiled):
    found = peer_errors(case)
    wrong = {k: v for k, v in found.items() if isinstance(v, float) and not v < 1e-5}
    assert not wrong
    runs = {name for name, error in found.items() if isinstance(error, float)}
    assert "fastrl.reference" in runs
    # Some releases of torch have no gradient of it on a CPU.
    assert "torch FlexAttention" in (runs if case.mode == "forward" else found)
    softcap = "softcap" in case.options
    assert ("torch SDPA, math" in runs) is (not softcap)
    assert ("torch SDPA, flash" in runs) is (not softcap)
    assert ("torch SDPA, a copy of the prompt each" in runs) == case.reason.endswith("group")
    assert found["torch SDPA, cuDNN"] in ("runs on a GPU alone", "has no softcap")


def test_flash_is_deterministic_in_its_backward_pass_and_nothing_else_is(monkeypatch):
    seen = []

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(torch.are_deterministic_algorithms_enabled())
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            seen.append(torch.are_deterministic_algorithms_enabled())
            return 2 * grad

    monkeypatch.setattr(attention, "on_cuda", lambda _: None)
    monkeypatch.setattr(
        attention, "_sdpa", lambda _: lambda _, given: lambda: (Doubled.apply(given["query"]),)
    )
    (peer,) = (p for p in attention.of("attention") if p.name.endswith("deterministic"))
    leaves = {k: torch.ones(2, 4, 40, 16, requires_grad=True) for k in ("query", "key", "value")}
    (out,) = peer.call_for(ATTENTION[0], leaves)()
    out.sum().backward()
    assert seen == [False, True] and not torch.are_deterministic_algorithms_enabled()
    assert leaves["query"].grad.eq(2).all()


@pytest.mark.parametrize("op", ["linear_token_logprobs", "linear_token_loss"])
def test_torch_compute_the_linear_cases(op, uncompiled):
    found = peer_errors(Case(op, (24, 16, 50), "small", mode="both"))
    assert found["fastrl.reference"] < 1e-5
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        assert found["torch linear_cross_entropy"] < 1e-5
    for name, error in found.items():  # the others, where they are installed
        assert isinstance(error, str) or error < 1e-5, name
