"""What goes wrong while a checkpoint is written, and what its files can hold."""

import errno
import os
import random
import resource
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from replaced_os import replace

from fastrl.models import tensor_file
from fastrl.trainers import _random_state, _tree, checkpoint


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def memory_of(trainer):
    """All that a checkpoint is made of."""
    weights = [p.detach().clone() for p in trainer.model.parameters()]
    moments = [t.clone() for t in checkpoint.optimizer_tensors(trainer).values()]
    generators = random.getstate(), str(np.random.get_state()), torch.get_rng_state()
    return [trainer.step, str(trainer.state_dict()), *weights, *moments, *generators]


def assert_same(one, other):
    for x, y in zip(one, other, strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


@contextmanager
def limited_files(size):
    """No file may grow beyond this many bytes: the kernel's own EFBIG (Python ignores SIGXFSZ)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_full_leaves_the_last_checkpoint(make_trainer, tmp_path):
    trainer = make_trainer()
    with limited_files(4096), pytest.raises(checkpoint.CheckpointError) as caught:
        trainer.save(tmp_path / "run")
    assert caught.value.errno == errno.EFBIG and "There is no earlier" in str(caught.value)
    assert not list(tmp_path.iterdir())

    trainer.train(max_steps=1)
    trainer.save(tmp_path / "run")
    good = contents(tmp_path / "run")
    trainer.train(max_steps=2)
    sizes = sorted(len(data) for data in good.values())
    for size in (0, *sizes[:-1], sizes[-1] - 1):  # another file is the first that fails
        before = memory_of(trainer)
        with limited_files(size), pytest.raises(OSError) as caught:
            trainer.save(tmp_path / "run")
        assert str(caught.value) == (
            f"save: expected room for {expected_mib(trainer):.1f} MiB in {tmp_path}, got File too "
            f"large. The last checkpoint, of step 1, stands: {tmp_path / 'run'}. Make room, "
            "and save again."
        )
        assert contents(tmp_path / "run") == good
        assert [path.name for path in tmp_path.iterdir()] == ["run"]
        assert_same(memory_of(trainer), before)
    trainer.save(tmp_path / "run")
    assert make_trainer().resume(tmp_path / "run").step == 2


def expected_mib(trainer):
    """Weights, their copy as reference, and two moments: four bytes each; the rest is small."""
    return 4 * 4 * sum(p.numel() for p in trainer.model.parameters()) / 2**20


@pytest.mark.parametrize("before", ["step 1", "none"])
@pytest.mark.parametrize("name", ["fsync", "rename", "mkdir"])
def test_an_operation_that_fails_leaves_what_was_before(
    make_trainer, tmp_path, monkeypatch, name, before
):
    """Each call of it in turn, with the error of a full disk."""
    trainer = make_trainer()
    trainer.train(max_steps=1)
    stands = "There is no earlier checkpoint"
    if before == "step 1":
        trainer.save(tmp_path / "run")
        stands = "The last checkpoint, of step 1"
    names = [path.name for path in tmp_path.iterdir()]
    good = [contents(tmp_path / name) for name in names]
    trainer.train(max_steps=2)
    works, calls, number = getattr(os, name), 0, 0

    def fails(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return works(*arguments, **options)

    replace(os, name, fails, monkeypatch.setattr)
    while True:
        calls, number = 0, number + 1
        try:
            trainer.save(tmp_path / "run")
        except checkpoint.CheckpointError as error:
            assert f"got No space left on device. {stands}" in str(error)
            assert [path.name for path in tmp_path.iterdir()] == names
            assert [contents(tmp_path / name) for name in names] == good
        else:
            break
    assert number - 1 == {"fsync": 9, "rename": 1 + len(names), "mkdir": 1}[name]
    assert make_trainer().resume(tmp_path / "run").step == 2


def test_a_folder_without_permission(make_trainer):
    trainer = make_trainer()
    with tempfile.TemporaryDirectory() as name:  # pytest's are closed to the other user below
        folder = Path(name)
        folder.chmod(0o755)
        trainer.save(folder / "run")
        folder.chmod(0o555)
        is_root = os.geteuid() == 0
        try:
            if is_root:  # whom permissions do not bind
                os.seteuid(65534)
            with pytest.raises(checkpoint.CheckpointError) as caught:
                trainer.save(folder / "run")
        finally:
            if is_root:
                os.seteuid(0)
            folder.chmod(0o755)
        expected = (
            f"save: expected permission to write in {folder}, got Permission denied. The last"
        )
        assert str(caught.value).startswith(expected) and caught.value.errno == errno.EACCES
        assert [path.name for path in folder.iterdir()] == ["run"]


def test_a_state_that_cannot_be_written_is_named(make_trainer, tmp_path):
    class Odd:
        __name__ = "odd"
        seen = set()

        def __call__(self, completion_ids, **_):
            return [1.0] * len(completion_ids)

        def state_dict(self):
            return {"seen": self.seen}

        def load_state_dict(self, state):
            self.seen = state["seen"]

    trainer = make_trainer(reward_functions=Odd())
    with pytest.raises(TypeError, match="expected the state /trainer/scorer/odd/seen .*got set"):
        trainer.save(tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_trees_come_back_as_they_were(tmp_path):
    tree = {
        "numbers": [0, -1, 2**200, 1.5, -0.0, 1e-310, 0.1, float("inf"), -float("inf")],
        "others": [None, True, False, "", "ü\n", np.float32(0.1), np.int64(3), (1, (2,)), {}, []],
        "nested": [{"a/b": torch.ones(2), "a~b": [torch.zeros(0, 3)]}, [[torch.tensor(1.5)]]],
        "$tensor": {"$float": "nan", "$$": 1, "": torch.arange(3)},
    }
    document, tensors = _tree.flatten(tree)
    tensor_file.write_tensors(tmp_path / "x", tensors)
    back = _tree.unflatten(document, tensor_file.TensorFile(tmp_path / "x").read)
    expected = {
        **tree,
        "others": [*tree["others"][:5], float(np.float32(0.1)), 3, [1, [2]], {}, []],
    }
    assert str(back) == str(expected)  # -0.0 and the empty shape are seen in it
    nan = _tree.unflatten(_tree.flatten({"x": float("nan")})[0], tensors.__getitem__)
    assert np.isnan(nan["x"])
    for wrong in ({1: 2}, {"a": [{"b": b"bytes"}]}):
        with pytest.raises(TypeError, match="expected (keys of )?the state"):
            _tree.flatten(wrong)


def test_tensor_files_are_those_of_the_library(tmp_path):
    base = torch.randn(6, 4)
    tensors = {
        "transposed": base.T, "part": base[1:3, ::2], "shared": base, "empty": torch.zeros(0, 2),
        "scalar": torch.tensor(2.5, dtype=torch.float64), "odd": torch.arange(3).to(torch.uint8),
        "half": base.bfloat16(), "f16": base.half(), "mask": base > 0, "ids": torch.arange(5),
        "int": torch.arange(5).int(), "eighth": base.to(torch.float8_e4m3fn),
    }  # fmt: skip
    path = tmp_path / "x.safetensors"
    tensor_file.write_tensors(path, tensors)
    library = safetensors.torch.load_file(path)
    ours = tensor_file.TensorFile(path)
    assert library.keys() == ours.names == tensors.keys()
    for name, tensor in tensors.items():
        for got in (library[name], ours.read(name)):
            assert got.dtype == tensor.dtype and got.shape == tensor.shape
            assert torch.equal(got.double(), tensor.double())
        assert ours.kinds()[name] == f"{tensor.dtype} {tuple(tensor.shape)}"
    written = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    safetensors.torch.save_file(written, tmp_path / "y", metadata={"format": "pt"})
    assert path.stat().st_size == (tmp_path / "y").stat().st_size
    with pytest.raises(TypeError, match="expected z of a dtype that safetensors has"):
        tensor_file.write_tensors(path, {"z": torch.zeros(1, dtype=torch.complex64)})
    safetensors.torch.save_file({"z": torch.zeros(1, dtype=torch.complex64)}, path)
    assert tensor_file.TensorFile(path).kinds() == {"z": "C64 (1,)"}  # named, whoever wrote it


@pytest.mark.parametrize("kind", ["MT19937", "PCG64", "Philox"])
def test_generators_come_back(kind):
    before = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(getattr(np.random, kind)(3))
        random.gauss(0, 1), np.random.randn()  # each has drawn one of a pair
        document, tensors = _tree.flatten(_random_state.random_state())

        def draws():
            ours = [random.gauss(0, 1), random.random(), np.random.randn(), np.random.rand()]
            return ours + torch.rand(3).tolist()

        expected = draws()
        state = _tree.unflatten(document, lambda name: tensors[name].clone())
        _random_state.check_random_state(state)
        assert draws() != expected
        _random_state.set_random_state(state)
        assert draws() == expected
    finally:
        np.random.set_bit_generator(before)
