"""A teacher read from disk: its k likeliest tokens, and the mass of the rest.

    manifest.json               what it is, with a checksum of every file
    index.safetensors           keys [R, 16] uint8, counts [R] int32, starts [R] int64: rows by what is in them
    shard-00000.safetensors     ids [n, k] int32, logprobs [n, k] float16 or float32, tail [n] float32: log of the rest

A row is found by its key, so the order of rows does not matter; a token's place is its row's start and its number among
the row's supervised tokens. Places travel with the tokens as the column uid.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qtarget.errors import DataError, StorageError
from qtarget.losses.heads import TopK
from qtarget.teachers.cache import manifest as manifests
from qtarget.teachers.cache import shards
from qtarget.teachers.cache.index import RowIndex, row_key

INDEX = "index.safetensors"
# A batch's columns that hold the teacher of its tokens.
IDS, LOGPROBS, TAIL = "teacher_ids", "teacher_logprobs", "teacher_tail_logprob"
COLUMNS = (IDS, LOGPROBS, TAIL)
# Checksums of all files are taken at the start of a run up to this size, and of each file when it is first read above it.
_CHECKED_AT_ONCE = 64 * 2**30


class CachedTeacher:
    """A cache opened for reading; safe to hand to worker processes, which map the files themselves.

    Args:
        folder: where qtarget cache build wrote. tail: shape of the mass outside the k, "student" or "even".
        swapped: (a, b): exchange these two ids, for end tokens that differ.

    Raises:
        StorageError: there is no complete cache.
    """

    def __init__(self, folder: str | Path, tail: str = "student", swapped: tuple[int, int] | None = None):
        self.folder, self.tail, self.swapped = Path(folder), tail, swapped
        self.manifest = manifests.read(folder)
        if self.manifest["state"] != "complete":
            done, todo = len(self.manifest["shards"]), self.manifest["planned_shards"]
            raise StorageError(
                f"teacher_cache is {str(folder)!r}, which is not finished ({done} of {todo} files); run the same "
                "qtarget cache build again, which resumes where it stopped"
            )
        self.k: int = self.manifest["k"]
        self._begins = np.cumsum([0, *(line["tokens"] for line in self.manifest["shards"])])
        self._check_lazily = sum(line["bytes"] for line in self.manifest["shards"]) > _CHECKED_AT_ONCE
        self._mapped: dict[int, dict[str, np.ndarray]] = {}
        self._index: RowIndex | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": {}, "_index": None}

    def __len__(self) -> int:
        """Tokens."""
        return int(self._begins[-1])

    def check_files(self, checksums: bool | None = None) -> None:
        """Raise StorageError with the first file that is missing, cut short or changed.

        ``checksums``: read every file; None does so up to 64 GB, above which each is read when it is first used.
        """
        every = not self._check_lazily if checksums is None else checksums
        index: Any = {**self.manifest["index"], "file": INDEX}  # the one that is read, whatever the manifest calls it
        self._check_file(index, checksum=True)
        shards.check_index(self.folder / INDEX, self.manifest)
        for line in self.manifest["shards"]:
            self._check_file(line, every)
            shards.check_shard(self.folder / line["file"], line, self.manifest, values=every)

    def _check_file(self, line: Any, checksum: bool) -> None:
        if sentence := shards.fault(self.folder, line, checksum):
            raise StorageError(f"teacher_cache: {sentence}")

    @property
    def index(self) -> RowIndex:
        if self._index is None:
            arrays = shards.map_arrays(self.folder / INDEX)
            self._index = RowIndex(np.asarray(arrays["keys"]), np.asarray(arrays["starts"]))
        return self._index

    def places(self, input_ids: Sequence[int], labels: Sequence[int], context: Sequence[int] = ()) -> list[int] | None:
        """One place per token of a row, −1 where nothing is supervised; None where the cache has no such row."""
        number = self.index.find(row_key(input_ids, labels, context))
        return None if number is None else self.index.places(number, labels)

    def gather(self, places: Tensor) -> dict[str, Tensor]:
        """The teacher at places of any shape: teacher_ids [..., k] int32, teacher_logprobs [..., k],
        teacher_tail_logprob [...] float32; at places below 0 anything."""
        flat = places.reshape(-1).numpy()
        wanted = np.flatnonzero(flat >= 0)
        at = flat[wanted]
        if len(at) and int(at.max()) >= len(self):
            raise DataError(f"uid holds {int(at.max())}, but the teacher cache has {len(self)} tokens")
        dtype = np.dtype(self.manifest["dtype"])
        ids = np.zeros((len(flat), self.k), np.int32)
        logprobs = np.full((len(flat), self.k), -1e4, dtype)
        tail = np.zeros(len(flat), np.float32)
        shard = np.searchsorted(self._begins, at, side="right") - 1
        for number in np.unique(shard):
            arrays, here = self._arrays(int(number)), shard == number
            into, rows = wanted[here], at[here] - self._begins[number]
            ids[into], logprobs[into], tail[into] = arrays["ids"][rows], arrays["logprobs"][rows], arrays["tail"][rows]
        if self.swapped is not None:
            a, b = self.swapped
            is_a, is_b = ids == a, ids == b
            ids[is_a], ids[is_b] = b, a
        shape = tuple(places.shape)
        return {
            IDS: torch.from_numpy(ids).view(*shape, self.k),
            LOGPROBS: torch.from_numpy(logprobs).view(*shape, self.k),
            TAIL: torch.from_numpy(tail).view(shape),
        }

    def kept_mass(self) -> tuple[float, float]:
        """The teacher's mass in the k kept tokens: its mean over all tokens, and the least."""
        total, least = 0.0, 1.0
        for number in range(len(self.manifest["shards"])):
            kept = -np.expm1(np.minimum(self._arrays(number)["tail"].astype(np.float64), 0))
            total, least = total + float(kept.sum()), min(least, float(kept.min()))
        return total / max(1, len(self)), least

    def _arrays(self, number: int) -> dict[str, np.ndarray]:
        if number not in self._mapped:
            line = self.manifest["shards"][number]
            if self._check_lazily:
                self._check_file(line, checksum=True)
                shards.check_shard(self.folder / line["file"], line, self.manifest, values=True)
            self._mapped[number] = shards.map_arrays(self.folder / line["file"])
        return self._mapped[number]

    def top_k(self, columns: dict[str, Tensor]) -> TopK:
        """What the engine takes, from a batch's gathered columns, for positions 1 to the last."""
        return TopK(columns[IDS][:, 1:], columns[LOGPROBS][:, 1:], columns[TAIL][:, 1:], tail=self.tail)
