"""The compiled module: its ABI, its facts, and what happens where it is missing."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastrl
from fastrl import _C
from fastrl.ops import _binary

ROOT = Path(fastrl.__file__).parent.parent


def undefined_symbols(library: str) -> list[str]:
    out = subprocess.run(
        ["nm", "--dynamic", "--undefined-only", "--demangle", library],
        capture_output=True,
        text=True,
        check=True,
    )
    return [line.split(maxsplit=1)[1] for line in out.stdout.splitlines()]


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
def test_only_the_stable_abi_is_used():
    symbols = undefined_symbols(_C.__file__)
    assert not [s for s in symbols if re.search(r"\b(at|c10|torch)::", s)]
    assert [s for s in symbols if s.startswith("aoti_torch_") or s.startswith("torch_")]


def test_each_class_of_the_cpu_headers_has_a_name_of_its_own():
    """Two of one name are one to the linker, which keeps the functions of either."""
    headers = sorted((ROOT / "csrc" / "cpu").glob("*.h"))
    named = [re.findall(r"^(?:class|struct) (\w+) [{:]", p.read_text(), re.M) for p in headers]
    names = sum(named, [])
    assert len(names) > 60 and sorted(names) == sorted(set(names))


def test_build_facts():
    facts = _C.build_facts()
    assert facts["simd_levels"][-1] == "plain"
    assert _C.simd_level() in facts["simd_levels"]
    assert not _C.select_simd_level("mmx")


def test_info_names_what_the_dispatcher_has():
    """IMPLEMENTATIONS is what `fastrl info` prints and what the checks obey."""
    registered = dict.fromkeys(("attention", "linear_token_logprobs", "token_logprobs"), "_fwd")
    for name, devices in _binary.IMPLEMENTATIONS.items():
        if name == "linear_token_loss":  # a Python function over other ops
            continue
        schema = f"fastrl::{name}" + registered.get(name, "")
        for device in ("CPU", "CUDA"):
            has = torch._C._dispatch_has_kernel_for_dispatch_key(schema, device)
            assert has == (device.lower() in devices)


def test_no_schema_has_a_default():
    """Before torch calls a kernel that is written in Python, as those of a GPU are, it leaves out
    the last arguments that equal their defaults."""
    ours = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("fastrl::")]
    assert len(ours) > len(_binary.IMPLEMENTATIONS)
    assert not [f"{s.name}: {a.name}" for s in ours for a in s.arguments if a.has_default_value()]


WITHOUT_BINARY = """
import sys
sys.modules["fastrl._C"] = None  # import raises ImportError
import torch, fastrl, fastrl.rewards, fastrl.trainers
assert "torch._dynamo" not in sys.modules  # longer to import than all of fastrl
from fastrl.cli.main import main
x = torch.zeros(1, 3)
assert fastrl.reference.gae(x, x, gamma=0.9, gae_lambda=0.9)[0].shape == (1, 3)
assert main(["info"]) == 0
try:
    fastrl.gae(x, x, gamma=0.9, gae_lambda=0.9)
except ImportError as error:
    print("REFUSED", error)
"""


def test_without_the_binary_the_reference_and_info_work():
    out = subprocess.run(
        [sys.executable, "-c", WITHOUT_BINARY], capture_output=True, text=True, check=True
    )
    assert "fastrl._C              missing" in out.stdout
    assert "REFUSED gae: expected the compiled module fastrl._C, got none" in out.stdout
    assert "pip install --no-build-isolation" in out.stdout


def test_info_lists_every_op(capsys):
    from fastrl.cli.main import main

    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for name in fastrl.ops.__all__:
        assert re.search(
            rf"^  {name} .*fastrl.reference.{name}|^  {name} .*cpu: (.*C\+\+|torch)", out, re.M
        )
    assert torch.__version__ in out


def test_the_command_line_refuses_what_it_does_not_know(capsys):
    from fastrl.cli.main import main

    assert main(["fly"]) == 2
    assert "got fly" in capsys.readouterr().err
    assert main([]) == 2
    assert main(["--help"]) == 0


def test_large_outputs_reuse_the_pages_of_freed_ones_and_no_others():
    rewards = torch.randn(1 << 21)  # 8 MB an output

    def returns(gamma):
        return fastrl.discounted_returns(rewards, gamma=gamma)

    kept, freed = returns(0.5), returns(0.25)
    expected, address = kept.clone(), freed.data_ptr()
    del freed
    again = returns(0.0)
    assert torch.equal(again, rewards) and torch.equal(kept, expected)
    if torch.__version__ >= "2.11":
        assert again.data_ptr() == address != kept.data_ptr()
    del again
    _C.release_memory()
    assert torch.equal(returns(0.5), expected) and torch.equal(kept, expected)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["2.10.0", "2.13.0"])
def test_the_same_binary_loads_under_other_torch_versions(version, tmp_path):
    """A throw-away environment with that torch, and this very file."""
    environment = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    python = environment / "bin" / "python"
    flags = os.environ.get("PIP_FLAGS", "").split()
    install = [python, "-m", "pip", "install", "--quiet", *flags]
    subprocess.run([*install, f"torch=={version}", "numpy", "pytest"], check=True)
    package = tmp_path / "fastrl"
    shutil.copytree(ROOT / "fastrl", package)
    shutil.copy(_C.__file__, package)
    script = (
        "import torch, fastrl; x = torch.randn(2, 9, requires_grad=True);"
        "a, r = fastrl.gae(x, x, gamma=0.9, gae_lambda=0.8); a.sum().backward();"
        "b, _ = fastrl.reference.gae(x, x, gamma=0.9, gae_lambda=0.8);"
        "torch.testing.assert_close(a, b);"
        "ids = torch.tensor([1, 2]); y = fastrl.token_logprobs(x, ids); y.sum().backward();"
        "torch.testing.assert_close(y, fastrl.reference.token_logprobs(x, ids));"
        "w = torch.randn(40, 9, requires_grad=True); z = fastrl.linear_token_logprobs(x, w, ids);"
        "z.sum().backward();"
        "torch.testing.assert_close(z, fastrl.reference.linear_token_logprobs(x, w, ids));"
        "t, p, _ = fastrl.sample_tokens(x.detach(), top_k=3, seeds=ids, return_kept=True);"
        "assert torch.equal(t, fastrl.reference.sample_tokens(x.detach(), top_k=3, seeds=ids)[0]);"
        "q = torch.randn(4, 2, 1, 8); k = torch.randn(4, 1, 5, 8); e = ids.int().repeat(2);"
        "o = dict(key_end=e, prefix_key=k[:2], prefix_value=k[2:]);"
        "r = fastrl.reference.decode_attention(q, k, k, **o);"
        "torch.testing.assert_close(fastrl.decode_attention(q, k, k, **o), r);"
        "print(torch.__version__, fastrl._C.__file__)"
    )
    out = subprocess.run(
        [python, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert out.returncode == 0, out.stderr
    assert out.stdout.startswith(version) and str(tmp_path) in out.stdout
    # Attention asks most of a torch's compiler and checkpoints: its tests stand for the rest.
    files = [ROOT / "tests" / "ops" / f"test_attention{part}.py" for part in ("", "_calls")]
    subprocess.run([python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files], check=True)
