import pytest

from fastrl import _C

GPU = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=["cpu", GPU])
def device(request):
    return request.param


@pytest.fixture(params=_C.build_facts()["simd_levels"])
def simd_level(request):
    before = _C.simd_level()
    if not _C.select_simd_level(request.param):
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    assert _C.select_simd_level(before)


@pytest.fixture(params=[*(f"cpu-{level}" for level in _C.build_facts()["simd_levels"]), GPU])
def any_kernel(request):
    """The device, with each of its kernels in turn."""
    device, _, level = request.param.partition("-")
    before = _C.simd_level()
    if level and not _C.select_simd_level(level):
        pytest.skip(f"this processor has no {level}")
    yield device
    assert _C.select_simd_level(before)
