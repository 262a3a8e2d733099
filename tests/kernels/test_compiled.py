"""Every kernel as code for a GPU: what it takes of one, and what that code looks like."""

import itertools
import re

import pytest
import torch


def test_every_configuration_keeps_to_the_budget(compiled):
    from ahead_of_time import ARCHITECTURES, over_budget

    assert not [line for kernel in compiled for line in over_budget(kernel)]
    names = {kernel.name for kernel in compiled}
    reached = {(kernel.name, kernel.request.arch) for kernel in compiled}
    assert reached == {(name, arch) for name in names for arch in ARCHITECTURES}


def test_every_block_size_that_ships_is_compiled(compiled):
    from fastrl.kernels import token_logprobs

    walkers = [k.request for k in compiled if "_merge_" not in k.name]
    shipped = {(b["BLOCK_V"], b["num_warps"]) for b in token_logprobs.BLOCKS}
    for name in {request.name for request in walkers}:
        reached = {
            (r.named_constants["BLOCK_V"], r.options["num_warps"])
            for r in walkers
            if r.name == name and r.arch == 90
        }
        assert reached == shipped


def test_aligned_rows_move_16_bytes_at_a_time(compiled):
    """So the specialisation that a GPU would see is the one that was compiled."""
    seen = set()
    for kernel in compiled:
        constants = kernel.request.named_constants
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


def test_sums_do_not_depend_on_how_threads_share_a_block(compiled):
    """An alignment changes what a thread holds, and with it the order of a plain tl.sum. So every
    sum is of two numbers, where there is but one order."""
    pattern = r'"tt\.reduce"\(.*?arith\.(\w+) .*?\}\) : \(tensor<(\d+)\w*xf32'
    addends = set()
    for kernel in compiled:
        if not kernel.name.startswith("token_logprobs."):
            continue
        reductions = re.findall(pattern, kernel.ttgir, re.DOTALL)
        assert len(reductions) == kernel.ttgir.count('"tt.reduce"')
        addends |= {int(size) for operation, size in reductions if operation == "addf"}
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
