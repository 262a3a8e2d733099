"""Datasets: the forms that are understood, and errors that name the entry."""

import pytest
import torch

from fastrl.trainers.prompts import PromptDataset, PromptOrder


class Encoding:
    def __init__(self, ids):
        self.ids = ids


class LikeTokenizers:
    """encode gives an object with .ids, as in huggingface tokenizers."""

    def encode(self, text):
        return Encoding([ord(c) - ord("a") for c in text])

    def decode(self, ids):
        return "".join(chr(i + ord("a")) for i in ids)


class LikeTransformers(LikeTokenizers):
    """encode gives the list itself."""

    def encode(self, text):
        return super().encode(text).ids


@pytest.mark.parametrize("tokenizer", [LikeTokenizers(), LikeTransformers()])
def test_text_is_encoded(tokenizer):
    dataset = PromptDataset(["cab", {"prompt": "b", "answer": 1}], 3, tokenizer)
    assert len(dataset) == 2
    assert dataset[0].prompt == "cab" and dataset[0].token_ids.tolist() == [2, 0, 1]
    assert dataset[1].prompt == "b" and dataset[1].columns == {"answer": 1}
    assert dataset.decode([0, 2, 1], eos_token_id=1) == "ac"
    assert dataset.decode([0, 2], eos_token_id=1) == "ac"
    assert dataset.decode([0, 1, 2], eos_token_id=None) == "abc"


@pytest.mark.parametrize(
    "dataset",
    [
        [torch.tensor([1, 2]), torch.tensor([0])],
        [[1, 2], [0]],
        [{"prompt": torch.tensor([1, 2])}, {"prompt": [0]}],
        torch.tensor([[1, 2], [0, 0]]),
    ],
)
def test_ids_are_taken_as_they_are(dataset):
    example = PromptDataset(dataset, 3)[0]
    assert example.token_ids.tolist() == example.prompt == [1, 2]
    assert example.token_ids.dtype == torch.int64


def test_a_table_of_rows_works_like_a_list():
    class Table:
        """As datasets.Dataset has it: rows by int, made when they are asked for."""

        def __len__(self):
            return 2

        def __getitem__(self, index):
            return {"prompt": "ab"[index], "row": index}

    dataset = PromptDataset(Table(), 3, LikeTokenizers())
    assert dataset[1].prompt == "b" and dataset[1].columns == {"row": 1}


@pytest.mark.parametrize(
    "entry, error, message",
    [
        ("", ValueError, r"P >= 1 in dataset\[0\], got \(0,\).*BOS"),
        ([], ValueError, r"P >= 1 in dataset\[0\], got \(0,\)"),
        (torch.tensor([[1]]), ValueError, r"got \(1, 1\)"),
        (torch.tensor([1.0]), TypeError, "an int64 tensor or a list of ids, got torch.float32"),
        (3.5, TypeError, "got float"),
        ([{"role": "user", "content": "hi"}], TypeError, "got list"),
        ([1, 3], ValueError, r"ids in \[0, 3\) in dataset\[0\], got ids from 1 to 3"),
        ([-1], ValueError, "got ids from -1 to -1"),
        ({"text": "a"}, ValueError, r"""to have "prompt", got columns \['text'\]"""),
    ],
)
def test_bad_entries_are_errors(entry, error, message):
    with pytest.raises(error, match=message):
        PromptDataset([entry], 3, LikeTokenizers())[0]


def test_text_without_a_tokenizer_is_an_error():
    with pytest.raises(ValueError, match=r"expected tokenizer for the text in dataset\[0\]"):
        PromptDataset(["a"], 3)[0]


def test_empty_and_endless_datasets_are_errors():
    with pytest.raises(ValueError, match="expected dataset with at least one prompt, got none"):
        PromptDataset([], 3)
    with pytest.raises(TypeError, match=r"with len\(\) and whole-number indices, got generator"):
        PromptDataset((x for x in [[1]]), 3)


def test_order_is_a_function_of_seed_and_epoch():
    order = PromptOrder(50, 0)
    forward = [order(position) for position in range(100)]
    assert sorted(forward[:50]) == sorted(forward[50:]) == list(range(50))
    assert forward[:50] != forward[50:]
    again = PromptOrder(50, 0)
    assert [again(position) for position in (99, 0, 60)] == [forward[i] for i in (99, 0, 60)]
    assert [PromptOrder(50, 1)(position) for position in range(50)] != forward[:50]
