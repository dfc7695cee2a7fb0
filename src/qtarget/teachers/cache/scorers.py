"""Where a cache's log-probabilities come from: the trainer's own teacher, or a server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

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


class Scorer(Protocol):
    """Where a teacher's log-probabilities come from."""

    def __call__(self, rows: list[dict[str, Any]]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """For each row ids [n, k] int32, log-probabilities [n, k] float32, log of the rest [n] float32."""
        ...


class LiveScorer:
    """The k likeliest tokens from the trainer's own teacher, logits of a few tokens at a time."""

    def __init__(self, trainer: QTargetTrainer, k: int):
        self.trainer, self.k = trainer, k

    @torch.no_grad()
    def __call__(self, rows: list[dict[str, Any]]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        ids, logprobs, tails, owners = [], [], [], []
        for log_p, owner in teacher_log_probs(self.trainer, rows):
            top = log_p.topk(self.k, dim=-1)
            outside = log_p.exp().scatter(1, top.indices, 0.0).sum(-1, dtype=torch.float64).log()
            ids.append(top.indices.int())
            logprobs.append(top.values.clamp(min=_LOWEST))  # NaN stays NaN
            tails.append(outside.clamp(min=_LOWEST).float())
            owners.append(owner)
        joined = [torch.cat(part).cpu().numpy() for part in (ids, logprobs, tails, owners)]
        for number in range(len(rows)):
            here = joined[3] == number
            yield tuple(part[here] for part in joined[:3])


def teacher_log_probs(
    trainer: QTargetTrainer, rows: list[dict[str, Any]]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """([c, vocab] log-probabilities, [c] number of the row) of the supervised tokens, a chunk at a time."""
    batch = trainer.batch(rows)
    with torch.no_grad():
        trainer.aux.check_heads(batch.inputs)
        teacher = trainer.ask(batch, {"teacher"})["teacher"]
        row, place = batch.supervised()
        for begin in range(0, len(row), _CHUNK):
            at = row[begin : begin + _CHUNK], place[begin : begin + _CHUNK]
            yield log_probs(teacher, at, trainer.vocab_size), at[0]


class ServerScorer:
    """The k likeliest tokens from a server, which is sent the ids the teacher is to read."""

    def __init__(self, trainer: QTargetTrainer, server: Any):
        self.trainer, self.server = trainer, server

    def __call__(self, rows: list[dict[str, Any]]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        sequences, places = [], []
        for row in rows:
            before, begin = read_before(self.trainer.rows.join, row)
            ids = [*before, *row["input_ids"][begin:]]
            positions = supervised_positions(row["labels"]) - begin + len(before)
            sequences.append(ids)
            places.append(positions - 1)  # its first entry is that of token 1
        for scored, at in zip(self.server.score(sequences), places, strict=True):
            kept = np.maximum(scored.logprobs[at], _LOWEST)
            rest = np.clip(1 - np.exp(kept.astype(np.float64)).sum(-1), 0, None)
            with np.errstate(divide="ignore"):
                yield scored.ids[at], kept, np.maximum(np.log(rest), _LOWEST).astype(np.float32)


def server_scorer(trainer: QTargetTrainer, url: str, model: str | None, k: int) -> tuple[ServerScorer, str]:
    """A scorer that asks a server, and what the server calls its model.

    Raises:
        ConfigError: the named teacher has another tokenizer, or the server does not answer as it must.
    """
    from qtarget.teachers.server.client import TeacherServer

    if faults := teacher_settings.tokenizer_faults(trainer.args, trainer.tokenizer):
        raise ConfigError(faults)
    server = TeacherServer(url, model, k=k, vocab_size=trainer.vocab_size)
    return ServerScorer(trainer, server), server.check()
