"""Refuses wrong rows before and after tokenisation; TRL trains some of them silently."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from trl.data_utils import get_dataset_column_names

from qtarget.data.messages import shown
from qtarget.errors import ConfigError, DataError

_MASKS = ("completion_mask", "assistant_masks", "attention_mask")
# Columns of one number per token; they mean something beside input_ids alone.
TOKEN_COLUMNS = ("labels", *_MASKS, "seq_lengths")
_BATCH = 10_000  # rows looked at at once


def _refuse(
    dataset: Any,
    name: str,
    fault: Callable[[Mapping[str, Any]], str | None],
    suspects: Callable[[], Iterable[tuple[int, Mapping[str, Any]]]],
) -> Any:
    """Raise at the first row with a fault: at once, among the numbered ``suspects``, or of a stream as they come."""

    def look(row: Mapping[str, Any], number: int) -> Mapping[str, Any]:
        if sentence := fault(row):
            raise DataError(f"row {number} of the {name} dataset: {sentence}")
        return row

    if isinstance(dataset, IterableDataset):
        return dataset.map(look, with_indices=True)
    if isinstance(dataset, Dataset):
        with readable(name):
            for number, row in suspects():
                look(row, number)
    return dataset


@contextlib.contextmanager
def readable(name: str) -> Iterator[None]:
    """Arrow cuts field names at a NUL, and then has two of one name, which it cannot give back: one sentence."""
    try:
        yield
    except ValueError as error:
        if isinstance(error, ConfigError) or "duplicate field names" not in str(error):
            raise
        raise DataError(
            f"a row of the {name} dataset holds a mapping with two fields of one name; write texts, messages or token ids"
        ) from error


def checked_tokens(dataset: Any, name: str, vocab_size: int) -> Any:
    """The dataset, its token ids and labels looked at: at once, or of a stream as they come.

    Args:
        dataset: with input_ids and perhaps labels, masks and seq_lengths; without input_ids it is left alone.
        name: what errors call it. vocab_size: real tokens of the vocabulary.

    Raises:
        DataError: the first row with an id outside the vocabulary, or as many labels as it has no ids.
    """
    have = get_dataset_column_names(dataset)
    columns = [column for column in ("input_ids", *TOKEN_COLUMNS) if column in have]
    if "input_ids" not in columns:
        return dataset

    def fault(row: Mapping[str, Any]) -> str | None:
        return _token_fault({column: row[column] for column in columns}, vocab_size)

    def suspects() -> Iterator[tuple[int, dict[str, Any]]]:
        begin = 0
        for table in _tables(dataset, columns):
            if not _all_right({column: table[column].combine_chunks() for column in columns}, vocab_size):
                for number in range(len(table)):
                    yield begin + number, {column: table[column][number].as_py() for column in columns}
            begin += len(table)

    return _refuse(dataset, name, fault, suspects)


def without_tokens(dataset: Any, name: str, tokens: Mapping[int, str], why: str) -> Any:
    """The dataset, whose input_ids may hold none of ``tokens`` (id → token): at once, or of a stream as they come.

    Raises:
        DataError: the first row that holds one, with ``why``.
    """
    if not tokens or "input_ids" not in (getattr(dataset, "column_names", None) or ["input_ids"]):
        return dataset

    def fault(row: Mapping[str, Any]) -> str | None:
        held = next((index for index in row["input_ids"] if index in tokens), None)
        return None if held is None else f"it holds {tokens[held]!r} (id {held}), {why}"

    def suspects() -> Iterator[tuple[int, dict[str, Any]]]:
        begin, wanted = 0, pa.array([*tokens])
        for table in dataset.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=_BATCH):
            ids = table["input_ids"].combine_chunks()
            if pc.any(pc.is_in(ids.flatten(), wanted.cast(ids.type.value_type))).as_py():
                yield from enumerate(({"input_ids": row} for row in ids.to_pylist()), begin)
            begin += len(table)

    return _refuse(dataset, name, fault, suspects)


def _all_right(columns: dict[str, Any], vocab_size: int) -> bool:
    """Whether a batch has nothing that ``_token_fault`` would name, without making Python numbers of it."""
    lengths = None
    for name, column in columns.items():
        kind = column.type
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_integer(kind.value_type):
            return False
        numbers = column.flatten()
        if column.null_count or numbers.null_count:
            return False
        if name == "labels":  # ignored labels are no ids
            numbers = numbers.filter(pc.not_equal(numbers, -100))
        ends, most = pc.min_max(numbers).as_py(), _most(name, vocab_size)
        if ends["min"] is not None and (ends["min"] < 0 or (most is not None and ends["max"] > most)):
            return False
        if name == "seq_lengths":  # their sums are the length
            sums = np.concatenate([[0], np.cumsum(numbers.to_numpy(zero_copy_only=False))])
            ends_at = np.cumsum(pc.list_value_length(column).to_numpy(zero_copy_only=False))
            own = pa.array(np.diff(sums[np.concatenate([[0], ends_at])]))
        else:
            own = pc.list_value_length(column)
        if lengths is not None and not pc.all(pc.equal(lengths, own)).as_py():
            return False
        lengths = own
    return True


def _most(column: str, vocab_size: int) -> int | None:
    return 1 if column in _MASKS else None if column == "seq_lengths" else vocab_size - 1


def _token_fault(row: Mapping[str, Any], vocab_size: int) -> str | None:
    length = None
    for column, value in row.items():
        if not isinstance(value, Iterable) or isinstance(value, str):
            return f"{column} is {shown(value)}; write a list of whole numbers, one for each token"
        value = list(value)
        most = _most(column, vocab_size)
        for number in value:
            if not isinstance(number, int) or (isinstance(number, bool) and column not in _MASKS):
                what = "0 and 1" if column in _MASKS else "token ids, whole numbers"
                return f"{column} holds {shown(number)}; write {what}"
            if number >= 0 and (most is None or number <= most):
                continue
            if column in _MASKS:
                return f"{column} holds {number}; write 0 and 1"
            if column != "labels" or number != -100:
                ignored = ", or -100 for positions that are not trained" if column == "labels" else ""
                return (
                    f"{column} holds {number}, outside the vocabulary of {vocab_size}; use ids from 0 to "
                    f"{vocab_size - 1}{ignored}"
                )
        if column == "seq_lengths":
            if sum(value) != length:
                return f"seq_lengths sum to {sum(value)} for {length} input_ids; give the length of each document"
        elif length is not None and len(value) != length:
            return f"{column} has {len(value)} entries for {length} input_ids; give one for each"
        length = len(value) if length is None else length
    return None


def without_padding(dataset: Any, name: str, columns: Iterable[str], num_proc: int | None) -> Any:
    """Rows of token ids without what ``attention_mask`` hides at their ends: batches show every token of a row.

    Args:
        columns: of one number per token, beside ``input_ids`` and ``TOKEN_COLUMNS``; checked by ``checked_tokens``.

    Raises:
        DataError: a token is hidden between others, or in a packed row.
    """
    have = get_dataset_column_names(dataset)
    if not {"input_ids", "attention_mask"} <= {*have}:
        return dataset
    cut = [column for column in ("input_ids", *TOKEN_COLUMNS, *columns) if column in have]

    def shorter(row: Mapping[str, Any], number: int) -> dict[str, Any]:
        mask = [bool(shows) for shows in row["attention_mask"]]
        begin, end = (mask.index(True), len(mask) - mask[::-1].index(True)) if any(mask) else (0, 0)
        if not all(mask[begin:end]) or ("seq_lengths" in row and not all(mask)):
            raise DataError(
                f"row {number} of the {name} dataset: attention_mask hides token {mask.index(False, begin)} between "
                "others, but batches would show it; remove it from the row, or give it the label -100 instead"
            )
        return {
            column: row[column][begin:end]
            for column in cut
            if isinstance(row[column], Sized) and not isinstance(row[column], str) and len(row[column]) == len(mask)
        }

    if isinstance(dataset, IterableDataset):
        return dataset.map(shorter, with_indices=True)
    hides = (
        pc.min(table["attention_mask"].combine_chunks().flatten()) for table in _tables(dataset, ["attention_mask"])
    )
    if all(least.as_py() in (None, 1) for least in hides):
        return dataset
    return dataset.map(shorter, with_indices=True, num_proc=num_proc, desc=f"Removing padding from {name} dataset")


def _tables(dataset: Dataset, columns: list[str]) -> Iterator[pa.Table]:
    yield from dataset.select_columns(columns).with_format("arrow").iter(batch_size=_BATCH)
