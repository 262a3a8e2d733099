"""Every kernel as code for a GPU: what it takes of one, and what that code looks like."""

import itertools
import re

import pytest
import torch


def test_every_configuration_keeps_to_the_budget(compiled, record_property):
    from ahead_of_time import ARCHITECTURES, over_budget, table

    record_property("GPU kernels, compiled ahead of time", table(compiled))
    assert not [line for kernel in compiled for line in over_budget(kernel)]
    names = {kernel.name for kernel in compiled}
    reached = {(kernel.name, kernel.request.arch) for kernel in compiled}
    assert reached == {(name, arch) for name in names for arch in ARCHITECTURES}


def test_products_and_sums_are_fused_where_the_source_says_so_alone(recorded):
    for requests in recorded.values():
        for request in requests:
            assert request.options["enable_fp_fusion"] is False, request


def test_every_block_size_that_ships_is_compiled(compiled):
    from fastrl.kernels import _row_states, sample_tokens, token_logprobs

    backward = token_logprobs.BACKWARD + token_logprobs.BACKWARD_UNALIGNED
    both = (sample_tokens.DRAW, sample_tokens.TRUNCATE_AND_DRAW)
    shipped = {
        "_row_states._token_logprobs_fwd_kernel": _row_states.FORWARD,
        "token_logprobs._token_logprobs_bwd_kernel": backward,
        "sample_tokens._sample_tokens_kernel": both,
    }
    for name, blocks in shipped.items():
        reached = {
            (k.request.named_constants["BLOCK_V"], k.request.options["num_warps"])
            for k in compiled
            if k.name == name and k.request.arch == 90
        }
        assert reached == {(block["BLOCK_V"], block["num_warps"]) for block in blocks}


def test_aligned_rows_move_16_bytes_at_a_time(compiled):
    """So the specialisation that a GPU would see is the one that was compiled."""
    seen = set()
    for kernel in compiled:
        constants = kernel.request.named_constants
        if "V" not in kernel.request.kernel.arg_names:
            continue
        at = kernel.request.kernel.arg_names.index("V")
        ends_aligned = kernel.request.attributes.get((at,))  # tt.divisibility, or nothing
        if not constants.get("ALIGNED") or not ends_aligned:
            continue
        wide = r"(ld\.global|st\.global)(?=[.\w]*\.v4\.b32)"
        found = set(re.findall(wide, kernel.ptx))
        if re.search(r"cp\.async\.cg\.shared\.global .*\b(0x10|16)\b", kernel.ptx):
            found.add("ld.global")  # through shared memory
        backward = "_bwd_" in kernel.name
        assert found == ({"ld.global", "st.global"} if backward else {"ld.global"}), kernel.request
        seen.add((kernel.name, tuple(sorted(set(kernel.request.signature.values())))))
    assert len(seen) >= 6  # two kernels, three dtypes


def test_the_passes_that_truncate_load_four_aligned_columns_at_a_time(compiled):
    """Ahead of their use: from L2 a load takes as long as all that is done with it."""
    seen = set()
    for kernel in compiled:
        constants = kernel.request.named_constants
        if not (constants.get("TRUNCATE") and constants["ALIGNED"]):
            continue
        logits = next(iter(kernel.request.signature.values()))
        width = 16 if logits == "*fp32" else 8
        assert re.search(rf"cp\.async\.c\w\.shared\.global .*\b({width:#x}|{width})\b", kernel.ptx)
        seen.add(logits)
    assert len(seen) == 3


def test_sums_do_not_depend_on_how_threads_share_a_block(compiled):
    """An alignment changes what a thread holds, and with it the order of a plain tl.sum. So every
    sum of floats is of two numbers, where there is but one order; but for a row of attention's
    probabilities, which lie as a product leaves them: see test_attention_compiled.py."""
    pattern = r'"tt\.reduce"\(.*?axis = (\d).*?arith\.(\w+) .*?\}\) : \(tensor<([\dx]+)x[fi]\d'
    addends = set()
    for kernel in compiled:
        if kernel.name == "_attention_queries._attention_fwd_kernel":
            continue
        reductions = re.findall(pattern, kernel.ttgir, re.DOTALL)
        assert len(reductions) == kernel.ttgir.count('"tt.reduce"')
        for axis, operation, shape in reductions:
            if operation == "addf":
                addends.add(int(shape.split("x")[int(axis)]))
    assert addends == {1, 2}


LOGITS = {
    "3 rows": lambda v: torch.empty(3, v),
    "16 rows": lambda v: torch.empty(16, v),
    "17 rows": lambda v: torch.empty(17, v),
    "one row": lambda v: torch.empty(1, v),
    "no axis": lambda v: torch.empty(v),
    "[B, T, V]": lambda v: torch.empty(2, 5, v),
    "[B, T, V], T = 16": lambda v: torch.empty(2, 16, v),
    "[B, T - 1, V]": lambda v: torch.empty(2, 5, v)[:, :-1],
}


@pytest.mark.parametrize("vocab", [1024, 1000])
def test_neither_the_number_of_rows_nor_where_they_begin_makes_a_new_kernel(recorded, vocab):
    from ahead_of_time import record

    from fastrl.kernels.token_logprobs import token_logprobs_bwd, token_logprobs_fwd

    keys = set()
    for build, first in itertools.product(LOGITS.values(), (0, 1)):
        logits = build(vocab)
        # From the second on, as a slice of a batch's ids is: off 16-byte bounds.
        shape, count = logits.shape[:-1], logits.shape[:-1].numel()
        row = torch.empty(count + first)[first:].view(shape)
        ids = torch.empty(count + first, dtype=torch.int64)[first:].view(shape)
        forward = record(90, token_logprobs_fwd, logits, ids, 1.0, -100, True, False)
        saved = (ids, row, row, row, row, 1.0, -100, 0)
        backward = record(90, token_logprobs_bwd, row, row, logits, *saved)
        keys.add(tuple(request.key for request in forward + backward))
    assert len(keys) == 1
