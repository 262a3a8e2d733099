"""What rollout.py keeps of the completions that it samples, and when one of them ends."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastrl._transfer import on_device
from fastrl.layout import PackedBatch, pack_groups
from fastrl.ops import _checks

Environment = Callable[[int, list[int], list[int]], "list[int] | None"]

_SPARE_TOKENS = 8  # more than a stop string's length to decode: tokens may have no text


class Stop:
    """Where the policy's turn ends: at an EOS id or a stop string.

    Args: as those of `fastrl.rollout.generate`.
    """

    def __init__(
        self,
        eos_token_id: int | Sequence[int] | None,
        strings: Sequence[str],
        decode: Callable[[list[int]], str] | None,
        vocab_size: int,
    ) -> None:
        given: Any = eos_token_id
        given = given.tolist() if hasattr(given, "tolist") else given
        several = isinstance(given, Sequence) and not isinstance(given, str)
        self._eos = list(given) if several else [] if given is None else [given]
        for token in self._eos:
            _checks.whole("generate", "eos_token_id", token, 0)
            if token >= vocab_size:
                remedy = "Use the tokenizer that the model was built for."
                raise _checks.fail("generate", f"eos_token_id in [0, {vocab_size})", token, remedy)
        self.strings, self._decode = list(strings), decode
        self._window = max(map(len, self.strings), default=0) + _SPARE_TOKENS

    def at_eos(self, token_ids: Tensor) -> Tensor:
        """[R] bool, on the host."""
        if not self._eos:
            return torch.zeros(len(token_ids), dtype=torch.bool, device="cpu")
        ends = token_ids == self._eos[0]
        for other in self._eos[1:]:
            ends |= token_ids == other
        return ends.cpu()

    def at_string(self, turn: list[int]) -> bool:
        """Whether the turn's last token completes a stop string."""
        assert self._decode is not None
        text = self._decode(turn[-self._window :])
        return any(string in text for string in self.strings)


class Completions:
    """The completions of one call of generate, as they grow.

    How long they are, and which of them run, is counted on the host: a GPU is asked once a token
    for what it has drawn, and not at all where nothing that is drawn can end a completion.
    """

    def __init__(
        self,
        prompts: list[Tensor],
        completions_per_prompt: int,
        max_new_tokens: int,
        stop: Stop,
        environment: Environment | None,
        vocab_size: int,
    ) -> None:
        self._device, count = prompts[0].device, len(prompts) * completions_per_prompt
        self.ended = torch.zeros(count, dtype=torch.bool, device="cpu")
        self._prompts, self._per_prompt = prompts, completions_per_prompt
        self._limit, self._stop, self._environment = max_new_tokens, stop, environment
        self._vocab_size = vocab_size
        self._lengths = torch.zeros(count, dtype=torch.int64, device="cpu")
        self._steps: list[tuple[Tensor, ...]] = []  # rows, written; token ids, logprobs, values
        # On the host, for those who look at tokens one by one.
        self._on_host = bool(stop.strings) or environment is not None
        self._ids: list[list[int]] = [[] for _ in range(count if self._on_host else 0)]
        self._turns: list[list[int]] = [[] for _ in self._ids]
        self._answers: dict[int, deque[int]] = {}  # what is still to be read, by completion

    def add(
        self, rows: Tensor, token_ids: Tensor, logprobs: Tensor, values: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Add a token to each of the completions `rows` [R], which are on the host.

        Returns:
            token_ids: [R], those sampled, or what a completion is answered.
            running: [n] int64 on the host, which of the R rows go on; None where all do.
        """
        self._lengths[rows] += 1
        full = self._lengths[rows] >= self._limit
        if self._on_host:
            token_ids, ends, written = self._on_the_host(rows, token_ids, full)
        else:
            ends, written = self._stop.at_eos(token_ids), torch.ones_like(full)
        seen = logprobs if values is None else values.float()
        self._steps.append((rows, written, token_ids, logprobs, seen))
        running = (~(ends | full)).nonzero().squeeze(1)
        if len(running) == len(rows):
            return token_ids, None
        self.ended[rows[ends]] = True
        return token_ids, running

    def _on_the_host(
        self, rows: Tensor, token_ids: Tensor, full: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Answers, stop strings: the tokens, which completions end, which tokens were written."""
        sampled = token_ids.cpu()
        ids, written = sampled.tolist(), [True] * len(rows)
        ended = self._stop.at_eos(sampled).tolist()
        for i, (row, is_full) in enumerate(zip(rows.tolist(), full.tolist(), strict=True)):
            answer = self._answers.get(row)
            if answer:
                ids[i], ended[i], written[i] = answer.popleft(), False, False
                self._ids[row].append(ids[i])
                continue
            self._ids[row].append(ids[i])
            self._turns[row].append(ids[i])
            if self._stop.strings and not ended[i]:
                ended[i] = self._stop.at_string(self._turns[row])
            if ended[i] and not is_full and self._environment is not None:
                prompt = self._prompts[row // self._per_prompt].tolist()
                answered = self._environment(row, prompt, list(self._ids[row]))
                if answered is not None:
                    new = checked_answer(answered, row, self._vocab_size)
                    self._answers[row], self._turns[row] = deque(new), []
                    ended[i] = False
        if not all(written):
            (token_ids,) = on_device([torch.tensor(ids, device="cpu")], self._device)
        return (
            token_ids,
            torch.tensor(ended, device="cpu"),
            torch.tensor(written, device="cpu"),
        )

    def packed(self) -> tuple[PackedBatch, Tensor, Tensor]:
        """The batch, and the log-probabilities and values of its targets."""
        columns = zip(*self._steps, strict=True)
        rows, written, token_ids, logprobs, values = (torch.cat(column) for column in columns)
        order = torch.argsort(rows, stable=True)  # by completion; time order stays within each
        written = written[order]
        order, own = on_device([order, order[written]], self._device)
        lengths = self._lengths.tolist()
        segments = self._grouped(token_ids[order].split(lengths))
        if not self._answers:
            batch = pack_groups(self._prompts, segments)
        else:
            batch = pack_written(self._prompts, segments, self._grouped(written.split(lengths)))
        return batch, logprobs[own], values[own]

    def _grouped(self, parts: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """A prompt's together."""
        return [parts[i : i + self._per_prompt] for i in range(0, len(parts), self._per_prompt)]


def pack_written(
    prompts: Sequence[Tensor],
    completions: Sequence[Sequence[Tensor]],
    written: Sequence[Sequence[Tensor]],
) -> PackedBatch:
    """`pack_groups` of completions that the policy did not write alone: targets are the tokens
    where written, on the host, is True."""
    segments: list[Tensor] = []
    masks: list[Tensor] = []
    parents: list[int] = []
    for prompt, group, of_group in zip(prompts, completions, written, strict=True):
        parents += [-1] + [len(segments)] * len(group)
        segments += [prompt, *group]
        masks += [torch.zeros(len(prompt), dtype=torch.bool, device="cpu"), *of_group]
    return PackedBatch.from_segments(segments, parents, masks)


def check_sampling(
    prompts: list[Tensor],
    seeds: Tensor,
    num_completions: int,
    max_new_tokens: int,
    max_rows: int | None,
    stop_strings: Sequence[str],
    decode: Callable[[list[int]], str] | None,
) -> None:
    """The checks of `fastrl.rollout.generate`."""
    if not prompts:
        raise ValueError("generate: expected prompts, got none. Pass at least one.")
    for index, prompt in enumerate(prompts):
        if prompt.dtype != torch.int64:
            raise TypeError(
                f"generate: expected prompts int64, got {prompt.dtype} at {index}. "
                "Convert them with .long()."
            )
        if prompt.dim() != 1 or prompt.numel() == 0:
            raise ValueError(
                "generate: expected prompts [P_g] with P_g >= 1, got "
                f"{tuple(prompt.shape)} at {index}. Start an empty prompt with a BOS token."
            )
    if num_completions < 1:
        raise ValueError(
            "generate: expected completions_per_prompt >= 1, got "
            f"{num_completions // len(prompts)}. Sample one at least."
        )
    if seeds.shape != (num_completions,):
        raise ValueError(
            f"generate: expected seeds [C] = ({num_completions},), one for each completion, got "
            f"{tuple(seeds.shape)}. Make them with completion_seeds."
        )
    for name, number in (("max_new_tokens", max_new_tokens), ("max_rows", max_rows)):
        if number is not None:
            _checks.whole("generate", name, number, 1)
    if isinstance(stop_strings, str) or not all(stop_strings):
        raise ValueError(
            f"generate: expected stop_strings a list of texts that are not empty, got "
            f"{stop_strings!r}. Put a single one into a list."
        )
    if stop_strings and decode is None:
        raise ValueError(
            "generate: expected decode with stop_strings, got None. Pass the tokenizer's decode."
        )


def checked_answer(answer: Any, index: int, vocab_size: int) -> list[int]:
    """What an environment answered completion `index`, as a list of ids.

    Raises:
        TypeError: something else.  ValueError: an id that the model does not have.
    """
    ids = answer.tolist() if hasattr(answer, "tolist") else answer
    is_list = isinstance(ids, Sequence) and not isinstance(ids, str)
    if not is_list or not all(isinstance(x, int) and not isinstance(x, bool) for x in ids):
        raise TypeError(
            f"generate: expected environment to answer completion {index} with a list of ids or "
            f"None, got {answer!r}. Encode what it says."
        )
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        raise ValueError(
            f"generate: expected environment to answer completion {index} with ids in "
            f"[0, {vocab_size}), got {min(ids)} to {max(ids)}. Use the model's tokenizer."
        )
    return list(ids)


def check_lengths(prompts: list[Tensor], max_new_tokens: int, num_positions: int | None) -> None:
    """Raise a ValueError where a completion may come to more tokens than the model can read."""
    if num_positions is None:
        return
    index, longest = max(enumerate(map(len, prompts)), key=lambda pair: pair[1])
    if longest + max_new_tokens > num_positions:
        raise ValueError(
            f"generate: expected prompt and max_new_tokens at most {num_positions} tokens, as many "
            f"as the model has positions for, got {longest} + {max_new_tokens} at {index}. Shorten "
            "the prompt, or lower max_new_tokens."
        )
