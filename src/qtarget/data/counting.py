"""Counts what tokenised rows will train into a picture, without reading a row twice."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from qtarget.data import roles
from qtarget.data.messages import RowReader
from qtarget.data.picture import LISTED, End, Picture, special_tokens
from qtarget.data.text import text_of

# Rows whose roles are looked up, and rows of a stream that are read: of the rest, cheap things alone are counted.
SAMPLE = 256
_BATCH = 1000  # rows at a time


@dataclass(frozen=True)
class Source:
    """Tokenised rows before they are cut, and what will be done to them.

    Attributes:
        dataset: with input_ids, labels and the columns that they were made of. tokenizer: of text.
        stops: ids at which the saved model will stop generating.
        seen: the part of a row that the model sees. drops: whether rows without a trained token are left out.
        split: length at which a longer row goes on in another sequence; None: it does not.
        as_tokens: whether the rows came as token ids. reader: of raw rows, where one read them.
        chat_template: in place of the tokenizer's.
        assistant_only: whether assistants' tokens alone are trained. completion_only: completions alone.
    """

    dataset: Any
    tokenizer: Any
    stops: Collection[int] = ()
    seen: slice = field(default_factory=lambda: slice(None))
    drops: bool = False
    split: int | None = None
    as_tokens: bool = False
    reader: RowReader | None = None
    chat_template: str | None = None
    assistant_only: bool = False
    completion_only: bool = False


def of(source: Source) -> Picture:
    """Count. Reads the whole dataset, or the first rows of a stream."""
    dataset, tokenizer = source.dataset, source.tokenizer
    names = ["input_ids", "labels", "seq_lengths", "completion_mask"]
    whole = isinstance(dataset, Dataset)
    first = list(itertools.islice(dataset.with_format(None), SAMPLE))
    names = [name for name in names if first and name in first[0]]
    picture = Picture(of_stream=not whole, as_tokens=source.as_tokens, _tokenizer=tokenizer)
    picture.stops = [text_of(tokenizer, token) for token in sorted(source.stops)]
    if not first:
        return picture
    rows = dataset if whole else Dataset.from_dict({name: [row[name] for row in first] for name in names})
    counts = _Counts(source, picture)
    for table in rows.select_columns(names).with_format("arrow").iter(batch_size=_BATCH):
        counts.add(_Batch({name: table[name].combine_chunks() for name in names}, source))
    counts.close()
    _add_roles(picture, source, first, counts.parts)
    return picture


# -- counting ----------------------------------------------------------------------------------------------------


class _Batch:
    """Some rows as flat arrays: ids, labels [n], each token's row and position, and what is seen and trained of it."""

    def __init__(self, columns: Mapping[str, Any], source: Source):
        self.ids, self.labels = (_flat(columns[name]) for name in ("input_ids", "labels"))
        # Documents that were packed before are rows of their own.
        lengths = _flat(columns["seq_lengths"]) if "seq_lengths" in columns else _lengths(columns["input_ids"])
        self.lengths, self.starts = lengths, np.cumsum(lengths) - lengths
        self.row = np.repeat(np.arange(len(lengths)), lengths)
        self.position = np.arange(len(self.ids)) - self.starts[self.row]
        first = np.maximum(lengths + (source.seen.start or -lengths), 0)
        stop = lengths if source.seen.stop is None else np.minimum(lengths, source.seen.stop)
        self.seen = (self.position >= first[self.row]) & (self.position < stop[self.row])
        follows = self.position if source.split is None else self.position % source.split
        labelled = self.labels != -100
        self.whole = labelled & (self.position > 0)  # what would be trained of uncut rows
        self.trained = labelled & self.seen & (follows > 0) & (self.position > first[self.row])
        self.mask = _flat(columns["completion_mask"]).astype(bool) if "completion_mask" in columns else None

    def by_row(self, tokens: np.ndarray) -> np.ndarray:
        """How many of the marked tokens each row has."""
        return np.bincount(self.row[tokens], minlength=len(self.lengths))

    def last(self, tokens: np.ndarray) -> np.ndarray:
        """The place of the last marked token of each row; -1 where it has none."""
        places = np.full(len(self.lengths), -1)
        at = np.flatnonzero(tokens)
        places[self.row[at]] = at
        return places


class _Counts:
    """Adds batches up into a picture."""

    def __init__(self, source: Source, picture: Picture):
        self.source, self.picture = source, picture
        self.parts = Counter[tuple[str, bool]]()  # of prompt and completion
        self._ends = Counter[int]()
        self._blank: dict[int, bool] = {}
        tokenizer = source.tokenizer
        repeats = {tokenizer.unk_token_id, tokenizer.pad_token_id} - {tokenizer.bos_token_id, *source.stops}
        self._once = np.array(sorted(special_tokens(tokenizer) - repeats), dtype=np.int64)
        self._doubled: dict[int, tuple[int, int]] = {}

    def add(self, batch: _Batch) -> None:
        picture = self.picture
        trained, whole = batch.by_row(batch.trained), batch.by_row(batch.whole)
        stay = (batch.by_row(batch.seen & (batch.labels != -100)) > 0) | (not self.source.drops)
        seen = batch.seen & stay[batch.row]
        cut = batch.by_row(batch.seen) < batch.lengths
        end = self._ends_of(batch)
        lost = cut & (end >= 0) & ~batch.trained[end]
        self._add_doubles(batch)
        picture.cut += int(cut.sum())
        picture.labels_lost += int((whole - trained)[cut].sum())
        picture.ends_lost += int(lost.sum())
        picture.given += len(batch.lengths)
        picture.rows += int(stay.sum())
        picture.dropped += int((~stay).sum())
        picture.untrained += int((trained == 0).sum())
        picture.tokens += int(seen.sum())
        picture.trained += int(trained.sum())
        picture.longest = max(picture.longest, int(batch.lengths.max(initial=0)))
        self._add_ends(batch, end[(trained > 0) & ~lost & (end >= 0)])
        if batch.mask is not None or self.source.completion_only:
            # Without the mask, a completion begins at the first label: its prompt has none.
            begun = np.cumsum(batch.labels != -100)
            before = np.concatenate([[0], begun])[batch.starts][batch.row]
            completion = batch.mask if batch.mask is not None else begun > before
            for name, part in (("prompt", ~completion), ("completion", completion)):
                self.parts[name, False] += int((part & seen).sum())
                self.parts[name, True] += int((part & batch.trained).sum())
        for row in np.flatnonzero(trained)[: SAMPLE - len(picture._shown)]:
            at = slice(batch.starts[row], batch.starts[row] + batch.lengths[row])
            seen = batch.seen[at]
            number = picture.given - len(batch.lengths) + int(row)
            picture._shown.append((number, batch.ids[at][seen], batch.trained[at][seen]))

    def _ends_of(self, batch: _Batch) -> np.ndarray:
        """The place of each row's last trained token, were it not cut; whitespace that templates write after an end of
        turn is passed over. -1 where there is none."""
        tokens = batch.whole.copy()
        while True:
            last = batch.last(tokens)
            at = last[last >= 0]
            blank = np.isin(
                batch.ids[at], [token for token in np.unique(batch.ids[at]).tolist() if self._is_blank(token)]
            )
            if not blank.any():
                return last
            tokens[at[blank]] = False

    def _add_ends(self, batch: _Batch, last: np.ndarray) -> None:
        self._ends.update(batch.ids[last].tolist())
        after = last[last + 1 < len(batch.ids)] + 1
        after = after[batch.position[after] > 0]
        masked = np.isin(batch.ids[after], list(self.source.stops)) & ~batch.trained[after] & batch.seen[after]
        self.picture.ends_masked += int(masked.sum())

    def _is_blank(self, token: int) -> bool:
        if token not in self._blank:
            self._blank[token] = token not in self.source.stops and self.source.tokenizer.decode([token]).isspace()
        return self._blank[token]

    def _add_doubles(self, batch: _Batch) -> None:
        twice = batch.seen[1:] & (batch.ids[1:] == batch.ids[:-1]) & (batch.position[1:] > 0)
        at = np.flatnonzero(twice & np.isin(batch.ids[1:], self._once)) + 1
        for token in np.unique(batch.ids[at]).tolist():
            rows = np.unique(batch.row[at[batch.ids[at] == token]])
            before, first = self._doubled.get(token, (0, self.picture.given + int(rows[0])))
            self._doubled[token] = before + len(rows), first

    def close(self) -> None:
        tokenizer, stops = self.source.tokenizer, self.source.stops
        self.picture.ended = self._ends.total()
        # Every token at which generation stops is listed, whatever its count.
        common = self._ends.most_common()
        listed = [pair for place, pair in enumerate(common) if place < LISTED or pair[0] in stops]
        self.picture.ends = [End(token, text_of(tokenizer, token), rows, token in stops) for token, rows in listed]
        self.picture.doubled = {text_of(tokenizer, token): found for token, found in self._doubled.items()}


def _lengths(column: pa.Array) -> np.ndarray:
    return column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)


def _flat(column: pa.Array) -> np.ndarray:
    return column.flatten().to_numpy(zero_copy_only=False).astype(np.int64, copy=False)


# -- roles -------------------------------------------------------------------------------------------------------


def _add_roles(picture: Picture, source: Source, first: list[Any], parts: Mapping[tuple[str, bool], int]) -> None:
    """Roles where they can be told: by columns over all rows, by the chat template over the first."""
    read = {} if source.reader is None else source.reader.read(first[0])[0]
    if "tools" in read and (source.assistant_only or "messages" in read):
        _count_turns(picture, source, first)
    elif parts:
        picture.roles = {name: (parts[name, False], parts[name, True]) for name in ("prompt", "completion")}
        picture.roles_rows = picture.rows
        if picture.roles["prompt"][1]:
            picture.setting = "prompts are trained too; completion_only_loss: true trains only completions"
    elif not source.as_tokens:
        picture.roles, picture.roles_rows = {"text": (picture.tokens, picture.trained)}, picture.rows


def _count_turns(picture: Picture, source: Source, first: list[Any]) -> None:
    counted: dict[str, list[int]] = {}
    for row in first:
        assert source.reader is not None  # it has read them before
        read = source.reader.read(row)[0]
        found = roles.of_tokens(row["input_ids"], read, source.tokenizer, source.chat_template)
        if found is None:
            continue
        begin, end, _ = source.seen.indices(len(found))
        split = source.split or len(found) + 1
        labelled = [row["labels"][place] != -100 for place in range(begin, end)]
        if source.drops and not any(labelled):
            continue
        trained = [has_label and place % split > begin for place, has_label in enumerate(labelled, begin)]
        picture.roles_rows += 1
        for role, is_trained in zip(found[begin:end], trained, strict=True):
            tokens = counted.setdefault(role, [0, 0])
            tokens[0] += 1
            tokens[1] += is_trained
    if counted:
        picture.roles = {role: (tokens, trained) for role, (tokens, trained) in counted.items()}
        others = sum(trained for role, (_, trained) in picture.roles.items() if role != "assistant")
        if others and not source.assistant_only:
            picture.setting = (
                "whole conversations are trained; assistant_only_loss: true trains only the assistant's turns"
            )
