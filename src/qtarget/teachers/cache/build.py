"""Builds a teacher cache: the teacher's k likeliest tokens at every supervised one.

The plan comes first and is the same on every start: unique rows in the order of the datasets, cut into shards. A shard is
written whole or not at all, so an interrupted build goes on at the first that is missing and ends with the same bytes.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qtarget import __version__
from qtarget.errors import ConfigError, DataError, StorageError
from qtarget.teachers import settings as teacher_settings
from qtarget.teachers.cache import manifest as manifests
from qtarget.teachers.cache import shards
from qtarget.teachers.cache.index import KEY_BYTES, row_key, supervised_positions
from qtarget.teachers.cache.reader import INDEX
from qtarget.teachers.cache.scorers import LiveScorer, Scorer, teacher_log_probs
from qtarget.teachers.joins import read_before

if TYPE_CHECKING:
    from qtarget.training.trainer import QTargetTrainer

logger = logging.getLogger(__name__)

# Tokens of a shard are between these, some 256 shards in all where that lies between.
_FEWEST, _MOST = 1 << 14, 1 << 20
# A sum of k probabilities in float32 may pass 1 by less than this.
_MOST_MASS = 1.001


@dataclass
class Row:
    """A row of the plan: which dataset, which of its rows, how many supervised tokens and tokens in all."""

    dataset: str
    number: int
    tokens: int
    length: int


@dataclass
class Plan:
    """What a build is going to do.

    Attributes:
        rows: unique rows with supervised tokens. keys: [R, 16] uint8. shards: numbers of the rows of each shard.
        repeated: rows that were there before with the same ids, mask and context.
    """

    rows: list[Row]
    keys: np.ndarray
    shards: list[list[int]]
    repeated: int

    @property
    def tokens(self) -> int:
        return sum(row.tokens for row in self.rows)

    def megabytes(self, k: int, dtype: str) -> float:
        """Size on disk."""
        return self.tokens * bytes_per_token(k, dtype) / 2**20


def bytes_per_token(k: int, dtype: str = "float16") -> int:
    """On disk: an int32 id and a log-probability for each of k, and a float32 tail."""
    return k * (4 + np.dtype(dtype).itemsize) + 4


def about(trainer: QTargetTrainer) -> dict[str, Any]:
    """The manifest's part on tokenizer, preparation, context and teacher."""
    tokenizer, args = trainer.tokenizer, trainer.args
    return {
        **teacher_settings.what_decides_rows(args, tokenizer, trainer.completion_only_loss),
        "end_token": min(teacher_settings.end_tokens(args), default=None),
        "teacher": teacher_settings.named_teacher(args),
    }


def plan(trainer: QTargetTrainer, shard_tokens: int | None = None) -> Plan:
    """Read the prepared rows of all datasets of a trainer whose packing is off.

    Raises:
        ConfigError: a stream, or no supervised token at all.
    """
    rows: list[Row] = []
    keys: dict[bytes, int] = {}
    repeated = 0
    for name, dataset in datasets_of(trainer).items():
        if not hasattr(dataset, "__len__"):
            raise ConfigError("dataset_streaming is on, but a cache is built from a whole dataset; set it to false")
        for number, row in enumerate(dataset):
            tokens = len(supervised_positions(row["labels"]))
            if not tokens:
                continue
            key = row_key(row["input_ids"], row["labels"], read_before(trainer.rows.join, row)[0])
            if key in keys:
                repeated += 1
                continue
            keys[key] = len(rows)
            rows.append(Row(name, number, tokens, len(row["input_ids"])))
    if not rows:
        raise DataError("no row has a supervised token; there is nothing to ask a teacher about")
    size = shard_tokens or min(_MOST, max(_FEWEST, sum(row.tokens for row in rows) // 256))
    groups: list[list[int]] = [[]]
    filled = 0
    for number, row in enumerate(rows):
        if groups[-1] and filled + row.tokens > size:
            groups.append([])
            filled = 0
        groups[-1].append(number)
        filled += row.tokens
    for group in groups:  # rows of a length together: less padding
        group.sort(key=lambda number: (-rows[number].length, number))
    return Plan(rows, np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES), groups, repeated)


def datasets_of(trainer: QTargetTrainer) -> dict[str, Any]:
    """The prepared datasets by name: train, and what is evaluated."""
    evaluated = trainer.eval_dataset
    named = evaluated if isinstance(evaluated, dict) else {"eval": evaluated}
    return {name: data for name, data in {"train": trainer.train_dataset, **named}.items() if data is not None}


def needed_for(
    trainer: QTargetTrainer, plan: Plan, coverage: float, sample_rows: int = 64
) -> tuple[int, dict[str, Any]]:
    """k whose mean kept mass reaches ``coverage`` on a sample of rows, and the distribution of what tokens need.

    Returns:
        (k, {"percentiles of needed k": {p: k}, "kept mass": {k: mean}, "tokens": n}).
    """
    every = max(1, len(plan.rows) // sample_rows)
    total, needed = torch.zeros(trainer.vocab_size, dtype=torch.float64), []
    for row in range(0, len(plan.rows), every):
        for log_p, _ in teacher_log_probs(trainer, [_row(trainer, plan.rows[row])]):
            if log_p.isnan().any():
                raise _gives_nan(trainer, plan.rows[row])
            mass = log_p.exp().sort(-1, descending=True).values.cumsum(-1)
            needed.append(((mass < coverage).sum(-1) + 1).clamp(max=mass.shape[1]).cpu())
            total += mass.sum(0, dtype=torch.float64).cpu()
    counts = torch.cat(needed)
    mean = total / len(counts)
    enough = (mean >= coverage).nonzero()
    k = int(enough[0]) + 1 if len(enough) else len(mean)
    percentiles = {str(p): int(counts.double().quantile(p / 100, interpolation="higher")) for p in (50, 90, 99, 100)}
    shown = sorted({1, 4, 16, 64, 256, k} & set(range(1, len(mean) + 1)))
    kept = {str(n): round(float(mean[n - 1]), 5) for n in shown}
    return k, {"coverage": coverage, "sampled_tokens": len(counts), "needed_k": percentiles, "kept_mass": kept}


def build(
    trainer: QTargetTrainer,
    folder: str | Path,
    planned: Plan,
    k: int,
    *,
    dtype: str = "float16",
    about: dict[str, Any],
    scorer: Scorer | None = None,
    batch_size: int = 8,
    progress: Callable[[int], object] = lambda tokens: None,
) -> Path:
    """Write the cache, or go on with one that was interrupted.

    Args:
        trainer: a QTargetTrainer with packing off and its teacher loaded (or a scorer in its place).
        folder: where it goes. planned: the plan. k: tokens kept. dtype: of the log-probabilities.
        about: the manifest's part on teacher, tokenizer and preparation.
        progress: called with the tokens of each shard that is there.

    Raises:
        StorageError: another build is at work in the folder, it holds a cache of something else, or the disk is full.
        DataError: the teacher gives NaN. Shards already written stay.
    """
    folder = Path(folder)
    check_folder(folder, planned, k, dtype, about)  # before anything is made there
    folder.mkdir(parents=True, exist_ok=True)
    score = scorer or LiveScorer(trainer, k)
    with _alone(folder):
        check_folder(folder, planned, k, dtype, about)  # another build may have been here since
        manifest = _begin(folder, planned, k, dtype, about)
        over = _Over()
        for number, group in enumerate(planned.shards):
            if number < len(manifest["shards"]):
                progress(sum(planned.rows[row].tokens for row in group))
                continue
            line = _write_shard(trainer, folder, planned, number, score, dtype, batch_size, over)
            manifest["shards"].append(line)
            if len(manifest["shards"]) == len(planned.shards):
                manifest["state"] = "complete"
            manifests.write(folder, manifest)
            progress(line["tokens"])
    over.warn()
    return folder


@dataclass
class _Over:
    """Tokens whose k probabilities sum to more than 1, which no softmax gives. most: their largest sum."""

    tokens: int = 0
    most: float = 1.0
    first: str = ""

    def look(self, logprobs: np.ndarray, row: Row) -> None:
        mass = np.exp(logprobs.astype(np.float64)).sum(-1)
        over = mass[mass > _MOST_MASS]
        if len(over):
            self.first = self.first or f"row {row.number} of the {row.dataset} dataset"
            self.tokens, self.most = self.tokens + len(over), max(self.most, float(over.max()))

    def warn(self) -> None:
        if self.tokens:
            logger.warning(
                "the kept probabilities of %d tokens sum to more than 1, to %.4f at most (%s among them): the server "
                "rounds, or gives processed log-probabilities; ask it for float32 and --logprobs-mode raw_logprobs",
                *(self.tokens, self.most, self.first),
            )


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One builder in a folder at a time; the lock goes with its process, however that ends."""
    from filelock import FileLock, Timeout

    path = folder / ".building"
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise StorageError(
            f"output is {str(folder)!r}, where another qtarget cache build is running; wait for it, or name another "
            "folder"
        ) from None
    try:
        yield
    finally:
        lock.release()
        path.unlink(missing_ok=True)


def _begin(folder: Path, planned: Plan, k: int, dtype: str, about: dict[str, Any]) -> dict[str, Any]:
    """The manifest to go on with: a new one, or that of an interrupted build of exactly this."""
    if not (folder / manifests.FILE).exists():
        counts = np.array([row.tokens for row in planned.rows], np.int32)
        starts = np.zeros(len(counts), np.int64)
        order = np.concatenate(planned.shards)
        starts[order] = np.cumsum([0, *counts[order][:-1]])
        index = shards.write_arrays(folder / INDEX, {"keys": planned.keys, "counts": counts, "starts": starts})
        manifest = {**_fresh(planned, k, dtype, about), "index": index, "shards": []}
        manifests.write(folder, manifest)
        return manifest
    manifest = {**manifests.read(folder)}
    for number, line in enumerate(manifest["shards"]):
        if shards.fault(folder, line) is not None:  # it and what follows is rebuilt
            del manifest["shards"][number:]
            manifest["state"] = "building"
            break
    return manifest


def _fresh(planned: Plan, k: int | None, dtype: str, about: dict[str, Any]) -> dict[str, Any]:
    return {
        "format": manifests.FORMAT,
        "program": f"qtarget {__version__}",
        "state": "building",
        **about,
        "k": k,
        "dtype": dtype,
        "rows": len(planned.rows),
        "tokens": planned.tokens,
        "planned_shards": len(planned.shards),
    }


def check_folder(folder: Path, planned: Plan, k: int | None, dtype: str, about: dict[str, Any]) -> None:
    """Raise StorageError where a build may not have a folder; ``k``: None where it is not known yet."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise StorageError(f"output is {str(folder)!r}, which is a file; name a new folder")
    if not (folder / manifests.FILE).exists():
        begun = {INDEX, f"{INDEX}.partial", f"{manifests.FILE}.partial", ".building"}
        if any(file.name not in begun for file in folder.iterdir()):
            raise StorageError(f"output is {str(folder)!r}, which holds other files; name a new folder")
        return
    manifest = manifests.read(folder)
    left_out = ("state", "program", *(("k",) if k is None else ()))
    wanted = {name: value for name, value in _fresh(planned, k, dtype, about).items() if name not in left_out}
    difference = manifests.first_difference(
        manifest, wanted, "name another folder, or build with the settings it was started with"
    )
    have = shards.map_arrays(folder / INDEX)
    if difference is None and not np.array_equal(have["keys"], planned.keys):
        difference = "the rows are not those it was started with: text, order or context changed; name another folder"
    if difference is not None:
        raise StorageError(f"output is {str(folder)!r}, which holds a teacher cache: {difference}")


def _write_shard(
    trainer: QTargetTrainer,
    folder: Path,
    planned: Plan,
    number: int,
    score: Scorer,
    dtype: str,
    batch_size: int,
    over: _Over,
) -> dict[str, Any]:
    ids, logprobs, tails = [], [], []
    group = planned.shards[number]
    for begin in range(0, len(group), batch_size):
        rows = [planned.rows[row] for row in group[begin : begin + batch_size]]
        for row, (top, kept, tail) in zip(rows, score([_row(trainer, row) for row in rows]), strict=True):
            if not (np.isfinite(kept).all() and not np.isnan(tail).any()):
                raise _gives_nan(trainer, row)
            over.look(kept, row)
            ids.append(top)
            logprobs.append(kept.astype(dtype))
            tails.append(tail)
    arrays = {"ids": np.concatenate(ids), "logprobs": np.concatenate(logprobs), "tail": np.concatenate(tails)}
    line = shards.write_arrays(folder / f"shard-{number:05d}.safetensors", arrays)
    return {**line, "tokens": len(arrays["tail"])}


def _gives_nan(trainer: QTargetTrainer, row: Row) -> DataError:
    who = teacher_settings.describe(teacher_settings.named_teacher(trainer.args))
    return DataError(
        f"the teacher gives NaN for row {row.number} of the {row.dataset} dataset (it is {who}); check that row, or load "
        "the teacher in float32 or bfloat16 (teacher_model_init_kwargs: {dtype: ...})"
    )


def _row(trainer: QTargetTrainer, row: Row) -> dict[str, Any]:
    return datasets_of(trainer)[row.dataset][row.number]


def seconds_for(trainer: QTargetTrainer, planned: Plan, batch_size: int) -> float:
    """Estimated seconds of a build: one batch of rows of middling length, timed after a first that warms up."""
    by_length = sorted(range(len(planned.rows)), key=lambda row: planned.rows[row].length)
    middle = by_length[max(0, len(by_length) // 2 - batch_size // 2) :][:batch_size]
    rows = [_row(trainer, planned.rows[row]) for row in middle]
    score = LiveScorer(trainer, 1)
    list(score(rows[:1]))
    begin = time.perf_counter()
    list(score(rows))
    spent = time.perf_counter() - begin
    return spent * sum(row.length for row in planned.rows) / max(1, sum(planned.rows[row].length for row in middle))


def check_room(folder: str | Path, megabytes: float) -> None:
    """Raise StorageError where the disk has no room for the cache."""
    existing = next(parent for parent in (Path(folder).absolute(), *Path(folder).absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free / 2**20
    if megabytes > free:
        raise StorageError(
            f"output is {str(folder)!r}, where {free:.0f} MB are free and the cache needs {megabytes:.0f}; keep fewer "
            "tokens (--k), or name a folder on a larger disk"
        )
