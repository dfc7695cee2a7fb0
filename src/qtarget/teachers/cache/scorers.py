"""Where a cache's log-probabilities come from: the trainer's own teacher, or a server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qtarget.errors import ConfigError
from qtarget.losses.log_probs import log_probs
from qtarget.teachers import settings as teacher_settings
from qtarget.teachers.cache.index import supervised_positions
from qtarget.teachers.joins import read_before

if TYPE_CHECKING:
    from qtarget.training.trainer import QTargetTrainer

# Supervised tokens whose logits are formed at a time: [256, vocabulary] float32 is 50 MB at 49,152.
_CHUNK = 256
# float16 holds no log-probability below this; whatever is there has a probability of 0.
_LOWEST = -6e4
# rows → for each ids [n, k] int32, log-probabilities [n, k] float32, log of the rest [n] float32
Scorer = Callable[[list[dict[str, Any]]], Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]]


class LiveScorer:
    """The k likeliest tokens from the trainer's own teacher, logits of a few tokens at a time."""

    def __init__(self, trainer: QTargetTrainer, k: int):
        self.trainer, self.k = trainer, k

    @torch.no_grad()
    def __call__(self, rows: list[dict[str, Any]]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        chunks = []
        for log_p, owner in teacher_log_probs(self.trainer, rows):
            top = log_p.topk(self.k, dim=-1)
            outside = log_p.exp().scatter(1, top.indices, 0.0).sum(-1, dtype=torch.float64).log()
            kept, tail = (value.clamp(min=_LOWEST).float() for value in (top.values, outside))  # NaN stays NaN
            chunks.append((top.indices.int(), kept, tail, owner))
        ids, logprobs, tails, owners = (torch.cat(parts).cpu().numpy() for parts in zip(*chunks, strict=True))
        for number in range(len(rows)):
            here = owners == number
            yield ids[here], logprobs[here], tails[here]


def teacher_log_probs(
    trainer: QTargetTrainer, rows: list[dict[str, Any]]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """([c, vocab] log-probabilities, [c] number of the row) of the supervised tokens, a chunk at a time."""
    batch = trainer.batch(rows)
    with torch.no_grad():
        trainer.aux.check_heads(batch.inputs)
        teacher = trainer.ask(batch, {"teacher"})["teacher"]
        row, place = batch.supervised()
        for at in zip(row.split(_CHUNK), place.split(_CHUNK), strict=True):
            yield log_probs(teacher, at, trainer.vocab_size), at[0]


def server_scorer(
    trainer: QTargetTrainer, url: str, model: str | None, k: int, longest: int, timeout: float = 120.0
) -> tuple[Scorer, str]:
    """A scorer that sends a server the ids the teacher is to read, and what the server calls its model.

    Args:
        longest: tokens of the longest row; 0 where a context makes it another number.

    Raises:
        ConfigError: the named teacher has another tokenizer, or the server does not answer as it must.
    """
    from qtarget.teachers.server.client import TeacherServer

    if faults := teacher_settings.tokenizer_faults(trainer.args, trainer.tokenizer):
        raise ConfigError(faults)
    server = TeacherServer(url, model, k=k, vocab_size=trainer.vocab_size, timeout=timeout)

    def score(rows: list[dict[str, Any]]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        sequences, places = [], []
        for row in rows:
            before, begin = read_before(trainer.rows.join, row)
            sequences.append([*before, *row["input_ids"][begin:]])
            # an answer's first entry is that of token 1
            places.append(supervised_positions(row["labels"]) - begin + len(before) - 1)
        for scored, at in zip(server.score(sequences), places, strict=True):
            kept = np.maximum(scored.logprobs[at], _LOWEST)
            rest = np.clip(1 - np.exp(kept.astype(np.float64)).sum(-1), 0, None)
            with np.errstate(divide="ignore"):
                yield scored.ids[at], kept, np.maximum(np.log(rest), _LOWEST).astype(np.float32)

    served = server.check()
    if served.max_model_len is not None and longest >= served.max_model_len:
        raise ConfigError(
            f"max_length is {trainer.args.max_length}, the longest row has {longest} tokens, and the server has "
            f"--max-model-len {served.max_model_len}; start it with {longest + 1} or more, or set a smaller max_length"
        )
    return score, served.name
