"""A bonus for what a network cannot yet predict: random network distillation on token contexts."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastrl.rewards._annealing import annealed, check_coefficient
from fastrl.rewards._arguments import check_whole
from fastrl.rewards._moments import Moments

Features = Callable[[Sequence[int]], Tensor]
Weights = list[Tensor]  # a matrix and a bias for each layer


class PredictionError:
    """The error with which a trained network predicts a random one, for each token's context.

        bonus_t = c · e_t / σ,   e_t = mean over outputs of (g(x_t) − f(x_t))²

    f is a network with random weights that stay as they are, g one of the same inputs and outputs
    that is trained, after each call, to predict f on what that call showed. Where something like
    x_t was seen often, the error is small; it decays with what has become familiar. x_t is made of
    random embeddings of the last n token ids up to t (zeros before the completion), or is given
    by `features`. σ is the standard deviation of all errors so far, those of the call included,
    about their mean; while they do not differ, the bonus is 0. c = scale · max(0, 1 −
    global_step / anneal_steps).

    g is trained with Adam, `passes` times over the call's tokens in batches of about
    `batch_size`, the same number of tokens in each within one. All random numbers come from
    `seed`, none from torch's generator. Everything is on the CPU, in float32.

    The bonus is never negative, so longer completions get more of it.

    Args:
        vocab_size: number of token ids; None with `features`.
        features: instead of embeddings, a function of a completion's ids that gives their x,
            [T, feature_size]; of about unit variance, and the same for the same ids.
        feature_size: of what `features` gives.
        n: tokens of a context.
        dim: size of an embedding.
        hidden: width of the networks.
        outputs: numbers that are predicted.
        learning_rate: Adam's.
        passes: of training in each call; 0: the bonus stays as it is.
        batch_size: tokens in a step of training.
        scale: the bonus of an error as large as σ.
        anneal_steps: steps after which there is no bonus, which falls evenly until then; None:
            it is never annealed.
        immediate: one float per token; False: their sum.
        seed: of the weights and embeddings; a state can only be loaded into the same ones.
        name: what metrics call it; "{name}/error" (the mean) and "{name}/coefficient" are logged.
    Raises:
        ValueError: an argument cannot be used; in a call: an id is outside the vocabulary, or
            features are of another shape; a state is of other networks.
    Reference: Burda et al. 2018, "Exploration by random network distillation", arXiv:1810.12894.
    """

    def __init__(
        self,
        vocab_size: int | None = None,
        *,
        features: Features | None = None,
        feature_size: int | None = None,
        n: int = 3,
        dim: int = 32,
        hidden: int = 128,
        outputs: int = 32,
        learning_rate: float = 1e-3,
        passes: int = 1,
        batch_size: int = 1024,
        scale: float = 1.0,
        anneal_steps: int | None = None,
        immediate: bool = True,
        seed: int = 0,
        name: str = "prediction_error",
    ) -> None:
        check_coefficient("PredictionError", scale, anneal_steps)
        _check_input(vocab_size, features, feature_size)
        sizes = {"n": n, "dim": dim, "hidden": hidden, "outputs": outputs, "batch_size": batch_size}
        _check_sizes({**sizes, "passes": passes}, learning_rate)
        self.__name__ = name
        self.vocab_size, self.features, self.n = vocab_size, features, n
        self.passes, self.batch_size, self.seed = passes, batch_size, seed
        self.scale, self.anneal_steps, self.immediate = scale, anneal_steps, immediate
        self.input_size = feature_size if feature_size is not None else n * dim
        generator = torch.Generator().manual_seed(seed)
        if vocab_size is not None:
            # The last row stands for what is before the completion.
            self._embeddings = torch.randn(vocab_size + 1, dim, generator=generator)
            self._embeddings[-1] = 0.0
        self._target = _weights([self.input_size, hidden, outputs], generator)
        self._predictor = _weights([self.input_size, hidden, hidden, outputs], generator)
        for weight in self._predictor:
            weight.requires_grad_(True)
        self._optimizer = torch.optim.Adam(self._predictor, lr=learning_rate, foreach=False)
        self._errors = Moments()

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        *,
        trainer_state: Any = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[Any]:
        """The bonus of each completion; then the predictor is trained on all of them."""
        scale = annealed("PredictionError", self.scale, self.anneal_steps, trainer_state)
        rows = [[int(i) for i in ids] for ids in completion_ids]
        # Whoever calls may have switched gradients off.
        with torch.inference_mode(False), torch.enable_grad():
            inputs = torch.cat([self._inputs(row) for row in rows] or [self._inputs([])])
            with torch.no_grad():
                targets = _forward(self._target, inputs)
                errors = (_forward(self._predictor, inputs) - targets).square().mean(1)
            self._train(inputs, targets)
        numbers = errors.tolist()
        self._errors.merge(numbers, numbers)
        deviation = self._errors.deviation(sample=False)
        factor = scale / deviation if deviation > 0 else 0.0
        bonuses = (errors.double() * factor).split([len(row) for row in rows])
        if log_metric is not None and len(errors):
            log_metric(f"{self.__name__}/error", float(errors.double().mean()))
            log_metric(f"{self.__name__}/coefficient", scale)
        lists = [bonus.tolist() for bonus in bonuses]
        return lists if self.immediate else [math.fsum(bonus) for bonus in lists]

    def state_dict(self) -> dict[str, Any]:
        """The predictor, its optimizer, and the moments of the errors; copies."""
        moments = [self._optimizer.state.get(weight, {}) for weight in self._predictor]
        return {
            "fingerprint": float(sum(weight.double().sum() for weight in self._target)),
            "predictor": [weight.detach().clone() for weight in self._predictor],
            "optimizer": [{key: value.clone() for key, value in m.items()} for m in moments],
            "errors": self._errors.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`; nothing is changed where it is of other networks.

        Raises:
            ValueError: it is.
        """
        shapes = [weight.shape for weight in self._predictor]
        given = [weight.shape for weight in state["predictor"]]
        fingerprint = float(sum(weight.double().sum() for weight in self._target))
        # The sum of the same numbers may round otherwise on another machine.
        is_same = math.isclose(fingerprint, state["fingerprint"], rel_tol=1e-9, abs_tol=1e-9)
        if shapes != given or not is_same:
            raise ValueError(
                "PredictionError: expected the state of the same networks, got one of other sizes "
                f"or another seed than {self.seed}. Make it with the arguments it had."
            )
        with torch.no_grad():
            for weight, value in zip(self._predictor, state["predictor"], strict=True):
                weight.copy_(value)
        self._optimizer.state.clear()
        for weight, moments in zip(self._predictor, state["optimizer"], strict=True):
            if moments:
                copies = {key: value.clone() for key, value in moments.items()}
                self._optimizer.state[weight] = copies
        self._errors.load_state_dict(state["errors"])

    def _inputs(self, ids: list[int]) -> Tensor:
        """x of each id, [T, input_size]."""
        if self.features is not None:
            if not ids:
                return torch.empty(0, self.input_size)
            given = self.features(ids).detach().to("cpu", torch.float32)
            if given.shape != (len(ids), self.input_size):
                raise ValueError(
                    f"PredictionError: expected features [T, feature_size] = ({len(ids)}, "
                    f"{self.input_size}), got {tuple(given.shape)}. Give one row for each id."
                )
            return given.clone()
        assert self.vocab_size is not None
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise ValueError(
                f"PredictionError: expected token ids in [0, {self.vocab_size}), got "
                f"{min(ids)} to {max(ids)}. Pass the vocab_size of the tokenizer."
            )
        padded = torch.tensor([self.vocab_size] * (self.n - 1) + ids, dtype=torch.int64)
        contexts = padded.unfold(0, self.n, 1) if ids else padded.new_empty(0, self.n)
        return self._embeddings[contexts].flatten(1)  # [T, n · dim]

    def _train(self, inputs: Tensor, targets: Tensor) -> None:
        """Adam on the mean squared error; batch i has tokens i, i + k, i + 2k and so on."""
        num_batches = math.ceil(len(inputs) / self.batch_size)
        for _ in range(self.passes):
            for first in range(num_batches):
                part = slice(first, None, num_batches)
                self._optimizer.zero_grad(set_to_none=True)
                guess = _forward(self._predictor, inputs[part])
                (guess - targets[part]).square().mean().backward()
                self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


def _weights(sizes: Sequence[int], generator: torch.Generator) -> Weights:
    """Matrices with variance 2 / inputs, which keeps that of what passes ReLUs, and zero biases."""
    weights: Weights = []
    for inputs, outputs in zip(sizes, sizes[1:], strict=False):
        weights.append(torch.randn(inputs, outputs, generator=generator) * math.sqrt(2 / inputs))
        weights.append(torch.zeros(outputs))
    return weights


def _forward(weights: Weights, x: Tensor) -> Tensor:
    """Linear layers with ReLUs between them, [N, inputs] -> [N, outputs]."""
    for i in range(0, len(weights), 2):
        x = torch.addmm(weights[i + 1], x.relu() if i else x, weights[i])
    return x


def _check_input(
    vocab_size: int | None, features: Features | None, feature_size: int | None
) -> None:
    has_features = features is not None and feature_size is not None and feature_size >= 1
    has_vocabulary = vocab_size is not None and vocab_size >= 1
    none_of_features = features is None and feature_size is None
    if not (has_features and vocab_size is None or has_vocabulary and none_of_features):
        raise ValueError(
            "PredictionError: expected either vocab_size, or features and feature_size, got "
            f"vocab_size {vocab_size!r}, features {features!r}, feature_size {feature_size!r}. "
            "Pass the number of token ids to use embeddings."
        )


def _check_sizes(sizes: Mapping[str, int], learning_rate: float) -> None:
    for name, value in sizes.items():
        check_whole("PredictionError", name, value, 0 if name == "passes" else 1)
    if not 0 < learning_rate < math.inf:
        raise ValueError(
            f"PredictionError: expected learning_rate above 0, got {learning_rate!r}. Pass 0 "
            "passes to train nothing."
        )
