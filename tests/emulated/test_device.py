"""What is marked gpu, on a GPU that is not there: device.py says what that shows."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
TESTS, TORCH = HERE.parent, Path(torch.__file__).parent
# Ops, and what stands around them: attention in models, whole steps of the trainers.
QUICK = ["ops/test_linear_token_loss.py", "ops/test_token_stats.py", "ops/test_losses.py"]
QUICK += ["models/test_lstm.py", "test_transfer.py", "test_paths.py"]
QUICK += ["hf/test_hf_cuda.py::test_a_shared_prompt[llama]"]
STEPS = "trainers/test_trainers_cuda.py"
QUICK += [f"{STEPS}::test_steps_are_those_of_the_cpu[{name}]" for name in ("grpo", "a2c")]
# Of the others, those whose sizes the interpreter can walk.
OTHERS = [f"ops/test_{name}.py" for name in ("decode_attention", "token_logprobs", "frozen_head")]
OTHERS += [f"ops/test_{name}.py" for name in ("linear_token_logprobs", "kept_logprobs")]
OTHERS += [f"ops/test_{name}.py" for name in ("returns_cuda", "attention", "attention_calls")]
OTHERS += [
    "ops/test_digits_of_heads.py",
    "ops/test_sample_tokens.py::test_the_ends_of_u",
    "trainers/test_checkpoint.py",
]
OTHERS += ["hf/test_hf_cuda.py", STEPS]
TOO_LARGE = ["many_blocks_wait", "every_number_of_sixteen_bits", "too_large_for_the_caches"]
TOO_LARGE += ["many_rows_are_as_each", "blocks_on_every_side", "depend_on_those_beside_it"]


@pytest.fixture(scope="session")
def run(built, compiler, tmp_path_factory):
    """run(*files): how many of their tests pass on the device, in a pytest of its own; all do."""
    if torch.version.cuda is not None:
        pytest.skip("a torch with CUDA has a device of its own")
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("device")
    shutil.copy(built.path, folder / "emulated.so")
    link = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10", "-o", str(folder / "device.so")]
    flags = ["-std=c++20", "-O0", "-fPIC", "-shared", f"-isystem{TORCH / 'include'}"]
    subprocess.run([compiler, *flags, str(HERE / "device.cpp"), *link], check=True)

    def call(*files):
        command = [sys.executable, "-m", "pytest", "-p", "emulated.device", "-m", "gpu", "-q"]
        command += ["-p", "no:cacheprovider", "-k", f"not ({' or '.join(TOO_LARGE)})"]
        command += [str(TESTS / file) for file in files]
        env = {"PYTHONPATH": f"{TESTS.parent}:{TESTS}", "FASTRL_EMULATED": str(folder)}
        # numpy's warnings, of infinities that are made on purpose
        env |= {"PYTHONWARNINGS": "ignore::RuntimeWarning"}
        done = subprocess.run(
            command, cwd=TESTS.parent, env=os.environ | env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        return int(re.findall(r"(\d+) passed", done.stdout)[-1])

    return call


def test_its_rules(run):
    """What a GPU refuses is refused: see device_rules.py."""
    assert run("emulated/device_rules.py") == 7


def test_the_ops_and_what_stands_around_them(run):
    assert run(*QUICK) > 50


@pytest.mark.slow
def test_the_others(run):
    assert run(*OTHERS) > 600
