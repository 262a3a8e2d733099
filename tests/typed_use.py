"""What type checkers see: checked by mypy in `make lint`, and never run."""

from typing import TYPE_CHECKING

from torch import Tensor

import fastrl
from fastrl.trainers.prompts import Tokenizer

if TYPE_CHECKING:
    import tokenizers
    import transformers
    from typing_extensions import assert_type


def results(x: Tensor, ids: Tensor, asked: bool) -> None:
    assert_type(fastrl.token_logprobs(x, ids), Tensor)
    assert_type(fastrl.token_logprobs(x, ids, return_entropy=True), tuple[Tensor, Tensor])
    assert_type(fastrl.token_logprobs(x, ids, return_entropy=asked), Tensor | tuple[Tensor, Tensor])
    assert_type(fastrl.linear_token_logprobs(x, x, ids), Tensor)
    assert_type(fastrl.linear_token_logprobs(x, x, ids, return_entropy=True), tuple[Tensor, Tensor])
    assert_type(fastrl.sample_tokens(x), tuple[Tensor, Tensor])
    assert_type(
        fastrl.sample_tokens(x, return_kept=True), tuple[Tensor, Tensor, tuple[Tensor, Tensor]]
    )
    assert_type(fastrl.attention(x, x, x), Tensor)
    assert_type(fastrl.attention(x, x, x, return_lse=True), tuple[Tensor, Tensor])
    assert_type(fastrl.decode_attention(x, x, x), Tensor)
    assert_type(fastrl.decode_attention(x, x, x, return_lse=True), tuple[Tensor, Tensor])
    assert_type(fastrl.reference.token_logprobs(x, ids), Tensor)


def of_others(
    first: "tokenizers.Tokenizer", second: "transformers.PreTrainedTokenizerBase"
) -> list[Tokenizer]:
    return [first, second]
