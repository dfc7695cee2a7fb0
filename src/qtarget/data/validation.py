"""Refuses wrong rows before and after tokenisation; TRL trains some of them silently."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset

from qtarget.errors import ConfigError, DataError

_MASKS = ("completion_mask", "assistant_masks")
_BATCH = 10_000  # rows looked at at once
_INSTEAD_OF_CONTENT = ("tool_calls", "function_call", "reasoning_content", "thinking")


def checked_texts(dataset: Any, name: str, text_field: str) -> Any:
    """The dataset, its rows of text and messages looked at: at once, or of a stream as they come.

    Args:
        dataset: before TRL's preparation. name: what errors call it. text_field: the column of plain text.

    Raises:
        DataError: the first row whose text is no text, or whose messages are no messages.
    """
    columns = getattr(dataset, "column_names", None)
    if not columns or "input_ids" in columns or {"image", "images"} & set(columns):
        return dataset
    looked_at = _read_by_trl(columns, text_field)

    def fault(row: Mapping[str, Any]) -> str | None:
        for column in looked_at:
            if sentence := _text_fault(column, row[column]):
                return sentence
        both = {"prompt", "completion"} <= set(looked_at)
        if both and isinstance(row["prompt"], str) != isinstance(row["completion"], str):
            return (
                f"prompt is {_shown(row['prompt'])} and completion {_shown(row['completion'])}; "
                "write text in both, or messages in both"
            )
        return None

    return _refuse(dataset, name, fault, lambda: enumerate(dataset.with_format(None).select_columns(looked_at)))


def _read_by_trl(columns: Sequence[str], text_field: str) -> list[str]:
    """The columns that TRL looks into, as it chooses them: a prompt first, then messages, then text."""
    if "prompt" not in columns and {"messages", "conversations"} & set(columns):
        wanted = ["messages", "conversations"]
    else:
        wanted = ["prompt", "completion", text_field]
    return [column for column in wanted if column in columns]


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
        try:
            for number, row in suspects():
                look(row, number)
        except ValueError as error:
            # Arrow cuts field names at a NUL, and then has two of one name, which it cannot give back.
            if isinstance(error, ConfigError) or "duplicate field names" not in str(error):
                raise
            raise DataError(
                f"a row of the {name} dataset holds a mapping with two fields of one name; "
                "write texts, messages or token ids"
            ) from error
    return dataset


def _text_fault(column: str, value: Any) -> str | None:
    if isinstance(value, str) and column not in ("messages", "conversations"):
        return None
    is_value = f"{column} is {_shown(value)}"
    as_messages = f"{is_value}; write messages, as in [{{role: user, content: text}}]"
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        as_either = f"{is_value}; write text, or messages as in [{{role: user, content: text}}]"
        return as_messages if column in ("messages", "conversations") else as_either
    for message in value:
        if not isinstance(message, Mapping):
            return as_messages
        role, content = ("from", "value") if message.get("from") is not None else ("role", "content")
        if not isinstance(message.get(role), str):
            return f"{column} has a message whose role is {_shown(message.get(role))}; write user, assistant or system"
        text = message.get(content)
        instead = text is None and any(message.get(other) for other in _INSTEAD_OF_CONTENT)
        if not instead and not isinstance(text, (str, list)):
            return f"{column} has a message whose content is {_shown(text)}; write text"
    return None


def checked_tokens(dataset: Any, name: str, vocab_size: int) -> Any:
    """The dataset, its token ids and labels looked at: at once, or of a stream as they come.

    Args:
        dataset: with input_ids and perhaps labels, masks and seq_lengths; without input_ids it is left alone.
        name: what errors call it. vocab_size: real tokens of the vocabulary.

    Raises:
        DataError: the first row with an id outside the vocabulary, or as many labels as it has no ids.
    """
    have = getattr(dataset, "column_names", None) or ()
    columns = [column for column in ("input_ids", "labels", *_MASKS, "seq_lengths") if column in have]
    if "input_ids" not in columns:
        return dataset

    def fault(row: Mapping[str, Any]) -> str | None:
        return _token_fault({column: row[column] for column in columns}, vocab_size)

    def suspects() -> Iterator[tuple[int, dict[str, Any]]]:
        begin = 0
        for table in dataset.select_columns(columns).with_format("arrow").iter(batch_size=_BATCH):
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
            return f"{column} is {_shown(value)}; write a list of whole numbers, one for each token"
        value = list(value)
        most = _most(column, vocab_size)
        for number in value:
            if not isinstance(number, int) or (isinstance(number, bool) and column not in _MASKS):
                what = "0 and 1" if column in _MASKS else "token ids, whole numbers"
                return f"{column} holds {_shown(number)}; write {what}"
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


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
