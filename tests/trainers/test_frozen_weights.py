"""A resumed run has the frozen weights of the run before, to the bit."""

import json

import pytest
import torch
from hf_models import build

from fastrl.models import LSTMLanguageModel
from fastrl.trainers._digest import _WORDS, digest

MASK = 2**64 - 1
ODD, MIX = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9


def digest_by_hand(data):
    """The formula in Python's whole numbers."""
    total = 0
    for i in range(0, len(data), 8):
        word = int.from_bytes(data[i : i + 8].ljust(8, b"\0"), "little")
        word = (word ^ word >> 32) * MIX & MASK
        word ^= word >> 29
        total += word * (2 * (i // 8 + 1) + 1) * ODD
    return total & MASK


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(33),  # an odd number of half words
        torch.randn(5, 7).bfloat16().t(),  # strided, and a rest of bytes
        torch.arange(20, dtype=torch.int8)[3:],  # at an address that is no multiple of 8
        torch.randn(2 * _WORDS + 3, dtype=torch.float64),  # several parts
        torch.zeros(0),
        torch.tensor(1.5),
    ],
    ids=["float32", "strided", "unaligned", "parts", "empty", "scalar"],
)
def test_the_digest_is_the_formula(tensor):
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    assert digest(tensor) == digest_by_hand(data)


def test_a_bit_and_the_order_are_seen():
    weight = torch.randn(64, 32)
    found = {digest(weight), digest(weight.t()), digest(weight.flip(0)), digest(weight[:63])}
    for place in (0, 1, 77, 2047):
        for bit in (0, 22, 31):
            other = weight.clone()
            bits = other.view(torch.int32).view(-1)
            bits[place] ^= -(2**31) if bit == 31 else 2**bit
            found.add(digest(other))
    swapped = weight.clone()
    swapped[[3, 4]] = weight[[4, 3]]
    assert len(found | {digest(swapped)}) == 4 + 12 + 1


def adapted(base):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    return get_peft_model(base, LoraConfig(target_modules=["q_proj"], r=2))


def partly_frozen():
    model = LSTMLanguageModel(8, 4, 6)
    model.embedding.weight.requires_grad_(False)
    return model


@pytest.mark.parametrize("kind", ["adapter", "partly frozen"])
def test_another_base_is_refused_and_nothing_is_changed(make_trainer, tmp_path, kind):
    def make():
        torch.manual_seed(7)
        model = adapted(build("llama")) if kind == "adapter" else partly_frozen()
        return make_trainer(model=model, max_new_tokens=2, max_steps=2)

    first, same, other = make(), make(), make()
    first.train(max_steps=1)
    first.save(tmp_path / "run")
    same.resume(tmp_path / "run")
    name, frozen = next((n, w) for n, w in other.model.named_parameters() if not w.requires_grad)
    with torch.no_grad():
        frozen[0, 0] = torch.nextafter(frozen[0, 0], torch.tensor(9.0))
    before = {key: weight.clone() for key, weight in other.model.state_dict().items()}
    message = rf"resume: expected the frozen weight {name} to be torch\.float32 \(.*digest .*, got "
    with pytest.raises(ValueError, match=message):
        other.resume(tmp_path / "run")
    assert all(torch.equal(w, before[key]) for key, w in other.model.state_dict().items())
    assert other.step == 0


def test_a_checkpoint_from_before_there_were_digests(make_trainer, tmp_path):
    first, second = (make_trainer(model=partly_frozen(), max_steps=2) for _ in range(2))
    first.train(max_steps=1)
    first.save(tmp_path / "run")
    path = tmp_path / "run" / "state.json"
    state = json.loads(path.read_text())
    assert list(state.pop("frozen")) == ["embedding.weight"]
    path.write_text(json.dumps(state))
    description = json.loads((tmp_path / "run" / "trainer.json").read_text())
    description["files"]["state.json"] = path.stat().st_size
    (tmp_path / "run" / "trainer.json").write_text(json.dumps(description))
    assert second.resume(tmp_path / "run").step == 1
