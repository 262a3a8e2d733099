"""Whole steps of TRL's GRPO trainer, as it comes and inside `fastrl.compat.patch_trl`.

    python -m bench.trl_step        # 2 layers, hidden 256, V 65536, 4 x 4 x 64 tokens
    python -m bench.trl_step --vocab 151936 --steps 10 --rounds 3

Both train the same random model on the same prompts with the same seed. The runs take turns, and
every batch is used for two steps, so that half of them are an update alone, without sampling.
"""

import argparse
import logging
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.environment import cpu_name
from bench.peers import version_of

_WARM_UP = 2  # steps: first calls, and memory that the system has to find


@dataclass
class Run:
    """What the runs of one contestant gave.

    sampling, update: seconds of the steps that sample a batch, and of those that only learn.
    logged: what TRL logged in the steps of one run; every run of a contestant logs the same.
    calls: how often our function was called in one run.
    """

    sampling: list[float] = field(default_factory=list)
    update: list[float] = field(default_factory=list)
    logged: list[dict[str, float]] = field(default_factory=list)
    calls: int = 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.trl_step", description=__doc__.split("\n")[0])
    p.add_argument("--vocab", type=int, default=65536)
    p.add_argument("--hidden", type=int, default=256)
    p.add_argument("--layers", type=int, default=2)
    p.add_argument("--prompts", type=int, default=4, help="a step")
    p.add_argument("--completions", type=int, default=4, help="of each prompt")
    p.add_argument("--prompt-tokens", type=int, default=64)
    p.add_argument("--tokens", type=int, default=64, help="of a completion")
    p.add_argument("--steps", type=int, default=8, help=f"of a run; {_WARM_UP} of them warm up")
    p.add_argument("--rounds", type=int, default=2, help="runs of each")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    return p


def main(argv: list[str] | None = None) -> None:
    options = parser().parse_args(argv)
    if options.steps < _WARM_UP + 2:
        raise SystemExit(
            f"trl_step: expected steps >= {_WARM_UP + 2}, got {options.steps}. "
            "Two kinds of steps are timed after the warm-up."
        )
    plain, patched = Run(), Run()
    with quiet():
        for _ in range(options.rounds):
            for run in (plain, patched):
                train(run, options, patch=run is patched)
    show(plain, patched, options)


@contextmanager
def quiet() -> Iterator[None]:
    """What trainers say of themselves, step by step, would bury the table."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def train(run: Run, options: argparse.Namespace, *, patch: bool) -> None:
    """One run, added to what the earlier ones of this contestant gave."""
    from fastrl.compat import patch_trl

    with tempfile.TemporaryDirectory() as folder:
        trainer, clock = make_trainer(options, folder)
        with patch_trl() if patch else nullcontext() as counter:
            trainer.train()
    run.sampling += clock.seconds[_WARM_UP::2]
    run.update += clock.seconds[_WARM_UP + 1 :: 2]
    run.logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    run.calls = counter.calls["ChunkedLogProbFunction"] if counter is not None else 0


def make_trainer(options: argparse.Namespace, folder: str) -> tuple[Any, Any]:
    from transformers import TrainerCallback
    from transformers.trainer_callback import PrinterCallback
    from trl import GRPOConfig, GRPOTrainer

    class Clock(TrainerCallback):
        """Seconds of each step, from the batch's sampling to the optimizer."""

        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.start = now(options.device)

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.seconds.append(now(options.device) - self.start)

    clock = Clock()
    config = GRPOConfig(
        output_dir=folder, max_steps=options.steps, num_iterations=2, beta=0.0,
        per_device_train_batch_size=options.prompts * options.completions,
        num_generations=options.completions, max_completion_length=options.tokens,
        gradient_checkpointing=False, bf16=False, use_cpu=options.device == "cpu", seed=0,
        learning_rate=1e-4, logging_steps=1, save_strategy="no", report_to="none",
        disable_tqdm=True,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=language_model(options), reward_funcs=reward, args=config, callbacks=[clock],
        train_dataset=dataset(options), processing_class=tokenizer(options.vocab),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer, clock


def now(device: str) -> float:
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [sum(i % 7 for i in ids) / len(ids) for ids in completion_ids]


def language_model(options: argparse.Namespace) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = max(1, options.hidden // 64)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=options.vocab, hidden_size=options.hidden, num_attention_heads=heads,
            intermediate_size=4 * options.hidden, num_hidden_layers=options.layers,
            pad_token_id=0, eos_token_id=1, bos_token_id=None,
        )
    )  # fmt: skip


def tokenizer(vocab: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[EOS]", *(f"w{i}" for i in range(2, vocab))]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="w2"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", eos_token="[EOS]")


def dataset(options: argparse.Namespace) -> Any:
    from datasets import Dataset

    drawn = random.Random(0)
    shortest = max(1, options.prompt_tokens // 2)  # ragged, so that there is padding as in life
    lengths = [drawn.randint(shortest, options.prompt_tokens) for _ in range(32)]
    words = range(2, options.vocab)
    texts = [" ".join(f"w{i}" for i in drawn.choices(words, k=n)) for n in lengths]
    return Dataset.from_dict({"prompt": texts})


def show(plain: Run, patched: Run, options: argparse.Namespace) -> None:
    versions = ", ".join(f"{n} {version_of(n)}" for n in ("trl", "transformers"))
    where = cpu_name() if options.device == "cpu" else torch.cuda.get_device_name()
    print(
        f"TRL GRPO, {options.layers} layers, hidden {options.hidden}, V {options.vocab}, "
        f"{options.prompts} prompts x {options.completions} completions x {options.tokens} tokens, "
        f"prompts of up to {options.prompt_tokens}, float32\n"
        f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}, {versions}\n"
        f"{options.rounds} runs of {options.steps} steps each, in turns; medians"
    )
    print(f"\n{'':28}{'TRL':>10}{'patched':>10}{'TRL / patched':>15}")
    of: dict[str, Callable[[Run], list[float]]] = {
        "step with sampling, s": lambda run: run.sampling,
        "step of learning alone, s": lambda run: run.update,
    }
    for name, seconds in of.items():
        a, b = (statistics.median(seconds(run)) for run in (plain, patched))
        print(f"{name:28}{a:10.3f}{b:10.3f}{a / b:14.2f}x")
    print(f"{'our function called, a run':28}{plain.calls:10}{patched.calls:10}")
    keys = ("loss", "grad_norm", "entropy")
    print("\nstep  " + "".join(f"{key + ' TRL':>15}{key + ' patched':>19}" for key in keys))
    for step, pair in enumerate(zip(plain.logged, patched.logged, strict=True), 1):
        cells = "".join(f"{pair[0][k]:15.6g}{pair[1][k]:19.6g}" for k in keys)
        print(f"{step:4}  {cells}")


if __name__ == "__main__":
    main()
