"""A kernel that the tests here do not reach fails one."""

from pathlib import Path

import listing
import pytest

import fastrl

PACKAGE = Path(fastrl.__file__).parent / "kernels"
TESTS = Path(__file__).parent


def test_every_kernel_is_listed_compiled_and_run(recorded):
    from launches import launches

    listed = {launch.name for launch in launches()}
    names = {request.name for request in recorded[90]}
    assert not listing.missing(PACKAGE, TESTS, listed, names)
    assert listed and names == listing.kernels(PACKAGE)


SOURCE = """
import triton

@triton.jit
def helper(x):
    return x

@triton.jit(do_not_specialize=["N"])
def _scan_kernel(x_ptr, N):
    helper(x_ptr)

@triton.jit
def _forgotten_kernel(x_ptr):
    helper(x_ptr)

def block_for(size):
    return size

def _launch(x):
    _scan_kernel[(block_for(3),)](x, 3)

def scan_fwd(x):
    return _launch(x)

def scan_bwd(x):
    _forgotten_kernel[(1,)](x)
"""


@pytest.fixture
def planted(tmp_path):
    """A package with two launchers, and a test file that runs one of them."""
    package, tests = tmp_path / "package", tmp_path / "tests"
    package.mkdir(), tests.mkdir()
    (package / "scan.py").write_text(SOURCE)
    (tests / "test_scan.py").write_text('interpreted("scan", "scan_fwd", x)\n')
    return package, tests


def test_what_is_a_kernel_and_what_a_launcher(planted):
    package, _ = planted
    assert listing.kernels(package) == {"scan._scan_kernel", "scan._forgotten_kernel"}
    assert listing.launchers(package) == {"scan.scan_fwd", "scan.scan_bwd"}


def test_an_unlisted_kernel_is_caught(planted):
    assert listing.missing(*planted, {"scan.scan_fwd"}, {"scan._scan_kernel"}) == [
        "scan._forgotten_kernel: no launch reaches it",
        "scan.scan_bwd: no call in launches.py",
        "scan.scan_bwd: not run by test_scan.py",
    ]


def test_a_module_without_interpreter_tests_is_caught(planted):
    package, tests = planted
    listed, recorded = listing.launchers(package), listing.kernels(package)
    (tests / "test_scan.py").write_text('("scan_fwd", "scan_bwd")')
    assert not listing.missing(package, tests, listed, recorded)
    (tests / "test_scan.py").unlink()
    assert listing.missing(package, tests, listed, recorded) == [
        "scan.scan_bwd: not run by test_scan.py",
        "scan.scan_fwd: not run by test_scan.py",
    ]
