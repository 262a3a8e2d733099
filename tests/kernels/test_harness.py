"""The checks themselves: each planted error is caught, and its healthy twin passes."""

import importlib.util
import math

import pytest
import torch
from budget import assert_within_budget


@pytest.mark.parametrize("size", [64, 65, 200])
def test_a_kernel_that_skips_its_last_block_is_caught(interpreted, size):
    x = torch.randn(size)
    for skip_last in (False, True):
        actual = interpreted("planted", "double", x, skip_last)
        assert actual.isnan().any() == skip_last  # fresh memory is poisoned there as well
        if skip_last:
            with pytest.raises(AssertionError):
                assert_within_budget(actual, 2 * x, 2 * x.double(), torch.float32)
        else:
            assert_within_budget(actual, 2 * x, 2 * x.double(), torch.float32)


def test_what_a_launcher_writes_is_seen_beside_its_tensor_too(interpreted):
    base = torch.zeros(3, 5)
    assert interpreted("planted", "overwrite", base[:, 1:3]) is None
    assert (base == 7).all()


def test_a_program_beside_its_tensors_or_where_another_one_writes_is_caught(interpreted):
    x = torch.randn(40)
    assert torch.equal(interpreted("planted", "copy", x, 0, 0), x)
    with pytest.raises(Exception, match="beside the tensors"):
        interpreted("planted", "copy", x, 1, 0)
    with pytest.raises(Exception, match="where another one"):
        interpreted("planted", "copy", x, 0, 1)


def test_bfloat16_is_as_torch_has_it(interpreted):
    """Also halfway between two of them, at both ends of its range, and in a matrix product."""
    x, y = torch.randn(2, 64)
    x[:5] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, -1e-40, -math.inf])
    found = interpreted("planted", "add_in_bfloat16", x, y)
    assert torch.equal(found, x.bfloat16() + y.bfloat16())
    assert torch.equal(interpreted("planted", "double", found, False), 2 * found)
    a, b = torch.randn(16, 64).bfloat16(), torch.randn(64, 16).bfloat16()
    product = interpreted("planted", "matmul", a, b, 16, 1, "ieee")
    torch.testing.assert_close(product, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def test_a_launcher_that_fails_is_heard(interpreted):
    with pytest.raises(AttributeError, match="no attribute 'halve'"):
        interpreted("planted", "halve", torch.ones(3))


def faults(arch, function, *arguments):
    from ahead_of_time import compile_all, over_budget, record

    kernels = compile_all(record(arch, function, *arguments))
    assert kernels
    return [line for kernel in kernels for line in over_budget(kernel)]


@pytest.fixture
def planted():
    pytest.importorskip("triton")
    import planted

    return planted


def test_a_kernel_that_spills_is_caught(planted):
    x = torch.empty(8192)
    assert "spills" in " ".join(faults(90, planted.softmax, x, 1))
    assert not faults(90, planted.softmax, x, 8)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_a_float32_product_in_tf32_is_caught(planted, arch):
    a, b = torch.empty(16, 64), torch.empty(64, 16)
    assert "tf32" in " ".join(faults(arch, planted.matmul, a, b, 16, 1, "tf32"))
    assert not faults(arch, planted.matmul, a, b, 16, 1, "ieee")


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_sums_in_the_order_in_which_programs_come_by_are_caught(planted, arch):
    assert "in whatever order" in " ".join(faults(arch, planted.sum_of_blocks, torch.empty(256)))


@pytest.mark.parametrize("arch, most", [(80, 5), (90, 6), (100, 6)])
def test_a_kernel_with_too_much_shared_memory_is_caught(planted, arch, most):
    """A stage takes 32 KiB; Triton uses one less than it is asked for, or all."""
    a = torch.empty(128, 1024, dtype=torch.bfloat16)
    b = a.view(1024, 128)
    assert "shared memory" in " ".join(faults(arch, planted.matmul, a, b, 64, most + 2, "ieee"))
    assert not faults(arch, planted.matmul, a, b, 64, most, "ieee")


SOURCE = """
import triton
import triton.language as tl

@triton.jit
def helper(x):
    return x + {helper}

@triton.jit
def kernel(x_ptr):
    tl.store(x_ptr, helper(tl.load(x_ptr)) + {kernel})

def launch(x):
    kernel[(1,)](x)
"""


def test_only_a_changed_source_is_compiled_again(planted, tmp_path):
    """Its own source, or that of a function that it calls."""
    import triton
    from ahead_of_time import compile_one, record

    hits = []

    def was_compiled(**constants):
        path = tmp_path / "source.py"
        path.write_text(SOURCE.format(**constants))
        spec = importlib.util.spec_from_file_location("source", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        (request,) = record(90, module.launch, torch.empty(1))
        hits.clear()
        compile_one(request)
        return not hits[0]

    with triton.knobs.cache.scope(), triton.knobs.compilation.scope():
        triton.knobs.cache.dir = str(tmp_path / "cache")
        triton.knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
        assert was_compiled(helper=1, kernel=1)
        assert not was_compiled(helper=1, kernel=1)
        assert was_compiled(helper=1, kernel=2)
        assert was_compiled(helper=2, kernel=2)
        assert not was_compiled(helper=1, kernel=1)
