"""Numbers every token, so that its teacher's answer is found after cutting and packing.

Rows are marked as the model will see them, whole and in any order. The column's name tells which source made it, so that
a dataset marked for another cache or another run is never taken for this one's.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qtarget.errors import ConfigError, DataError
from qtarget.teachers.cache.reader import CachedTeacher
from qtarget.teachers.context import Context

# The name of the column of uids, whatever made them, begins with this.
PREFIX = "qtarget_uid_"
# A token's uid under a context teacher: number of the dataset, of the row, of the token in it.
_ROW, _SET = 24, 56
_POSITION = (1 << _ROW) - 1
_IDS, _BEGIN = "qtarget_context_ids", "qtarget_context_begin"


@dataclass(frozen=True)
class RowsThatAsk:
    """The rows of some data sources: the others have a target without a teacher."""

    column: str
    sources: frozenset[str]

    def __contains__(self, row: Mapping[str, Any]) -> bool:
        return self.column not in row or str(row[self.column]) in self.sources


class CacheJoin:
    """Marks tokens with their place in a cache.

    Args:
        cache: an opened cache. context: what its teacher read before each row, or None. asking: rows that are looked up;
            None for all.
    """

    def __init__(self, cache: CachedTeacher, context: Context | None, asking: RowsThatAsk | None = None):
        self.cache, self.context, self.asking = cache, context, asking
        self.column = PREFIX + cache.manifest["index"]["checksum"][:12]

    def mark(self, dataset: Any, name: str, cut: slice, **map_settings: Any) -> Any:
        """The dataset with the column; rows are looked up by what ``cut`` leaves of them.

        Raises:
            DataError: a row the cache does not have.
        """
        return dataset.map(self._marked, with_indices=True, fn_kwargs={"name": name, "cut": cut}, **map_settings)

    def _marked(self, row: Mapping[str, Any], number: int, name: str, cut: slice) -> dict[str, list[int]]:
        ids, labels = row["input_ids"][cut], row["labels"][cut]
        if all(label == -100 for label in labels[1:]) or (self.asking is not None and row not in self.asking):
            return {self.column: [-1] * len(row["input_ids"])}
        before: list[int] = []
        if self.context is not None:
            before, _ = _before(self.context, row, ids, labels, f"row {number} of the {name} dataset")
        places = self.cache.places(ids, labels, before)
        if places is None:
            raise DataError(
                f"row {number} of the {name} dataset is not in the teacher cache {str(self.cache.folder)!r} (it has "
                f"{len(self.cache.index)} rows): the row, its mask or its context was added or changed since; build a "
                "cache for these rows"
            )
        return {self.column: _within(places, len(row["input_ids"]), cut)}

    def gather(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Further columns of a batch; none for rows that were not marked."""
        return self.cache.gather(batch[self.column]) if self.column in batch else {}


class ContextJoin:
    """Marks tokens with their dataset, row and position, and keeps what the teacher reads before each row.

    Args:
        context: the template, with the student's tokenizer. pad_token_id: fills the teacher's batches. asking: rows whose
            teacher is asked; None for all.
    """

    def __init__(self, context: Context, pad_token_id: int, asking: RowsThatAsk | None = None):
        self.context, self.pad_token_id, self.asking = context, pad_token_id, asking
        self.column = PREFIX + uuid.uuid4().hex[:12]
        self._tables: list[Dataset] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": []}  # the function that marks does not read them

    def mark(self, dataset: Any, name: str, cut: slice, **map_settings: Any) -> Any:
        if not isinstance(dataset, Dataset):
            raise ConfigError(
                "dataset_streaming is on with teacher_context, which stores its texts with the rows; read the dataset "
                "whole, or build a teacher cache with the same teacher_context"
            )
        settings = {"name": name, "cut": cut, "number_of_set": len(self._tables)}
        dataset = dataset.map(self._marked, with_indices=True, fn_kwargs=settings, **map_settings)
        self._tables.append(dataset.select_columns([_IDS, _BEGIN]))
        return dataset.remove_columns([_IDS, _BEGIN])

    def _marked(self, row: Mapping[str, Any], number: int, name: str, cut: slice, number_of_set: int) -> dict[str, Any]:
        ids, labels = row["input_ids"][cut], row["labels"][cut]
        if self.asking is not None and row not in self.asking:
            nobody = [-1] * len(row["input_ids"])
            return {self.column: nobody, _IDS: np.zeros(0, np.int64), _BEGIN: 0}
        before, begin = _before(self.context, row, ids, labels, f"row {number} of the {name} dataset")
        first = (number_of_set << _SET) | (number << _ROW)
        uids = _within([first | position for position in range(len(ids))], len(row["input_ids"]), cut)
        return {self.column: uids, _IDS: np.asarray(before, dtype=np.int64), _BEGIN: begin}

    def row_of(self, uid: int) -> tuple[list[int], int]:
        """(what the teacher reads first, begin) of a token's row; see ``Context.of``."""
        number_of_set, number = divmod(uid >> _ROW, 1 << (_SET - _ROW))
        row = self._tables[number_of_set][number]
        return row[_IDS], row[_BEGIN]

    def batch(self, input_ids: Tensor, labels: Tensor, uids: Tensor) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        """What the teacher is to read, and how its positions are joined to the student's.

        Args:
            input_ids, labels, uids: [B, T], before the shift.

        Returns:
            ({"input_ids", "attention_mask"} [D, L], one row per document of the batch; (b, t, d, l): the label at
            [b, t] is predicted by the teacher's position [d, l]), all on the device of ``input_ids``.
        """
        ids, wanted, uid = (x.cpu().numpy() for x in (input_ids, labels, uids))
        trained = (wanted != -100) & (uid >= 0)
        trained[:, 0] = False
        if not trained.any():  # every process takes part in a sharded teacher's forward
            one = input_ids[:1, :1]
            none = torch.zeros(0, dtype=torch.int64, device=input_ids.device)
            return {"input_ids": one, "attention_mask": torch.ones_like(one)}, (none,) * 4
        sequences: list[Tensor] = []
        joins: list[np.ndarray] = []
        for b, t in _documents(uid):
            before, begin = self.row_of(int(uid[b, t[0]]))
            t = t[(uid[b, t] & _POSITION) >= begin]
            taught = trained[b, t]
            if not taught.any():
                continue
            d, at = len(sequences), len(before) + np.arange(len(t)) - 1  # of the token before
            sequences.append(torch.cat([torch.tensor(before, dtype=torch.int64), torch.from_numpy(ids[b, t])]))
            joins.append(np.stack(np.broadcast_arrays(b, t, d, at))[:, taught])
        device = input_ids.device
        padded = pad_sequence(sequences, batch_first=True, padding_value=self.pad_token_id)
        mask = pad_sequence([torch.ones_like(sequence) for sequence in sequences], batch_first=True)
        joined = torch.from_numpy(np.concatenate(joins, axis=1)).to(device)
        return {"input_ids": padded.to(device), "attention_mask": mask.to(device)}, tuple(joined)


def read_before(join: CacheJoin | ContextJoin | None, row: Mapping[str, Any]) -> tuple[list[int], int]:
    """(ids a context teacher reads before a prepared row, where the row's own begin); ([], 0) without a context."""
    if not isinstance(join, ContextJoin):
        return [], 0
    first = next((uid for uid in row[join.column] if uid >= 0), None)
    return ([], 0) if first is None else join.row_of(first)


def _documents(uid: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(row of the batch, its columns) for each document, also where a batch holds one twice."""
    for b, line in enumerate(uid):
        (t,) = np.nonzero(line >= 0)
        ends = np.flatnonzero(np.diff(line[t]) != 1) + 1
        yield from ((b, part) for part in np.split(t, ends) if len(part))


def _before(
    context: Context, row: Mapping[str, Any], ids: list[int], labels: list[int], which: str
) -> tuple[list[int], int]:
    try:
        if {"messages", "conversations"} & {*row} and list(row["input_ids"][: len(ids)]) != list(ids):
            raise ConfigError(
                "truncation_mode is 'keep_end' and cuts this row of messages, where teacher_context would replace a "
                "question that is no longer there; use keep_start, or a larger max_length"
            )
        return context.of(row, ids, labels)
    except ConfigError as error:
        error.during(which)
        raise


def _within(values: list[int], length: int, cut: slice) -> list[int]:
    """Values of what a cut leaves, as a column of the whole row."""
    whole = np.full(length, -1, dtype=np.int64)
    whole[cut] = values
    return whole.tolist()
