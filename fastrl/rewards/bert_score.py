"""BERTScore: how well the tokens of two texts match by their contextual embeddings."""

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastrl.rewards._references import references_in
from fastrl.rewards._texts import text_of

# The layer that the authors found best for models that are used often.
LAYERS = {
    "bert-base-uncased": 9,
    "bert-large-uncased": 18,
    "bert-base-chinese": 8,
    "bert-base-multilingual-cased": 9,
    "distilbert-base-uncased": 5,
    "roberta-base": 10,
    "roberta-large": 17,
    "xlm-roberta-base": 9,
    "microsoft/deberta-xlarge-mnli": 40,
}
_MEASURES = ("precision", "recall", "f1")


class BERTScore:
    """BERTScore of each completion with its reference.

        P = Σ_i w_i max_j x_i · y_j / Σ_i w_i,   R = Σ_j w_j max_i x_i · y_j / Σ_j w_j
        F1 = 2 P R / (P + R),                    reward = (score − rescale) / (1 − rescale)

    x_i and y_j are the normalised embeddings of the completion's and the reference's tokens in
    one layer. w is 1, or with idf log((M + 1) / (m + 1)) where m of M references have the token;
    0 for the tokens that the model puts at the ends, which may still be matched. An empty text
    scores 0 before rescaling. Of several references the best one counts. Texts longer than the
    model reads are cut.

    Computed here with transformers, as the package bert_score 0.3.13 fails with transformers 5 on
    empty texts and on tokenizers without a greatest length.

    Args:
        model: a folder with weights and tokenizer, or a name in the Hugging Face cache.
        num_layers: whose outputs are compared, 0 the embeddings; None: for names in LAYERS.
        idf: whether tokens are weighted, by the references of each call; or the texts to count.
        measure: "precision", "recall" or "f1".
        rescale: the score of texts that have nothing to do with each other, which becomes 0;
            None: none.
        device: of the model.
        batch_size: texts at a time.
        reference: the dataset's column with a text or a list of texts; None in it: no reward.
        local_files_only: False: weights that are missing may be downloaded.
        name: what metrics call it.
    Raises:
        ValueError: an argument cannot be used; in a call: the column is missing, or references are
            not texts.
        TypeError: in a call: completions are not texts.
        FileNotFoundError: the weights or the tokenizer are not there.
        ImportError: transformers is not installed.
    Reference: Zhang et al. 2020, arXiv:1904.09675.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        num_layers: int | None = None,
        idf: bool | Sequence[str] = False,
        measure: str = "f1",
        rescale: float | None = None,
        device: str = "cpu",
        batch_size: int = 64,
        reference: str = "reference",
        local_files_only: bool = True,
        name: str = "bertscore",
    ) -> None:
        _check(measure, rescale, batch_size)
        num_layers = LAYERS.get(str(model)) if num_layers is None else num_layers
        if num_layers is None or num_layers < 0:
            raise ValueError(
                f"BERTScore: expected num_layers >= 0 for the model {model}, got {num_layers}. "
                "Pass the layer to compare."
            )
        self.__name__ = name
        self.measure, self.rescale, self.reference = measure, rescale or 0.0, reference
        self.batch_size, self.device = batch_size, device
        self._tokenizer, self._model = _load(str(model), local_files_only)
        depth = self._model.config.num_hidden_layers
        if num_layers > depth:
            raise ValueError(
                f"BERTScore: expected num_layers <= {depth}, which {model} has, got {num_layers}. "
                "Pass the layer to compare."
            )
        self._layer = num_layers
        self._model.to(device).eval()
        self._limit = _max_tokens(self._tokenizer, self._model)
        self._uses_idf = idf is not False
        self._weights = None if isinstance(idf, bool) else self._idf(list(idf))

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """A reward for each completion, None where there is no reference."""
        texts = [text_of(completion) for completion in completions]
        given_texts = references_in(columns, self.reference, "BERTScore")
        references = [given or () for given in given_texts]
        flat = [text for given in references for text in given]
        weights = self._weights
        if self._uses_idf and weights is None:
            weights = self._idf(flat)
        ids, embeddings = self._embed([*texts, *flat])
        rewards: list[float | None] = []
        for text, given in zip(texts, references, strict=True):
            scores = [self._score(ids, embeddings, text, one, weights) for one in given]
            best = max(scores, default=None)
            rewards.append(None if best is None else (best - self.rescale) / (1.0 - self.rescale))
        return rewards

    def _score(
        self,
        ids: Mapping[str, list[int]],
        embeddings: Mapping[str, Tensor],
        text: str,
        reference: str,
        weights: Mapping[int, float] | None,
    ) -> float:
        sides = [self._token_weights(ids[one], weights) for one in (text, reference)]
        if min(side.sum() for side in sides) <= 0:  # no tokens, or none that counts
            return 0.0
        similarity = embeddings[text] @ embeddings[reference].T  # [tokens, reference's tokens]
        best = similarity.amax(1).cpu().double(), similarity.amax(0).cpu().double()
        precision, recall = (
            float((b * w).sum() / w.sum()) for b, w in zip(best, sides, strict=True)
        )
        both = precision + recall
        f1 = 2 * precision * recall / both if both else 0.0
        return (precision, recall, f1)[_MEASURES.index(self.measure)]

    def _token_weights(self, ids: list[int], weights: Mapping[int, float] | None) -> Tensor:
        ends = {self._tokenizer.cls_token_id, self._tokenizer.sep_token_id}
        if not set(ids) - ends:  # an empty text
            return torch.zeros(len(ids), dtype=torch.float64)
        if weights is None:
            given = [float(i not in ends) for i in ids]
        else:
            given = [weights.get(i, weights[-1]) for i in ids]
        return torch.tensor(given, dtype=torch.float64)

    def _idf(self, texts: list[str]) -> dict[int, float]:
        """By token id the weight; under -1 that of a token that no text has."""
        counts = Counter(i for text in texts for i in set(self._ids(text)))
        total = len(texts) + 1
        return {-1: math.log(total)} | {i: math.log(total / (c + 1)) for i, c in counts.items()}

    def _ids(self, text: str) -> list[int]:
        # These tell a word at the start of a text from one after a space.
        is_spaced = any(kind in type(self._tokenizer).__name__ for kind in ("GPT2", "Roberta"))
        text = text.strip()
        text = " " + text if is_spaced and text else text
        cut = {} if self._limit is None else {"truncation": True, "max_length": self._limit}
        return self._tokenizer(text, **cut)["input_ids"]

    def _embed(self, texts: list[str]) -> tuple[dict[str, list[int]], dict[str, Tensor]]:
        """By text, its ids and its normalised embeddings, [tokens, D]."""
        ids = {text: self._ids(text) for text in texts}
        embeddings: dict[str, Tensor] = {}
        order = sorted((text for text in ids if ids[text]), key=lambda text: len(ids[text]))
        padding = self._tokenizer.pad_token_id or 0
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            rows = [torch.tensor(ids[text]) for text in batch]
            lengths = torch.tensor([len(row) for row in rows])
            padded = torch.nn.utils.rnn.pad_sequence(rows, True, padding).to(self.device)
            mask = torch.arange(padded.shape[1]) < lengths[:, None]
            with torch.no_grad():
                states = self._model(
                    padded, attention_mask=mask.long().to(self.device), output_hidden_states=True
                ).hidden_states[self._layer]
            states = torch.nn.functional.normalize(states.float(), dim=-1)
            for text, row, length in zip(batch, states, lengths.tolist(), strict=True):
                embeddings[text] = row[:length]
        return ids, embeddings


def _load(model: str, local_files_only: bool) -> tuple[Any, Any]:
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise ImportError(
            "BERTScore: expected the package transformers, got none. Install it: "
            'pip install "fastrl[hf]"'
        ) from error
    options = {"local_files_only": local_files_only}
    try:
        with torch.random.fork_rng(devices=[]):  # heads that have no weights would draw some
            tokenizer = AutoTokenizer.from_pretrained(model, **options)
            return tokenizer, AutoModel.from_pretrained(model, **options)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"BERTScore: expected weights and tokenizer of {model} in a folder of that name or in "
            f"the Hugging Face cache, got: {str(error).splitlines()[0]} Download them first, or "
            "pass local_files_only = False to have that done."
        ) from error


def _max_tokens(tokenizer: Any, model: Any) -> int | None:
    """The longest input; tokenizers without a limit name an absurd one."""
    positions = getattr(model.config, "max_position_embeddings", None)
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    offset = getattr(table, "padding_idx", None)  # RoBERTa counts positions from behind it
    if positions is not None and offset is not None:
        positions -= offset + 1
    limits = [limit for limit in (positions, tokenizer.model_max_length) if limit is not None]
    limit = min(limits)
    return limit if 0 < limit < 10**9 else None


def _check(measure: str, rescale: float | None, batch_size: int) -> None:
    if measure not in _MEASURES:
        raise ValueError(
            f"BERTScore: expected measure of {_MEASURES}, got {measure!r}. Pass one of them."
        )
    if rescale is not None and not -math.inf < rescale < 1:
        raise ValueError(
            f"BERTScore: expected rescale below 1, got {rescale!r}. Pass the score of texts that "
            "have nothing to do with each other."
        )
    if batch_size < 1:
        raise ValueError(
            f"BERTScore: expected batch_size >= 1, got {batch_size!r}. Pass 1 or more."
        )
