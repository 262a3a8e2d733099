import pytest
import torch

from fastrl.reference._philox import philox_4x32_10, uniform

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known-answer vectors of Random123
        ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([ONES] * 4, [ONES] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_known_answers(counter, key, expected):
    counter, key = (tuple(torch.tensor([word]) for word in words) for words in (counter, key))
    assert [int(word) for word in philox_4x32_10(counter, key)] == expected


def test_uniform_takes_the_upper_bits_of_the_first_words():
    seed = torch.tensor([0])  # key 0, counter 0: words 6627e8d5 e169c58d
    assert uniform(seed, 0, torch.float32).item() == 0x6627E8 / 2**24
    word = (0x6627E8D5 >> 5 << 26) + (0xE169C58D >> 6)
    assert uniform(seed, 0, torch.float64).item() == word / 2**53


def test_both_words_of_seed_and_step_count():
    seeds = torch.tensor([5, 5 + 2**32, 6, -5])
    draws = {
        (uniform(seeds, step, torch.float32)[i].item()) for i in range(4) for step in (0, 1, 2**32)
    }
    assert len(draws) == 12


def test_uniform_is_uniform():
    u = uniform(torch.arange(100_000), 3, torch.float32)
    assert u.min() >= 0 and u.max() < 1
    counts = torch.histc(u, 10, 0, 1)
    assert (counts - 10_000).abs().max() < 450  # 4.7 standard deviations of 95
