"""What a row must look like before it is tokenised, and after: TRL trains some of what it should refuse, silently."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset

from qtarget.errors import ConfigError

_BATCH = 10_000  # rows looked at at once
_INSTEAD_OF_CONTENT = ("tool_calls", "function_call", "reasoning_content", "thinking")


def checked_texts(dataset: Any, name: str, text_field: str) -> Any:
    """The dataset, its rows of text and messages looked at: at once, or of a stream as they come.

    Args:
        dataset: before TRL's preparation. name: what errors call it. text_field: the column of plain text.

    Raises:
        ConfigError: the first row whose text is no text, or whose messages are no messages.
    """
    columns = getattr(dataset, "column_names", None)
    if not columns or "input_ids" in columns or {"image", "images"} & set(columns):
        return dataset
    looked_at = [
        column for column in ("messages", "conversations", "prompt", "completion", text_field) if column in columns
    ]

    def look(row: Mapping[str, Any], number: int) -> None:
        for column in looked_at:
            if fault := _text_fault(column, row[column]):
                raise ConfigError(f"row {number} of the {name} dataset: {fault}")
        if {"prompt", "completion"} <= set(looked_at) and isinstance(row["prompt"], str) != isinstance(
            row["completion"], str
        ):
            raise ConfigError(
                f"row {number} of the {name} dataset: prompt is {_shown(row['prompt'])} and completion "
                f"{_shown(row['completion'])}; write text in both, or messages in both"
            )

    if isinstance(dataset, Dataset):
        for number, row in enumerate(dataset.select_columns(looked_at)):
            look(row, number)
        return dataset
    if isinstance(dataset, IterableDataset):
        return dataset.map(lambda row, number: look(row, number) or row, with_indices=True)
    return dataset


def _text_fault(column: str, value: Any) -> str | None:
    if isinstance(value, str) and column not in ("messages", "conversations"):
        return None
    told = f"{column} is {_shown(value)}"
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        what = "messages" if column in ("messages", "conversations") else "text, or messages"
        return f"{told}; write {what}" + (", as in [{role: user, content: text}]" if "messages" in what else "")
    for message in value:
        if not isinstance(message, Mapping):
            return f"{told}; write messages, as in [{{role: user, content: text}}]"
        role, content = ("from", "value") if message.get("from") is not None else ("role", "content")
        if not isinstance(message.get(role), str):
            return f"{column} has a message whose role is {_shown(message.get(role))}; write user, assistant or system"
        said = message.get(content)
        if said is None and any(message.get(other) for other in _INSTEAD_OF_CONTENT):
            continue
        if not isinstance(said, (str, list)):
            return f"{column} has a message whose content is {_shown(said)}; write text"
    return None


def checked_tokens(dataset: Any, name: str, vocab_size: int) -> Any:
    """The dataset, its token ids and labels looked at: at once, or of a stream as they come.

    Args:
        dataset: with input_ids and perhaps labels. vocab_size: real tokens of the vocabulary.

    Raises:
        ConfigError: the first row with an id outside the vocabulary, or as many labels as it has no ids.
    """
    columns = [column for column in ("input_ids", "labels") if column in (getattr(dataset, "column_names", None) or ())]
    if not columns:
        return dataset

    def look(row: Mapping[str, Any], number: int) -> None:
        if fault := _token_fault([(column, row[column]) for column in columns], vocab_size):
            raise ConfigError(f"row {number} of the {name} dataset: {fault}")

    if isinstance(dataset, Dataset):
        begin = 0
        for table in dataset.select_columns(columns).with_format("arrow").iter(batch_size=_BATCH):
            if not _all_right([table[column].combine_chunks() for column in columns], vocab_size):
                for number in range(len(table)):
                    look({column: table[column][number].as_py() for column in columns}, begin + number)
            begin += len(table)
        return dataset
    if isinstance(dataset, IterableDataset):
        return dataset.map(lambda row, number: look(row, number) or row, with_indices=True)
    return dataset


def _all_right(columns: list[Any], vocab_size: int) -> bool:
    """Whether a batch has nothing that ``_token_fault`` would name, without making Python numbers of it."""
    for place, column in enumerate(columns):
        kind = column.type
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_integer(kind.value_type):
            return False
        numbers = column.flatten()
        if column.null_count or numbers.null_count:
            return False
        if place:  # ignored labels are no ids
            numbers = numbers.filter(pc.not_equal(numbers, -100))
        ends = pc.min_max(numbers).as_py()
        if ends["min"] is not None and (ends["min"] < 0 or ends["max"] >= vocab_size):
            return False
    lengths = [pc.list_value_length(column) for column in columns]
    return len(lengths) < 2 or bool(pc.all(pc.equal(*lengths)).as_py() in (True, None))


def _token_fault(columns: Iterable[tuple[str, Any]], vocab_size: int) -> str | None:
    length = None
    for column, value in columns:
        labels = column == "labels"
        if not isinstance(value, Iterable) or isinstance(value, str):
            return f"{column} is {_shown(value)}; write a list of token ids"
        value = list(value)
        for number in value:
            if isinstance(number, bool) or not isinstance(number, int):
                return f"{column} holds {_shown(number)}; write token ids, whole numbers"
            if not 0 <= number < vocab_size and not (labels and number == -100):
                ignored = ", or -100 for positions that are not trained" if labels else ""
                return (
                    f"{column} holds {number}, outside the vocabulary of {vocab_size}; use ids from 0 to "
                    f"{vocab_size - 1}{ignored}"
                )
        if length is not None and len(value) != length:
            return f"labels has {len(value)} entries for {length} input_ids; give one for each, -100 where nothing is trained"
        length = len(value)
    return None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
