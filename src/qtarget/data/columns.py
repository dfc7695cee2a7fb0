"""Numbers that travel with each token: weight, critical, old_logps, uid and the data source.

They are aligned with labels, before the shift. ``per_token`` gives every row one number per token, once and early, so
that cutting, dropping, shuffling and packing move them with their tokens; ``TokenColumnCollator`` pads or joins them as
TRL's collator does the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Number
from typing import Any

import torch

from qtarget.errors import DataError
from qtarget.targets import Target

# What a target requires → the dataset column that carries it.
COLUMN_OF = {"weight": "weight", "critical": "critical", "old_policy": "old_logps"}
# The number of a token's data source, made from the column that names it. The name is one no dataset has.
SOURCE_ID = "qtarget_source"
UID = "uid"
# A row's mean log-probability under iw-sft's reference, which then need not be loaded.
REFERENCE = "reference_logp"
_WHOLE = {SOURCE_ID, UID}  # columns of whole numbers; float32 would round a large uid
# Uids made here, for a teacher joined by token; what makes them completes the name.
_MADE_UID = "qtarget_uid_"
_LOG_PROBABILITIES = {"old_logps", REFERENCE}
_PER_TOKEN_ONLY = {"old_logps", UID}


def columns_of(*targets: Target) -> list[str]:
    """Dataset columns the targets read."""
    return columns_for(frozenset().union(*(target.requires for target in targets)))


def columns_for(requires: Iterable[str]) -> list[str]:
    """Dataset columns for what is required."""
    return [column for need, column in COLUMN_OF.items() if need in set(requires)]


def dtype_of(name: str) -> torch.dtype:
    return torch.int64 if _is_whole(name) else torch.float32


def _is_whole(name: str) -> bool:
    return name in _WHOLE or name.startswith(_MADE_UID)


@dataclass(frozen=True)
class TokenColumns:
    """Which columns of a dataset travel with the tokens.

    Attributes:
        names: weight, critical, old_logps and uid, those that are carried.
        sources: data sources in the order of their numbers; empty where there is one target for all.
        source_column: the column that names a row's source.
        made: columns that are made here and found only in datasets that were prepared before.
    """

    names: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    source_column: str = "source"
    made: tuple[str, ...] = ()

    @property
    def carried(self) -> list[str]:
        """Names in the prepared dataset and in a batch."""
        return [*self.names, *self.made, *([SOURCE_ID] if self.sources else [])]

    def of(self, dataset: Any) -> TokenColumns:
        """Those the dataset has, by its first row; a ``uid`` per token travels without being asked for."""
        first: Mapping[str, Any] = next(iter(dataset), {})
        uid = first.get(UID)
        uid_per_token = isinstance(uid, Sequence) and not isinstance(uid, str) and all(isinstance(u, int) for u in uid)
        return replace(
            self,
            names=(*(name for name in self.names if name in first), *((UID,) if uid_per_token else ())),
            sources=self.sources if self.source_column in first or SOURCE_ID in first else (),
            made=tuple(name for name in self.made if name in first),
        )

    def per_token(self, row: Mapping[str, Any], number: int, dataset_name: str) -> dict[str, list]:
        """The row's columns with one number per token.

        Raises:
            DataError: a column of another length, a NaN or negative weight, a mask that is not 0 and 1, a source
                without a target; each names the row.
        """
        columns = {}
        for name in self.names:
            try:
                columns[name] = _per_token(name, row[name], row["labels"])
            except DataError as error:
                error.during(f"row {number} of the {dataset_name} dataset")
                raise
        if self.sources and SOURCE_ID not in row:
            source = row[self.source_column]
            if str(source) not in self.sources:
                raise DataError(
                    f"row {number} of the {dataset_name} dataset: {self.source_column} is {source!r}, which targets does "
                    f"not name; add it there (it has {', '.join(self.sources)})"
                )
            columns[SOURCE_ID] = [self.sources.index(str(source))] * len(row["input_ids"])
        return columns


def _per_token(name: str, value: Any, labels: Sequence[int]) -> list:
    """One number per token. What stands at a token that is not trained is not looked at; NaN or None there becomes 0."""
    if isinstance(value, (Number, bool)) or value is None:
        if name in _PER_TOKEN_ONLY:
            raise DataError(f"column {name} holds {value!r} for a whole row; it needs one number per token")
        value = [value] * len(labels)
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise DataError(f"column {name} holds {value!r}; give one number per input_id, or one number per row")
    value = list(value)
    if len(value) != len(labels):
        raise DataError(
            f"column {name} has {len(value)} numbers for {len(labels)} tokens; give one per input_id (pre-tokenised "
            "rows), or one number per row"
        )
    if _is_whole(name):
        if odd := [number for number in value if isinstance(number, bool) or not isinstance(number, int)]:
            raise DataError(f"column {name} holds {odd[0]!r}; it identifies tokens, so use whole numbers")
        return value
    return [_checked(name, number, label != -100) for number, label in zip(value, labels, strict=True)]


def _is_finite(number: Any) -> bool:
    try:
        return isinstance(number, Number) and math.isfinite(float(number))  # type: ignore[arg-type]
    except OverflowError:  # a whole number beyond what a float holds
        return False


def _checked(name: str, number: Any, trained: bool) -> float:
    finite = _is_finite(number)
    if not trained:
        return float(number) if finite else 0.0
    if not finite:
        raise DataError(f"column {name} holds {number!r} at a supervised token; every number must be finite")
    if name == "weight" and number < 0:
        raise DataError(f"column weight holds {number:g}; weights must be 0 or more")
    if name in _LOG_PROBABILITIES and number > 1e-3:  # a little more than rounding makes of 0
        raise DataError(f"column {name} holds {number:g}; a log-probability is 0 or less: write log p, not p or −log p")
    if name == "critical" and number not in (0, 1):
        raise DataError(f"column critical holds {number!r}; it is a mask of tokens, use 0 and 1")
    return float(number)


@dataclass
class TokenColumnCollator:
    """A collator that also carries the columns, padded or joined as the tokens are.

    Args:
        inner: the collator of everything else.
        names: columns to carry; a row without one of them is given none.
        gather: further columns of a batch, from those it has: a cached teacher's.
    """

    inner: Callable[[list], dict]
    names: Sequence[str] = field(default_factory=list)
    gather: Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        for given in examples:  # each alone, where preparation was skipped: padded together they may be as long
            ids = given.get("input_ids", [])
            if len(given.get("labels", ids)) != len(ids):
                raise DataError(f"a row has {len(given['labels'])} labels for {len(ids)} input_ids; give one for each")
        batch = self.inner([{k: v for k, v in row.items() if k not in self.names} for row in examples])
        here = [name for name in self.names if all(_is_ours(name, row) for row in examples)]
        if not here:
            return batch
        places = _places(batch["input_ids"], [example["input_ids"] for example in examples])
        for name in here:
            nothing = -1 if name.startswith(_MADE_UID) else 0
            batch[name] = padded = torch.full(batch["input_ids"].shape, nothing, dtype=dtype_of(name))
            for (row, begin), example in zip(places, examples, strict=True):
                values = example[name]
                length = len(example["input_ids"])
                if not isinstance(values, list) or len(values) != length:  # where preparation was skipped
                    values = _per_token(name, values, example.get("labels", [0] * length))
                padded[row, begin : begin + len(values)] = torch.as_tensor(values, dtype=padded.dtype)
        if self.gather is not None:
            batch.update(self.gather(batch))
        return batch


def _is_ours(name: str, row: Mapping[str, Any]) -> bool:
    """Whether the row has the column; a ``uid`` of another kind, say a name of the row, is the user's own."""
    return name in row and (name != UID or isinstance(row[name], (list, torch.Tensor)))


def _places(ids: torch.Tensor, rows: list) -> list[tuple[int, int]]:
    """Where the batch holds each row's first token: a row of its own, or one after the other in a single row."""
    if len(ids) == len(rows):
        places = [(number, 0) for number in range(len(rows))]
    else:
        places = [(0, sum(map(len, rows[:number]))) for number in range(len(rows))]
    for (row, begin), own in zip(places, rows, strict=True):
        if row >= len(ids) or ids[row, begin : begin + len(own)].tolist() != list(own):
            raise DataError(
                "the data collator moved or changed the tokens of a row, so its columns no longer match them; pad on "
                "the right, one row per example"
            )
    return places
