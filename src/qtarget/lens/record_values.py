"""Could a capture's numbers come from a model? The file may be a stranger's, or edited."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from qtarget.lens.record import Record

_TOKENS, _ROWS, _VOCAB = "tokens.parquet", "rows.parquet", "vocab.parquet"
# A log-probability may be above 0 by rounding.
_ROUNDING = 0.01


def impossible_value(record: Record) -> tuple[str, str] | None:
    """(file, what is wrong), or None."""
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
            return _TOKENS, f"{model} has another number of log-probabilities than ids"
        for name in (model, f"{model}_tail", f"{model}_floor"):
            numbers = np.asarray([*chain.from_iterable(tokens[name])] if name == model else tokens[name], np.float64)
            if np.isnan(numbers).any() or (len(numbers) and numbers.max() > _ROUNDING):
                return _TOKENS, f"{name} holds {numbers.max()}; a log-probability is 0 or less"
    if not np.isfinite(np.asarray(tokens["entropy"], np.float64)).all():
        return _TOKENS, "entropy holds NaN or infinity"
    return _places(record) or _texts(record)


def _places(record: Record) -> tuple[str, str] | None:
    length_of = {}
    for row in record.rows:
        if len(row["supervised"]) != len(row["input_ids"]):
            return _ROWS, f"row {row['row']} has {len(row['supervised'])} marks for {len(row['input_ids'])} input_ids"
        length_of[row["row"]] = len(row["input_ids"])
    for row, position in zip(record.tokens["row"], record.tokens["position"], strict=True):
        if row not in length_of:
            return _TOKENS, f"row holds {row}, which {_ROWS} has not"
        if not 0 < position < length_of[row]:
            return _TOKENS, f"position holds {position} for a row of {length_of[row]} tokens"
    return None


def _texts(record: Record) -> tuple[str, str] | None:
    used = set(chain.from_iterable(row["input_ids"] for row in record.rows))
    missing = min(used - record.vocab.keys(), default=None)
    return None if missing is None else (_VOCAB, f"it has no text for id {missing}")
