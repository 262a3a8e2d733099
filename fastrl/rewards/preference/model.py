"""A preference model: a value of every token, of which a score and dense credit are made."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastrl.layout import PackedBatch
from fastrl.models import ActorCritic, load_model, save_model
from fastrl.ops._checks import fail, wrong_type
from fastrl.rewards.preference.calibration import Calibration
from fastrl.rewards.preference.packing import Item, passes
from fastrl.rewards.preference.texts import Encoder, Ids, same_tokenizer

_OP = "PreferenceModel"
_DOCUMENT, _TOKENIZER = "preference.json", "tokenizer"
_FIELDS = ("calibration", "eos_token_id", "tokenizer", "tokenizer_is_saved")
# Nothing is kept for gradients, but even so not a whole dataset at a time.
TOKENS_AT_ONCE = 1 << 16


class PreferenceModel:
    """Scores completions of T tokens from the values V_0, ..., V_T that a value head gives.

        score = (V_T - V_0) / temperature,      credit of token t = (V_t - V_{t-1}) / temperature

    V_t is read from the hidden state after t tokens of the completion; V_0, the prompt's own,
    which no comparison of its completions can see, is taken off. Credit sums to the score. After
    training, sigmoid of a difference of two scores is the probability that the first is preferred.

    A plain object around the model, in evaluation mode and without gradients while it scores.

    Args:
        model: an ActorCritic, or a language model as `fastrl.models.as_policy` takes it, which one
            is made of, with all values 0. Shared, not copied: do not train it elsewhere.
        tokenizer: for texts and chat messages; see `Encoder`.
        eos_token_id: stands behind the text of a completion; "auto": the tokenizer's, else the
            language model's, if any; None: nothing does. Completions given as ids are unchanged.
    Raises:
        TypeError: another model, or eos_token_id.
    """

    def __init__(
        self, model: Any, tokenizer: Any = None, *, eos_token_id: int | str | None = "auto"
    ) -> None:
        self.model = model if isinstance(model, ActorCritic) else ActorCritic(model)
        self.calibration = Calibration()
        if eos_token_id == "auto":
            eos_token_id = _end_token(tokenizer, self.model.language_model)
        if eos_token_id is not None and not isinstance(eos_token_id, int):
            expected, remedy = 'eos_token_id "auto", a whole number or None', "Leave it out."
            raise wrong_type(_OP, expected, repr(eos_token_id), remedy)
        self.encoder = Encoder(tokenizer, self.trunk.vocab_size, eos_token_id)

    @property
    def tokenizer(self) -> Any:
        return self.encoder.tokenizer

    @property
    def trunk(self) -> Any:
        """The language model whose hidden states the values are read from."""
        return self.model.language_model if self.model.critic is None else self.model.critic

    @property
    def device(self) -> torch.device:
        return self.model.value_head.weight.device

    def packed_values(self, batch: PackedBatch, *, freeze_trunk: bool = False) -> Tensor:
        """[M] raw values: row m is that of the token before target m. With a graph, of the value
        head alone with freeze_trunk."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not freeze_trunk):
            hidden = self.trunk.packed_hidden(batch)
        return self.model.values(hidden)

    def values(
        self,
        prompt_ids: Sequence[Any],
        completion_ids: Sequence[Any],
        *,
        max_tokens: int = TOKENS_AT_ONCE,
    ) -> list[Tensor]:
        """The values V_0, ..., V_T of each completion, over the temperature.

        Args:
            prompt_ids: token ids of each completion's prompt; equal ones are read once.
            completion_ids: T token ids each, T >= 0.
            max_tokens: most tokens in one pass, those of prompts included.
        Returns:
            [T + 1] float64 each, on the CPU, where differences of float32 values are exact.
        Raises:
            ValueError: lengths disagree, or an id is outside the vocabulary.
        """
        check_lengths(_OP, prompt_ids, completion_ids)
        prompts = [self.encoder.prompt(ids, "prompt_ids") for ids in prompt_ids]
        return self._values(
            prompts, [self.encoder.completion(ids) for ids in completion_ids], max_tokens
        )

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        max_tokens: int = TOKENS_AT_ONCE,
    ) -> Tensor:
        """The score of each completion, [C] float64 on the CPU, in nats of log-odds.

        Args:
            prompts, completions: texts, chat messages or token ids, one of each per completion.
            max_tokens: most tokens in one pass, those of prompts included.
        Raises:
            ValueError: lengths disagree, no tokenizer for a text, an id outside the vocabulary.
            TypeError: something else than a text, messages or ids.
        """
        check_lengths(_OP, prompts, completions)
        encoded = [self.encoder.prompt(prompt) for prompt in prompts]
        values = self._values(
            encoded, [self.encoder.completion(completion) for completion in completions], max_tokens
        )
        return torch.tensor([float(x[-1] - x[0]) for x in values], dtype=torch.float64)

    def _values(self, prompts: list[Ids], completions: list[Ids], max_tokens: int) -> list[Tensor]:
        items = [Item(p, (c,)) for p, c in zip(prompts, completions, strict=True)]
        found: list[Tensor] = [torch.empty(0)] * len(items)
        with torch.no_grad(), without_dropout(self.model):
            for part in passes(items, max_tokens, self.device):
                values = self.packed_values(part.batch).double().cpu()
                values = values / self.calibration.temperature
                for index, (start,) in zip(part.items, part.starts, strict=True):
                    found[index] = values[start : start + len(completions[index]) + 1]
        return found

    def save(self, folder: str | Path) -> None:
        """Write the model as `fastrl.models.save_model` does, its calibration and its tokenizer.

        A tokenizer without save_pretrained is not written; `load` asks for it.
        """
        folder = Path(folder)
        save_model(self.model, folder)
        save_tokenizer = getattr(self.tokenizer, "save_pretrained", None)
        if save_tokenizer is not None:
            save_tokenizer(folder / _TOKENIZER)
        name = None if self.tokenizer is None else type(self.tokenizer).__name__
        written = (self.calibration.to_dict(), self.encoder.eos_token_id, name)
        document = dict(zip(_FIELDS, (*written, save_tokenizer is not None), strict=True))
        text = json.dumps(document, indent=2) + "\n"
        (folder / _DOCUMENT).write_text(text, encoding="utf-8")

    @classmethod
    def load(
        cls, folder: str | Path, *, tokenizer: Any = None, device: str | torch.device = "cpu"
    ) -> "PreferenceModel":
        """The model of a folder of `save`.

        Args:
            tokenizer: where the folder has none; one that it has is taken before this.
        Raises:
            ValueError: not such a folder, or cut short; no tokenizer where the model had one.
            ImportError: a tokenizer was saved, and transformers is not installed.
        """
        folder = Path(folder)
        document = _document(folder / _DOCUMENT)
        if document["tokenizer_is_saved"]:
            tokenizer = _saved_tokenizer(folder / _TOKENIZER)
        elif document["tokenizer"] is not None and tokenizer is None:
            expected = f"tokenizer, a {document['tokenizer']}, for {folder}"
            raise fail(_OP, expected, "None", "It has no save_pretrained: pass it again.")
        model = load_model(folder).to(device)
        if not isinstance(model, ActorCritic):
            remedy = "Pass a folder of PreferenceModel.save."
            raise fail(_OP, f"a value head in {folder}", "none", remedy)
        loaded = cls(model, tokenizer, eos_token_id=document["eos_token_id"])
        loaded.calibration = document["calibration"]
        return loaded


def as_preference_model(op: str, model: Any, tokenizer: Any) -> PreferenceModel:
    """A PreferenceModel as it is, or one made of a model; tokenizer may not be another one."""
    if not isinstance(model, PreferenceModel):
        return PreferenceModel(model, tokenizer)
    if tokenizer is not None and not same_tokenizer(model.tokenizer, tokenizer):
        remedy = "Leave tokenizer out, the model has its own."
        raise fail(op, "the model's tokenizer", "another one", remedy)
    return model


def check_lengths(op: str, prompts: Sequence[Any], completions: Sequence[Any]) -> None:
    """Raise a ValueError where there is not one prompt for each completion."""
    if len(prompts) != len(completions):
        got = f"{len(prompts)} and {len(completions)}"
        remedy = "Repeat a prompt for each of its completions."
        raise fail(op, "as many prompts as completions", got, remedy)


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, also while learning; afterwards each module is as it was."""
    before = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in before:
            # cuDNN has a backward pass of recurrent layers in training mode only.
            module.training = isinstance(module, nn.RNNBase) and module.dropout == 0
        yield
    finally:
        for module, training in before:
            module.training = training


def _end_token(tokenizer: Any, language_model: Any) -> int | None:
    for source in (tokenizer, language_model):
        found = getattr(source, "eos_token_id", None)
        if found is not None:
            return found if isinstance(found, int) else found[0]
    return None


def _saved_tokenizer(folder: Path) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ImportError(
            f"{_OP}: expected the package transformers for the tokenizer in {folder}, got none. "
            'Install it: pip install "fastrl[hf]"'
        ) from error
    return AutoTokenizer.from_pretrained(folder)


def _document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        document["calibration"] = Calibration(**document["calibration"])
        return {name: document[name] for name in _FIELDS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        remedy = "Pass a folder of PreferenceModel.save."
        got = f"{type(error).__name__}: {error}"
        raise fail(_OP, f"{path} of a saved preference model", got, remedy) from error
