"""The folder that a capture leaves: three Parquet files and a manifest (docs/lens.md).

    manifest.json     format, model, teacher, reference, tokenizer, settings, counts
    rows.parquet      a line per row:   row, input_ids, supervised
    tokens.parquet    a line per supervised token, see ``TOKEN_COLUMNS``
    vocab.parquet     a line per id that occurs:   id, text, special

A token's ``ids`` are the union of the k likeliest tokens of student, teacher and reference and the label; every model's
log-probabilities stand at all of them, and what is left over is its tail.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, NotRequired

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, with_config
from typing_extensions import TypedDict

from qtarget import files
from qtarget.errors import StorageError, reason

FORMAT = 1
OTHERS = ("teacher", "reference")
SIGNALS = ("weight", "critical", "old_logps")
_ROWS, _TOKENS, _VOCAB = FILES = ("rows.parquet", "tokens.parquet", "vocab.parquet")
# A log-probability may be above 0 by rounding.
_ROUNDING = 0.01

Count = Annotated[int, Field(ge=0)]


@with_config(**files.CLOSED)
class Manifest(TypedDict):
    """``manifest.json``: who was captured, of what vocabulary, with which settings, and how much there is."""

    format: int
    program: str
    model: str
    teacher: str | None
    reference: str | None
    target: Any
    run_targets: NotRequired[dict[str, Any]]
    vocab_size: Annotated[int, Field(ge=1)]
    top_k: Annotated[int, Field(ge=1)]
    max_length: int | None
    tokenizer: str
    chat_template: str | None
    eos_token_ids: list[int]
    dataset: NotRequired[str | None]
    split: NotRequired[str]
    rows: Count
    tokens: Count


ROW_SCHEMA = pa.schema([("row", pa.int32()), ("input_ids", pa.list_(pa.int32())), ("supervised", pa.list_(pa.bool_()))])
VOCAB_SCHEMA = pa.schema([("id", pa.int32()), ("text", pa.string()), ("special", pa.bool_())])


def token_schema(others: Iterable[str] = (), signals: Iterable[str] = ()) -> pa.Schema:
    """Columns of tokens.parquet.

    row, position: the label is ``input_ids[position]`` of that row. rank: of the label, 0 is the likeliest.
    entropy: of the student, nats. ids: see the module. student: log-probabilities at ``ids``; student_tail: log of the
    mass outside them; student_floor: log-probability of the k-th likeliest token, which none outside exceeds. The same
    for teacher and reference, with their log-probability of the label. weight, critical, old_logps: the dataset's.
    """
    fields = [
        ("row", pa.int32()),
        ("position", pa.int32()),
        ("label", pa.int32()),
        ("log_p_y", pa.float32()),
        ("rank", pa.int32()),
        ("entropy", pa.float32()),
        ("ids", pa.list_(pa.int32())),
    ]
    for model in ("student", *others):
        fields += [(model, pa.list_(pa.float32())), (f"{model}_tail", pa.float32()), (f"{model}_floor", pa.float32())]
    fields += [(f"{model}_log_p_y", pa.float32()) for model in others]
    fields += [(name, pa.float32()) for name in signals]
    return pa.schema(fields)


@dataclass
class Record:
    """A capture in memory.

    Attributes:
        manifest: what was captured, by whom.
        rows: [{row, input_ids, supervised}].
        tokens: column → list, in order of row and position.
        vocab: id → (text, whether it is a special token).
    """

    manifest: dict[str, Any]
    rows: list[dict[str, Any]]
    tokens: dict[str, list]
    vocab: dict[int, tuple[str, bool]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens["row"])

    @property
    def others(self) -> tuple[str, ...]:
        """Of teacher and reference, those that were captured."""
        return tuple(name for name in OTHERS if name in self.tokens)

    @property
    def signals(self) -> tuple[str, ...]:
        """Of weight, critical and old_logps, those the dataset had."""
        return tuple(name for name in SIGNALS if name in self.tokens)

    @property
    def vocab_size(self) -> int:
        """Tokens of the real vocabulary."""
        return self.manifest["vocab_size"]

    def padded(self, name: str, fill: float) -> np.ndarray:
        """[tokens, widest] of a column of lists, float64 or int64, ``fill`` behind each list's end."""
        lists = self.tokens[name]
        width = max((len(values) for values in lists), default=0)
        dtype = np.int64 if name == "ids" else np.float64
        out = np.full((len(lists), width), fill, dtype=dtype)
        for line, values in zip(out, lists, strict=True):
            line[: len(values)] = values
        return out

    def numbers(self, name: str) -> np.ndarray:
        """[tokens] of a column of numbers, float64."""
        return np.asarray(self.tokens[name], dtype=np.float64)


class Writer:
    """Writes a record as it comes, row after row, so that nothing but the present batch is in memory."""

    def __init__(self, folder: str | Path, others: Iterable[str], signals: Iterable[str]):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        schema = token_schema(others, signals)
        self._tokens = pq.ParquetWriter(self.folder / _TOKENS, schema, compression="zstd")
        self._rows = pq.ParquetWriter(self.folder / _ROWS, ROW_SCHEMA, compression="zstd")
        self.used: set[int] = set()
        self.counts = {"rows": 0, "tokens": 0}

    def add(self, rows: list[dict[str, Any]], tokens: dict[str, list]) -> None:
        self._rows.write_table(pa.Table.from_pylist(rows, schema=ROW_SCHEMA))
        self._tokens.write_table(pa.Table.from_pydict(tokens, schema=self._tokens.schema))
        self.counts["rows"] += len(rows)
        self.counts["tokens"] += len(tokens["row"])
        self.used.update(*(row["input_ids"] for row in rows), *tokens["ids"])

    def close(self, manifest: dict[str, Any], text_of: Any, special: Iterable[int]) -> None:
        """Write the vocabulary and, last of all, the manifest: a folder without one is not a record."""
        self._rows.close()
        self._tokens.close()
        ids, special = sorted(self.used), set(special)
        table = pa.Table.from_pydict(
            {"id": ids, "text": [text_of(i) for i in ids], "special": [i in special for i in ids]}, schema=VOCAB_SCHEMA
        )
        pq.write_table(table, self.folder / _VOCAB, compression="zstd")
        files.write_json(self.folder / "manifest.json", {"format": FORMAT, **manifest, **self.counts})


def read(folder: str | Path) -> Record:
    """A record from its folder.

    Raises:
        StorageError: no record there, one of another format, a truncated or foreign file, or no token in it.
    """
    folder = Path(folder)
    if not (folder / "manifest.json").is_file():
        raise StorageError(
            f"{str(folder)!r} is not a capture: it has no manifest.json; make one with qtarget lens capture"
        )
    manifest: dict[str, Any] = files.load(folder / "manifest.json", Manifest, "capture again", FORMAT)
    rows, tokens, vocab = (_table(folder / name) for name in FILES)
    texts = {line["id"]: (line["text"], line["special"]) for line in vocab.to_pylist()}
    record = Record(manifest, rows.to_pylist(), tokens.to_pydict(), texts)
    if len(record) != manifest["tokens"] or len(record.rows) != manifest["rows"]:
        raise StorageError(
            f"{folder} holds {len(record)} tokens in {len(record.rows)} rows, but its manifest says "
            f"{manifest['tokens']} in {manifest['rows']}; it was cut short: capture again"
        )
    if not len(record):
        raise StorageError(f"{folder} holds no supervised token; capture rows that have some")
    if fault := _impossible_value(record):
        file, what = fault
        raise StorageError(
            f"{folder / file}: {what}; it was not captured by this program, or was changed: capture again"
        )
    return record


def _table(file: Path) -> pa.Table:
    """A table of the capture, with the types it was written with."""
    try:
        table = pq.read_table(file)
        names = set(table.column_names)  # ValueError: one that is not UTF-8
    except (OSError, ValueError, pa.ArrowException) as error:
        raise StorageError(f"{file} cannot be read ({reason(error)}); capture again: qtarget lens capture") from None
    tokens = token_schema([name for name in OTHERS if name in names], [name for name in SIGNALS if name in names])
    schema = {_ROWS: ROW_SCHEMA, _VOCAB: VOCAB_SCHEMA}.get(file.name, tokens)
    if missing := sorted({*schema.names} - names):
        raise StorageError(f"{file} lacks the columns {', '.join(missing)}; it was not captured by this program")
    columns = []
    for wanted in schema:
        try:
            column = table[wanted.name].combine_chunks().cast(wanted.type)
        except pa.ArrowException as error:
            raise StorageError(
                f"{file}: column {wanted.name} holds no {wanted.type} ({reason(error)}); it was not captured by this "
                "program"
            ) from None
        if column.null_count or (pa.types.is_list(wanted.type) and column.flatten().null_count):
            raise StorageError(f"{file}: column {wanted.name} holds null; it was not captured by this program")
        columns.append(column)
    return pa.Table.from_arrays(columns, schema=schema)


def rows_of(record: Record) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """Each row with the numbers of its tokens."""
    tokens_of = defaultdict[int, list[int]](list)
    for number, row in enumerate(record.tokens["row"]):
        tokens_of[row].append(number)
    for row in record.rows:
        yield row, tokens_of[row["row"]]


# -- could its numbers come from a model? --------------------------------------------------------------------------


def _impossible_value(record: Record) -> tuple[str, str] | None:
    """(file, what is wrong), or None, of numbers that come from no model: the file may be a stranger's, or edited."""
    tokens, vocab_size = record.tokens, record.vocab_size
    lengths = np.asarray([len(ids) for ids in tokens["ids"]])
    flat = np.fromiter(chain.from_iterable(tokens["ids"]), np.int64, int(lengths.sum()))
    labels, token_of = np.asarray(tokens["label"]), np.repeat(np.arange(len(lengths)), lengths)
    for name, ids in (("label", labels), ("ids", flat)):
        if len(ids) and not (ids.min() >= 0 and ids.max() < vocab_size):
            bad = ids[(ids < 0) | (ids >= vocab_size)][0]
            return _TOKENS, f"{name} holds {bad}, outside the vocabulary of {vocab_size}"
    found = np.zeros(len(labels), bool)
    found[token_of[flat == labels[token_of]]] = True
    if not found.all():
        return _TOKENS, f"label {labels[~found][0]} is not among the ids of its token"
    for model in ("student", *record.others):
        if not np.array_equal([len(values) for values in tokens[model]], lengths):
            return _TOKENS, f"{model} has a different number of log-probabilities and ids"
        for name in (model, f"{model}_tail", f"{model}_floor"):
            numbers = np.asarray([*chain.from_iterable(tokens[name])] if name == model else tokens[name], np.float64)
            if np.isnan(numbers).any() or (len(numbers) and numbers.max() > _ROUNDING):
                return _TOKENS, f"{name} holds {numbers.max()}; a log-probability is 0 or less"
    if not np.isfinite(np.asarray(tokens["entropy"], np.float64)).all():
        return _TOKENS, "entropy holds NaN or infinity"
    return _places(record) or _texts(record)


def _places(record: Record) -> tuple[str, str] | None:
    for row in record.rows:
        if len(row["supervised"]) != len(row["input_ids"]):
            return _ROWS, f"row {row['row']} has {len(row['supervised'])} marks for {len(row['input_ids'])} input_ids"
    length_of = {row["row"]: len(row["input_ids"]) for row in record.rows}
    for row, position in zip(record.tokens["row"], record.tokens["position"], strict=True):
        if row not in length_of:
            return _TOKENS, f"row holds {row}, which {_ROWS} does not have"
        if not 0 < position < length_of[row]:
            return _TOKENS, f"position holds {position} for a row of {length_of[row]} tokens"
    return None


def _texts(record: Record) -> tuple[str, str] | None:
    used = set(chain.from_iterable(row["input_ids"] for row in record.rows))
    missing = min(used - record.vocab.keys(), default=None)
    return None if missing is None else (_VOCAB, f"it has no text for id {missing}")
