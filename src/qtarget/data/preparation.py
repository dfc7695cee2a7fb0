"""Cuts, drops, shuffles and packs tokenised rows, with all their columns alike.

TRL cuts and packs input_ids and labels and leaves every other column behind, so these steps are done here, in TRL's
order and with TRL's packing, for all columns alike; without columns the result is TRL's own, row by row.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from datasets import Dataset
from trl.data_utils import get_dataset_column_names, pack_dataset

from qtarget.data.columns import TokenColumns
from qtarget.errors import ConfigError, DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preparation:
    """How rows are cut and packed; the fields are SFTConfig's.

    ``join`` marks tokens for a teacher that is not joined to them by position; see ``qtarget.teachers.joins``.
    """

    max_length: int | None
    truncation_mode: str
    packing: bool
    packing_strategy: str
    shuffle: bool
    seed: int
    num_proc: int | None
    columns: TokenColumns = field(default_factory=TokenColumns)
    join: Any = None

    def __call__(self, dataset: Any, name: str, report: dict[str, int]) -> Any:
        """The rows ready for the collator.

        Args:
            dataset: Dataset or IterableDataset with input_ids and labels. name: what errors call it.
            report: gets, under ``name``, how many rows have no supervised token left.
        """
        columns = self.columns.of(dataset)
        if columns.names or columns.sources:
            dataset = dataset.map(
                lambda row, number: columns.per_token(row, number, name),
                with_indices=True,
                **self._map("Spreading columns of", name, dataset),
            )
        dataset, columns = self._mark(dataset, name, columns)
        if self.packing and "seq_lengths" not in get_dataset_column_names(dataset):  # else it is packed already
            _tell_untrained(dataset, name, None if self._splits else self.max_length, report)
            dataset = self._pack(dataset.select_columns(["input_ids", "labels", *columns.carried]), name)
        elif self.max_length is not None and not self.packing:
            dataset = self._cut(dataset, ["input_ids", "labels", *columns.carried], name, report)
        else:
            _tell_untrained(dataset, name, None, report)
        return dataset.shuffle(seed=self.seed) if self.shuffle else dataset

    def _mark(self, dataset: Any, name: str, columns: TokenColumns) -> tuple[Any, TokenColumns]:
        """The dataset with its tokens' uids, and its columns; a dataset marked before is left as it is."""
        if self.join is None or self.join.column in columns.made:
            return dataset, columns
        if "seq_lengths" in get_dataset_column_names(dataset):
            raise DataError(
                f"the {name} dataset is packed already (column seq_lengths), so its teacher cannot be found row by "
                "row; give the unpacked rows and set packing: true"
            )
        dataset = self.join.mark(dataset, name, self.seen, **self._map("Finding the teacher for", name, dataset))
        return dataset, replace(columns, made=(self.join.column,))

    @property
    def seen(self) -> slice:
        """The part of a row that the model sees."""
        if self.max_length is None or (self.packing and self._splits):
            return slice(None)
        if self.packing or self.truncation_mode == "keep_start":
            return slice(None, self.max_length)
        return slice(-self.max_length, None)

    def _cut(self, dataset: Any, carried: list[str], name: str, report: dict[str, int]) -> Any:
        if self.truncation_mode not in ("keep_start", "keep_end"):
            raise ConfigError(f"truncation_mode is {self.truncation_mode!r}; use 'keep_start' or 'keep_end'")
        cut = self.seen
        dataset = dataset.map(
            lambda row: {column: row[column][cut] for column in carried}, **self._map("Truncating", name, dataset)
        )
        if not isinstance(dataset, Dataset):
            return dataset.filter(_TellingFilter(name, report))
        kept = dataset.filter(_is_trained, **self._map("Dropping fully masked rows of", name, dataset))
        report[name] = len(dataset) - len(kept)
        if report[name]:
            logger.warning("%s; they are dropped", _untrained(report[name], len(dataset), name))
        return kept

    @property
    def _splits(self) -> bool:
        """Whether a row longer than max_length goes on in the next one, so that nothing is cut."""
        return self.packing_strategy != "bfd"

    def _pack(self, dataset: Any, name: str) -> Any:
        if self.max_length is None:
            raise ConfigError("packing is on and max_length is None; set max_length to the length of a packed sequence")
        if self.shuffle:  # before packing too, as TRL does: neighbours would stay neighbours
            dataset = dataset.shuffle(seed=self.seed)
        return pack_dataset(dataset, self.max_length, self.packing_strategy, self._map("Packing", name, dataset))

    def _map(self, what: str, name: str, dataset: Any) -> dict[str, Any]:
        """Arguments for ``map``; an IterableDataset takes neither processes nor a description."""
        if not isinstance(dataset, Dataset):
            return {}
        return {"num_proc": self.num_proc, "desc": f"{what} {name} dataset"}


def _is_trained(row: Mapping[str, Any]) -> bool:
    return any(label != -100 for label in row["labels"])


def _untrained(count: int, rows: int, name: str) -> str:
    return (
        f"{count} of {rows} rows of the {name} dataset have no supervised token left: all are cut at max_length or "
        "masked from the start"
    )


def _tell_untrained(dataset: Any, name: str, max_length: int | None, report: dict[str, int]) -> None:
    """Count rows that will teach nothing where none is dropped; a stream is not read ahead for it."""
    if not isinstance(dataset, Dataset):
        return
    rows = dataset.select_columns(["labels"])
    report[name] = sum(not _is_trained({"labels": row["labels"][:max_length]}) for row in rows)
    if report[name]:
        logger.warning("%s; they teach nothing", _untrained(report[name], len(dataset), name))


class _TellingFilter:
    """``_is_trained`` for a stream, which has no end at which to tell: it tells at 1, 10, 100, ... rows."""

    def __init__(self, name: str, report: dict[str, int]):
        self.name, self.report, self.rows = name, report, 0
        report[name] = 0

    def __call__(self, row: Mapping[str, Any]) -> bool:
        self.rows += 1
        trained = _is_trained(row)
        if not trained:
            self.report[self.name] = count = self.report[self.name] + 1
            if str(count).strip("0") == "1":
                logger.warning("%s so far; they are dropped", _untrained(count, self.rows, self.name))
        return trained
