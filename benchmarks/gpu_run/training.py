"""Training with the trainers themselves: TRL's own loss beside qtarget's sft from one seed, then dft and target-sft.

A model of Qwen2.5-0.5B's shape with random weights and padded rows of the head, and tokens drawn by Zipf's law with a
follower for each, so that there is something to learn. Nothing is downloaded.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from typing import Any

import torch

from gpu_run.clock import free, synchronize
from gpu_run.record import Talk

LOSSES_AGREE = 1e-3
LOG_EVERY = 10


@dataclass(frozen=True)
class Size:
    """The model's shape and the run's."""

    width: int = 896
    layers: int = 24
    heads: int = 14
    groups: int = 2
    inner: int = 4864
    vocab: int = 151936
    words: int = 151665
    rows: int = 8
    length: int = 1024
    steps: int = 40


SMOKE = Size(width=32, layers=2, heads=4, inner=64, vocab=512, words=500, rows=2, length=16, steps=20)
# (name, target or None for TRL's own, weights' dtype); mixed precision is on for all of them on a GPU.
RUNS = (
    ("trl nll, float32 weights", None, "float32"),
    ("qtarget sft, float32 weights", "sft", "float32"),
    ("trl nll, bf16 weights", None, "bfloat16"),
    ("qtarget sft, bf16 weights", "sft", "bfloat16"),
    ("qtarget dft, bf16 weights", "dft", "bfloat16"),
    ("qtarget target-sft, bf16 weights", "target-sft", "bfloat16"),
    ("qtarget dft, float32 weights", "dft", "float32"),
    ("qtarget target-sft, float32 weights", "target-sft", "float32"),
)


def run(talk: Talk) -> None:
    """Each run while time is left; losses of TRL and of qtarget's sft must agree."""
    try:
        import transformers
        from trl import SFTTrainer  # noqa: F401

        from qtarget import QTargetTrainer  # noqa: F401
    except Exception as error:  # packages that a rented machine may lack
        talk.note(f"training is not available: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        return
    import datasets

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    smoke = talk.settings.smoke
    size = SMOKE if smoke else Size()
    runs = [one for one in RUNS if not smoke or one[2] == "float32"]
    losses: dict[str, list[float]] = {}
    longest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        data, tokenizer = _rows(size), _tokenizer(size.words)
        for name, target, dtype in runs:
            if talk.left < 1.2 * longest + 2:
                talk.note(f"no time was left for {name}")
                continue
            start = time.monotonic()
            found = _train(size, target, getattr(torch, dtype), data, tokenizer, folder, talk.settings.device)
            longest = max(longest, time.monotonic() - start)
            losses[name] = found["losses"]
            talk.row(name, **found)
            free(talk.settings.device)
    for dtype in ("float32", "bf16"):
        _compare(talk, losses.get(f"trl nll, {dtype} weights"), losses.get(f"qtarget sft, {dtype} weights"), dtype)


def _compare(talk: Talk, theirs: list[float] | None, ours: list[float] | None, dtype: str) -> None:
    if not theirs or not ours:
        return
    apart = max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True))
    talk.row(f"sft beside TRL, {dtype} weights", losses_apart=apart)
    talk.limit(f"{dtype} weights: losses of sft beside TRL's, relative", apart, most=LOSSES_AGREE)


def _tokenizer(words: int) -> Any:
    """A word for each real token, so that the rows of the head beyond them are padding."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"w{i}": i for i in range(words)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w0")),
        unk_token="w0",
        eos_token="w1",
        pad_token="w2",
    )


def _model(size: Size, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=size.vocab,
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.groups,
        intermediate_size=size.inner,
        max_position_embeddings=size.length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=2,
    )
    torch.manual_seed(seed)
    with device:  # half a billion numbers are drawn there in no time
        return Qwen2ForCausalLM(config).to(dtype)


def _rows(size: Size) -> Any:
    """As many rows as the steps take; half of the tokens are the one before times a number, the others drawn."""
    from datasets import Dataset

    g = torch.Generator().manual_seed(3)
    count = size.rows * size.steps
    drawn = 3 + (torch.rand(count, size.length, generator=g) ** 4 * (size.words - 3)).long()
    follow = torch.rand(count, size.length, generator=g) < 0.5
    ids = drawn.clone()
    for at in range(1, size.length):
        ids[:, at] = torch.where(follow[:, at], 3 + ids[:, at - 1] * 31 % (size.words - 3), drawn[:, at])
    return Dataset.from_dict({"input_ids": ids.tolist()})


def _train(
    size: Size, target: str | None, dtype: torch.dtype, data: Any, tokenizer: Any, folder: str, device: torch.device
) -> dict:
    """Losses, each the mean of ten steps; tokens a second after the first five steps; peak memory."""
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from qtarget import QTargetConfig, QTargetTrainer

    cuda = device.type == "cuda"
    settings: dict[str, Any] = {
        "output_dir": folder,
        "per_device_train_batch_size": size.rows,
        "max_length": size.length,
        "max_steps": size.steps,
        "logging_steps": LOG_EVERY,
        "gradient_checkpointing": False,
        "learning_rate": 1e-4,
        "warmup_steps": 5,
        "bf16": cuda,
        "use_cpu": not cuda,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 1,
    }

    class Clock(TrainerCallback):
        start, steps = 0.0, 0

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                synchronize(device)
                self.start, self.steps = time.perf_counter(), state.global_step

    clock = Clock()
    common = {"train_dataset": data, "processing_class": tokenizer, "callbacks": [clock]}
    model = _model(size, dtype, device)
    if target is None:
        trainer = SFTTrainer(model, SFTConfig(**settings), **common)
    else:
        teacher = _model(size, dtype, device, seed=1) if target == "target-sft" else None
        config = QTargetConfig(target=target, **settings)
        trainer = QTargetTrainer(model, config, teacher_model=teacher, **common)
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    trainer.train()
    synchronize(device)
    seconds = time.perf_counter() - clock.start
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return {
        "losses": losses,
        "tokens_per_s": size.rows * size.length * (trainer.state.global_step - clock.steps) / seconds,
        "peak_gb": torch.cuda.max_memory_allocated(device) / 1e9 if cuda else None,
    }
