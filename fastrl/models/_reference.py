"""What a policy was before training. Public in storage.py."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastrl.layout import PackedBatch
from fastrl.models.hugging_face import HuggingFacePolicy, evaluating
from fastrl.models.protocol import Decoder, Head, PolicyModel


def reference_policy(policy: Any) -> PolicyModel:
    """The policy as it is now, frozen and in evaluation mode: what training may not stray from.

    With a PEFT adapter it is the model without the adapter, and shares its weights; of another
    policy it is a copy.
    """
    if isinstance(policy, HuggingFacePolicy) and policy.adapter is not None:
        return _WithoutAdapter(policy)
    return copy.deepcopy(policy).requires_grad_(False).eval()


class _WithoutAdapter:
    """A policy with its adapter off for as long as it computes."""

    def __init__(self, policy: HuggingFacePolicy) -> None:
        self._policy = policy
        self.vocab_size, self.hidden_dim = policy.vocab_size, policy.hidden_dim
        self.num_positions = policy.num_positions

    @property
    def config(self) -> dict[str, Any]:
        return self._policy.config

    @property
    def head(self) -> Head:
        head = self._policy.head
        bias = None if head.bias is None else head.bias.detach()
        return Head(head.weight.detach(), bias, head.softcap, head.scale)

    def hidden_states(self, token_ids: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        with self.computing():
            return self._policy.hidden_states(token_ids, state)

    def packed_hidden(self, batch: PackedBatch) -> Tensor:
        with self.computing():
            return self._policy.packed_hidden(batch)

    def decoder(self, max_rows: int, max_new_tokens: int) -> Decoder:
        return _DecoderWithoutAdapter(self, self._policy.decoder(max_rows, max_new_tokens))

    @contextmanager
    def computing(self) -> Iterator[None]:
        adapter: Any = self._policy.adapter
        # PEFT's context makes all weights of the adapter trainable when it ends.
        trained = [(x, x.requires_grad) for x in adapter.parameters()]
        try:
            with torch.no_grad(), evaluating(adapter), adapter.disable_adapter():
                yield
        finally:
            for weight, is_trained in trained:
                weight.requires_grad_(is_trained)


class _DecoderWithoutAdapter:
    def __init__(self, policy: _WithoutAdapter, decoder: Decoder) -> None:
        self._policy, self._decoder = policy, decoder
        self.open, self.keep = decoder.open, decoder.keep

    def read(self, prompts: list[Tensor]) -> Tensor:
        with self._policy.computing():
            return self._decoder.read(prompts)

    def step(self, token_ids: Tensor) -> Tensor:
        with self._policy.computing():
            return self._decoder.step(token_ids)
