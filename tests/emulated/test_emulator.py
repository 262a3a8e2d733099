"""The emulator finds planted faults, and lets good kernels be."""

import ctypes

import pytest
from emulated.emulator import CHECKS, EMULATOR, compile_parts

PARTED = "have parted"
FAULTS = {
    0: PARTED, 1: PARTED, 2: PARTED, 3: PARTED, 4: "not there", 5: "not there", 6: "misaligned",
    7: "for ever",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory, compiler):
    folder = tmp_path_factory.mktemp("planted")
    parts = [("planted.cpp", CHECKS), ("emulator.cpp", [*EMULATOR, "-DFASTRL_PATIENCE=2000"])]
    library = ctypes.CDLL(str(compile_parts(compiler, folder, parts, [])))
    library.run.restype = ctypes.c_char_p

    def call(kernel, workers=1, seed=0):
        total = ctypes.c_float()
        said = library.run(kernel, workers, seed, ctypes.byref(total)).decode()
        return said, total.value

    return call


@pytest.mark.parametrize("kernel, fault", FAULTS.items())
def test_a_planted_fault_is_found(run, kernel, fault):
    assert fault in run(kernel)[0]


def test_a_block_that_waits_for_a_later_one_is_found(run):
    assert "for ever" in run(8, workers=1)[0]


def test_a_missing_barrier_shows_in_the_numbers(run):
    assert {run(11, seed=seed)[1] for seed in range(20)} == {1, 2}


@pytest.mark.parametrize("workers", [1, 2])
def test_good_kernels(run, workers):
    assert run(9, workers) == ("", 0)
    assert run(10, workers) == ("", 63 * 64 / 2)


@pytest.mark.parametrize("kernel, last", [(12, 62), (13, 1)])
def test_what_a_sanitizer_alone_sees(run, kernel, last):
    """tests/threads/test_cuda_races.py"""
    assert run(kernel, 2) == ("", last)
