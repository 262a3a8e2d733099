"""attention as code for a GPU: its configurations, its sums, and what makes another kernel."""

import itertools
import re

import torch

SIZES = ("BLOCK_M", "BLOCK_N", "BLOCK_D", "num_warps", "num_stages")


def walkers(compiled):
    """(fwd, dq or dkdv; the sizes; the kernel) of those that walk blocks."""
    for kernel in compiled:
        found = re.fullmatch(r"_attention_\w+\._attention_(fwd|dq|dkdv)_kernel", kernel.name)
        if found:
            request = kernel.request
            given = {**request.named_constants, **request.options}
            yield found[1], tuple(given[size] for size in SIZES), kernel


def is_half(kernel):
    """float16 or bfloat16."""
    return any("bf16" in kind or "fp16" in kind for kind in kernel.request.signature.values())


def test_every_configuration_that_ships_is_compiled(compiled):
    """For its chip; what sm_80 or sm_100 share with sm_90 for that one."""
    from fastrl.kernels._attention_configs import config_for

    reached = {
        (name, kernel.request.arch, is_half(kernel), sizes)
        for name, sizes, kernel in walkers(compiled)
    }
    settings = itertools.product(
        ("fwd", "dq", "dkdv"), (32, 64, 128, 256), (torch.bfloat16, torch.float32), (False, True)
    )
    for name, head_size, dtype, tight in settings:
        of_chip = {chip: config_for(name, head_size, dtype, tight, chip) for chip in (90, 80, 100)}
        for chip, config in of_chip.items():
            compiled_for = 90 if config == of_chip[90] else chip
            sizes = tuple(config[size] for size in SIZES)
            assert (name, compiled_for, dtype == torch.bfloat16, sizes) in reached


def test_every_chip_and_head_size_has_blocks_that_divide_a_tile():
    from fastrl._tiles import SPLIT, TILE
    from fastrl.kernels._attention_configs import config_for, padded

    assert SPLIT % TILE == 0
    for head_size in (1, 16, 32, 40, 64, 80, 96, 112, 128, 160, 192, 256):
        for name in ("fwd", "dq", "dkdv"):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                for chip in (80, 86, 89, 90, 100, 103, 120):
                    config = config_for(name, head_size, dtype, False, chip)
                    assert config["BLOCK_D"] == padded(head_size) >= head_size
                    assert TILE % config["BLOCK_M"] == TILE % config["BLOCK_N"] == 0


def test_chips_with_little_shared_memory_have_enough(compiled):
    """sm_86, sm_89 and sm_120, with 99 KiB, take the blocks of sm_80."""
    kernels = [kernel for *_, kernel in walkers(compiled)]
    theirs = [kernel for kernel in kernels if kernel.request.arch == 80 or not is_half(kernel)]
    assert theirs and not [str(k.request) for k in theirs if k.shared > 99 * 1024]


def test_hopper_and_blackwell_load_blocks_by_descriptor_and_multiply_with_their_own_units(compiled):
    products = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
    seen = set()
    for name, _, kernel in walkers(compiled):
        constants, arch = kernel.request.named_constants, kernel.request.arch
        if not is_half(kernel):
            continue
        assert ("cp.async.bulk.tensor" in kernel.ptx) == constants["DESCRIPTORS"]
        assert constants["DESCRIPTORS"] or "cp.async.c" in kernel.ptx or arch == 80
        if min(constants["BLOCK_M"], constants["BLOCK_N"]) >= 64:
            assert products[arch] in kernel.ptx, str(kernel.request)
        seen.add((name, arch, constants["DESCRIPTORS"]))
    assert seen >= {(name, arch, True) for name in ("fwd", "dq", "dkdv") for arch in (90, 100)}


def test_hopper_waits_for_products_and_not_for_each_of_their_parts(compiled):
    """Where warps share rows, or registers are short, ptxas puts a wait behind every wgmma."""
    from ahead_of_time import machine_code

    # Of each configuration of the usual head size one: to disassemble takes half a second.
    kernels = {
        (name, sizes): kernel
        for name, sizes, kernel in walkers(compiled)
        if kernel.request.arch == 90 and is_half(kernel) and sizes[2] == 128
    }
    assert {name for name, _ in kernels} == {"fwd", "dq", "dkdv"}
    for (name, _), kernel in kernels.items():
        code = machine_code(kernel)
        # One for the product of each score that is read, and one behind the walk.
        waits = {"fwd": 2, "dq": 3, "dkdv": 3}[name]
        assert code.count("HGMMA") >= 8
        assert code.count("WARPGROUP.DEPBAR") == waits, str(kernel.request)


def layouts_of_row_sums(kernel):
    """The layouts, spelled out, in which numbers are added up along an axis."""
    names = dict(re.findall(r"^(#\w+) = (.*)$", kernel.ttgir, re.MULTILINE))
    pattern = r'"tt\.reduce"\(.*?arith\.(\w+) .*?\}\) : \(tensor<([\dx]+)xf32, (#\w+)>'
    found = re.findall(pattern, kernel.ttgir, re.DOTALL)
    return {(shape, names[layout]) for operation, shape, layout in found if operation == "addf"}


def test_the_order_of_a_row_sum_is_that_of_the_product(compiled):
    """Of one configuration, whichever features it is compiled with and however its blocks are
    loaded: the only long sums of the kernels that walk blocks are over a row of p, which lies as
    the product left it."""
    layouts = {}
    for name, sizes, kernel in walkers(compiled):
        of_kernel = layouts_of_row_sums(kernel)
        assert bool(of_kernel) == (name == "fwd")
        if name == "fwd":
            ((shape, layout),) = of_kernel
            assert shape == "x".join(map(str, sizes[:2]))
            key = kernel.request.arch, is_half(kernel), sizes
            layouts.setdefault(key, set()).add(layout)
    assert len(layouts) >= 12
    assert all(len(found) == 1 for found in layouts.values()), layouts


def bf16(*shape):
    return torch.empty(shape, dtype=torch.bfloat16)


LYING = {
    "plain": lambda b, h, t, d: bf16(b, h, t, d),
    "heads behind tokens": lambda b, h, t, d: bf16(b, t, h, d).transpose(1, 2),
    "a part of a projection": lambda b, h, t, d: bf16(b, t, h, 3 * d)[..., d:-d].transpose(1, 2),
    "off 16 bytes": lambda b, h, t, d: bf16(b * h * t * d + 1)[1:].view(b, h, t, d),
}


def calls(lying, batch, heads, key_heads, T, S, number):
    """A dense batch and a packed one, each forward and backward; `number` is in all that varies."""
    from fastrl.kernels import attention

    tables = [torch.empty(number + 2, n, dtype=torch.int32) for n in (2, 5, 7, 4)]
    # From the second on, as a slice of a longer tensor is: off 16-byte bounds.
    i32 = torch.empty(T + 1, dtype=torch.int32)[number % 2 :]
    i64 = torch.empty(T + 1, dtype=torch.int64)[number % 2 :]
    numbers = (True, 0.1 * number, 10 + number)
    for rows, keys, visible in (
        (batch, S, (i32, None, None, None, [], *numbers, 3.0 * number)),
        (1, T, (None, None, i64, i32, tables, *numbers, None)),
    ):
        query, key = lying(rows, heads, T, 64), lying(rows, key_heads, keys, 64)
        lse = torch.empty(rows, heads, T)
        yield attention.attention_fwd, query, key, key, *visible, True
        saved = (query, lse, query, key, key, query, lse, query)
        yield attention.attention_bwd, *saved, *visible, True, True, True


def test_what_changes_from_step_to_step_makes_no_new_kernel():
    from ahead_of_time import record

    made = [set() for _ in range(4)]
    shapes = [(1, 4, 4, 100, 100), (2, 4, 1, 129, 1000), (16, 8, 2, 2048, 4096), (3, 6, 2, 64, 64)]
    for lying, (number, shape) in itertools.product(LYING.values(), enumerate(shapes, 1)):
        for keys, call in zip(made, calls(lying, *shape, number), strict=True):
            keys.add(tuple(request.key for request in record(90, *call)))
    assert [len(keys) for keys in made] == [1, 1, 1, 1]


def test_lanes_that_share_keys_run_together_as_far_as_these_fit():
    from fastrl.kernels._attention_configs import lanes_of_section

    assert lanes_of_section(64, 8, 2**20) == 64  # sixteen times 8 heads, and there are 8 times 8
    assert lanes_of_section(64, 8, 8 * 2**20) == 16
    assert lanes_of_section(64, 8, 2**30) == 8
    assert lanes_of_section(64, 8, 0) == 64  # no keys
