"""Small Llamas, how they are pre-trained, and sampling with a key-value cache."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import chains
import torch
from chains import MIXED, ONE, OTHER, Problem, Rows
from safetensors.torch import load_file, save_file
from settings import Settings
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import qtarget as qt

LOG = logging.getLogger(__name__)
Model = LlamaForCausalLM
BASES = ("weak", "middle", "base")


def build(settings: Settings, size: str, seed: int) -> Model:
    width, layers = settings.student if size == "student" else settings.teacher
    torch.manual_seed(seed * 2 + (size == "teacher"))
    config = LlamaConfig(
        vocab_size=chains.VOCAB,
        hidden_size=width,
        intermediate_size=width * 3,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.08,  # the usual 0.02 learns several times slower at this width
        pad_token_id=chains.PAD,
        bos_token_id=None,
        eos_token_id=chains.EOS,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def parameters(model: Model) -> int:
    return sum(p.numel() for p in model.parameters())


def hidden(model: Model, rows: Rows) -> Tensor:
    """[rows, length − 1, width]: position i predicts token i + 1."""
    return model.model(input_ids=rows.ids[:, :-1], use_cache=False).last_hidden_state


def optimiser(model: Model, rate: float, steps: int) -> tuple[torch.optim.Optimizer, Callable[[int], float]]:
    """AdamW and the learning rate of each step: linear warm-up over a tenth, then a cosine to 0."""
    warmup = max(1, steps // 10)

    def at(step: int) -> float:
        if step < warmup:
            return rate * (step + 1) / warmup
        return rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01), at


def fit(
    model: Model, batches: Iterator[Rows], rate: float, steps: int, check: Callable[[int], bool] | None = None
) -> Model:
    """Plain SFT, through the library's engine, until ``check(step)`` says stop."""
    adam, at = optimiser(model, rate, steps)
    for step in range(steps):
        batch = next(batches)
        out = qt.linear_target_loss(hidden(model, batch), model.lm_head.weight, batch.labels[:, 1:], qt.preset("sft"))
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in adam.param_groups:
            group["lr"] = at(step)
        adam.step()
        adam.zero_grad()
        if check is not None and check(step + 1):
            break
    return model.eval()


def stream(seed: str, settings: Settings, batch: int, style: chains.Style, noise: float) -> Iterator[Rows]:
    number = 0
    while True:
        pairs = chains.demonstrations(f"{seed} {number}", batch, settings.lengths, style, noise)
        yield chains.rows(pairs)
        number += 1


@torch.no_grad()
def sample(
    model: Model, asked: list[Problem], n: int, temperature: float, seed: str
) -> tuple[list[list[list[int]]], float]:
    """n completions a problem (temperature 0: greedy, n = 1), and the mean entropy in nats of the tokens drawn.

    Problems of a length go together. Draws are seeded for each length and temperature.
    """
    completions: list[list[list[int]]] = [[] for _ in asked]
    total, count = 0.0, 0
    for length in sorted({len(p.steps) for p in asked}):
        which = [i for i, p in enumerate(asked) if len(p.steps) == length]
        draws = torch.Generator().manual_seed(hash_of(f"{seed} {length} {temperature}"))
        ids = torch.tensor([asked[i].prompt for i in which]).repeat_interleave(n, 0)
        cache, made, step = DynamicCache(), [], ids
        alive = torch.ones(len(ids), dtype=torch.bool)
        for _ in range(length * chains.LINE + 3):
            logits = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
            if temperature:
                logp = torch.log_softmax(logits / temperature, -1)
                token = torch.multinomial(logp.exp(), 1, generator=draws)
                entropy = -(logp.exp() * logp).sum(-1)
                total, count = total + float(entropy[alive].sum()), count + int(alive.sum())
            else:
                token = logits.argmax(-1, keepdim=True)
            made.append(token)
            alive = alive & (token[:, 0] != chains.EOS)
            step = token
            if not alive.any():
                break
        for i, tokens in zip(which, torch.cat(made, 1).view(len(which), n, -1).tolist(), strict=True):
            completions[i] = tokens
    return completions, total / count if count else 0.0


def verdicts(model: Model, asked: list[Problem], n: int, temperature: float, seed: str) -> Tensor:
    """[problems, n] booleans."""
    completions, _ = sample(model, asked, n, temperature, seed)
    return torch.tensor([[chains.is_right(p, c) for c in made] for p, made in zip(asked, completions, strict=True)])


def hash_of(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])


# -- the models of a seed ------------------------------------------------------------------------------------------


def made(settings: Settings, seed: int, name: str, folder: Path) -> Model:
    """A model of a seed: a base or a teacher; trained when first asked for, and kept in ``folder``."""
    size = "student" if name in BASES else "teacher"
    model = build(settings, size, seed)
    path = folder / f"{name}-{seed}.safetensors"
    if not path.exists():
        _MAKE[name](settings, seed, folder, model)
    model.load_state_dict(load_file(path), strict=False)  # the tied head is stored once
    return model.eval()


def _keep(model: Model, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file({k: v.clone() for k, v in model.state_dict().items() if k != "lm_head.weight"}, part)
    part.replace(path)


def _bases(settings: Settings, seed: int, folder: Path, model: Model) -> None:
    """One pre-training on all styles with a little noise; moments of it are the weak, the middle and the strong base."""
    dev = chains.problems("dev", settings.check_problems, settings.lengths)
    stops = (settings.weak_at, settings.middle_at, settings.strong_at)
    wanted = [(name, at) for name, at in zip(BASES, stops, strict=True) if at is not None]

    def check(step: int) -> bool:
        if step % settings.check_every and step < settings.pretraining_steps:
            return False
        model.eval()
        score = float(verdicts(model, dev, 4, 1.0, f"check {seed}").float().mean())
        model.train()
        LOG.info("base     step %4d  right in %3.0f %% of the dev problems", step, 100 * score)
        while wanted and (score >= wanted[0][1] or step == settings.pretraining_steps):
            _keep(model, folder / f"{wanted.pop(0)[0]}-{seed}.safetensors")
        return not wanted

    batches = stream(f"base {seed}", settings, settings.pretraining_batch, MIXED, settings.base_noise)
    fit(model.train(), batches, settings.pretraining_rate, settings.pretraining_steps, check)


def _good(settings: Settings, seed: int, folder: Path, model: Model) -> None:
    batches = stream(f"teacher {seed}", settings, settings.pretraining_batch, MIXED, 0.0)
    _keep(
        fit(model.train(), batches, settings.teacher_rate, settings.teacher_steps), folder / f"good-{seed}.safetensors"
    )


def _continued(
    name: str, style: chains.Style, noise: float, start: str = "good"
) -> Callable[[Settings, int, Path, Model], None]:
    """The good teacher, or another model, trained on: with wrong steps, another layout, or clean demonstrations."""

    def make(settings: Settings, seed: int, folder: Path, model: Model) -> None:
        teacher = made(settings, seed, start, folder)
        batches = stream(f"{name} {seed}", settings, settings.pretraining_batch, style, noise)
        fit(teacher.train(), batches, settings.continued_rate, settings.continued_steps)
        _keep(teacher, folder / f"{name}-{seed}.safetensors")

    return make


_MAKE = {
    **dict.fromkeys(BASES, _bases),
    "good": _good,
    "bad": _continued("bad", MIXED, 0.15),
    "misaligned": _continued("misaligned", OTHER, 0.0),
    "sharp": _continued("sharp", ONE, 0.0),
    "tutor": _continued("tutor", MIXED, 0.0, start="base"),  # cheap: only where teachers have the base's size
}
