"""Builds the page of ``qtarget lens report``: one HTML file that needs no network.

The record is thinned to what the page shows and packed into a JSON block; the files of ``page_files/`` are put around it.
What a token says is a stranger's text: it stands in JSON with ``<`` escaped, and the page writes it with ``textContent``.

Log-probabilities are 16-bit codes with steps as wide as they may be: ``code = B ln(1 + x/A)`` for ``x = −log p``, with
A = 0.2 and x ≥ 60 taken as 60. A probability is then off by 3e-5 at most, and an exponential is a look-up in a table of
65,536 entries, which is what lets a slider answer at once. Numbers of which there is one a token stay float32.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from qtarget.data.text import characters
from qtarget.errors import ConfigError, StorageError
from qtarget.lens.page_targets import packed, page_entries
from qtarget.lens.record import Record
from qtarget.targets import Target

_FOLDER = Path(__file__).with_name("page_files")
# In this order: each file uses names of those before it.
_SCRIPTS = "data targets formulas figures dom controls text bars map lists mask compare main"
# Kept (token, id) pairs of a page: 300 rows of 600 tokens at 33 ids, about 50 MB. Above it, the least likely ids of each
# token go into its tail.
_ENTRIES = 6_000_000
_CODE_OFFSET, _CODE_END, _CODES = 0.2, 60.0, 65_535


def html(record: Record, max_rows: int = 300, target: Target | None = None) -> str:
    """The page as text.

    Args:
        record: see ``record.read``. max_rows: so many of its first rows are in the page, which says so.
        target: one more for the page, after those of the captured run; rules of its own are run.

    Raises:
        ConfigError: max_rows below 1, or no supervised token in those rows.
    """
    if max_rows < 1:
        raise ConfigError(f"rows is {max_rows}; show one row or more")
    parts = {
        "style": (_FOLDER / "page.css").read_text(encoding="utf-8"),
        "script": "(() => {\n'use strict';\n"
        + "\n".join((_FOLDER / f"{name}.js").read_text(encoding="utf-8") for name in _SCRIPTS.split())
        + "})();",
        "data": _json(_data(record, max_rows, target)),
    }
    parts["policy"] = (
        f"default-src 'none'; script-src '{_hash(parts['script'])}'; style-src '{_hash(parts['style'])}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    template = (_FOLDER / "page.html").read_text(encoding="utf-8")
    # One pass: what is put in is not searched for names again.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def write(record: Record, path: str | Path, max_rows: int = 300, target: Target | None = None) -> Path:
    """Write the page to ``path`` and return it; see ``html``."""
    path = Path(path)
    text = html(record, max_rows, target)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")
    return path


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json(value: object) -> str:
    """For a JSON block in a page, whatever its texts say; NaN and infinity, which JSON has not, become null."""

    def plain(part: Any) -> Any:
        if isinstance(part, dict):
            return {str(key): plain(inner) for key, inner in part.items()}
        if isinstance(part, (list, tuple)):
            return [plain(inner) for inner in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(plain(value), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _codes(log_p: np.ndarray) -> str:
    x = np.minimum(-np.minimum(log_p, 0.0), _CODE_END)
    steps = _CODES / math.log1p(_CODE_END / _CODE_OFFSET)
    return packed(np.rint(steps * np.log1p(x / _CODE_OFFSET)), "u2")


def _data(record: Record, max_rows: int, target: Target | None) -> dict[str, Any]:
    """What stands in the page's JSON block; data.js reads it."""
    rows = record.rows[:max_rows]
    shown = {row["row"] for row in rows}
    tokens = [number for number, row in enumerate(record.tokens["row"]) if row in shown]
    if not tokens:
        raise ConfigError(f"the first {len(rows)} rows of this capture have no supervised token; show more rows")
    kept = _Kept(record, tokens)
    used = sorted({*chain.from_iterable(row["input_ids"] for row in rows), *np.unique(kept.ids).tolist()})
    local = np.asarray(used)
    ends = record.manifest.get("eos_token_ids")
    width = "u2" if len(used) <= 1 << 16 else "u4"

    def indices(ids: Any) -> str:
        return packed(np.searchsorted(local, np.asarray(ids, dtype=np.int64)), width)

    number_of = {row["row"]: number for number, row in enumerate(rows)}
    names = ("log_p_y", "entropy", *(f"{other}_log_p_y" for other in record.others), *record.signals)
    return {
        "about": {key: value for key, value in record.manifest.items() if key != "history"},
        "history": record.manifest.get("history"),
        "others": record.others,
        "vocabSize": record.vocab_size,
        "topK": kept.top_k,
        "capturedRows": len(record.rows),
        "dropped": kept.dropped,
        "widest": int(kept.counts.max()),
        "code": {"offset": _CODE_OFFSET, "end": _CODE_END},
        "wide": width == "u4",
        "vocab": [_text(record, index) for index in used],
        "special": [place for place, index in enumerate(used) if index in record.vocab and record.vocab[index][1]],
        "ends": None if ends is None else [place for place, index in enumerate(used) if index in set(ends)],
        "rows": {
            "number": [row["row"] for row in rows],
            "length": packed([len(row["input_ids"]) for row in rows], "u4"),
            "ids": indices([*chain.from_iterable(row["input_ids"] for row in rows)]),
            "supervised": packed([*chain.from_iterable(row["supervised"] for row in rows)], "u1"),
            "characters": [characters([_text(record, index) for index in row["input_ids"]]) for row in rows],
        },
        "tokens": {
            "row": packed([number_of[record.tokens["row"][token]] for token in tokens], "u4"),
            "position": packed([record.tokens["position"][token] for token in tokens], "u4"),
            "rank": packed([record.tokens["rank"][token] for token in tokens], "u4"),
            "count": packed(kept.counts, "u2"),
            "label": packed(kept.label_at, "u2"),
            "ids": indices(kept.ids),
            "codes": {name: _codes(values) for name, values in kept.log_p.items()},
            "tail": {name: packed(values, "f4") for name, values in kept.tail.items()},
            "floor": {name: packed(values, "f4") for name, values in kept.floor.items()},
            "numbers": {name: packed([record.tokens[name][token] for token in tokens], "f4") for name in names},
        },
        "targets": page_entries(record, tokens, target),
    }


def _text(record: Record, index: int) -> str:
    return record.vocab[index][0] if index in record.vocab else f"<{index}>"


class _Kept:
    """The ids of the chosen tokens, flat, each token's in falling order of the student's probability.

    counts: ids of a token. ids, log_p: flat. label_at: the label's place among them. tail, floor: as in the record.
    top_k: so many of the student's likeliest are there. dropped: ids a token, in the mean, that went into the tail.
    """

    def __init__(self, record: Record, tokens: list[int]):
        models = ("student", *record.others)
        self.counts = np.asarray([len(record.tokens["ids"][token]) for token in tokens])
        self.ids = self._flat(record, "ids", tokens, np.int64)
        self.log_p = {name: self._flat(record, name, tokens, np.float64) for name in models}
        self.tail = {name: np.asarray([record.tokens[f"{name}_tail"][t] for t in tokens]) for name in models}
        self.floor = {name: np.asarray([record.tokens[f"{name}_floor"][t] for t in tokens]) for name in models}
        self.top_k, self.dropped = int(record.manifest["top_k"]), 0.0
        token_of = np.repeat(np.arange(len(tokens)), self.counts)
        order = np.lexsort((-self.log_p["student"], token_of))
        self._take(order)
        labels = np.asarray([record.tokens["label"][token] for token in tokens])
        cap = max(_ENTRIES // len(tokens), 4)
        if len(self.ids) > cap * len(tokens):
            self._thin(cap, token_of, labels)
            token_of = np.repeat(np.arange(len(tokens)), self.counts)
        (at_label,) = (self.ids == labels[token_of]).nonzero()
        self.label_at = (np.arange(len(self.ids)) - np.repeat(self._starts(), self.counts))[at_label]
        if len(self.label_at) != len(tokens):
            raise StorageError("a token's label is not among its ids; this capture was not made by this program")

    def _flat(self, record: Record, name: str, tokens: list[int], dtype: type) -> np.ndarray:
        lists = record.tokens[name]
        return np.fromiter(chain.from_iterable(lists[t] for t in tokens), dtype=dtype, count=int(self.counts.sum()))

    def _starts(self) -> np.ndarray:
        return np.cumsum(self.counts) - self.counts

    def _take(self, chosen: np.ndarray) -> None:
        self.ids = self.ids[chosen]
        self.log_p = {name: values[chosen] for name, values in self.log_p.items()}

    def _thin(self, cap: int, token_of: np.ndarray, labels: np.ndarray) -> None:
        """Keep ``cap`` ids a token: the label, the student's likeliest, then the others' likeliest."""
        place = np.arange(len(self.ids)) - np.repeat(self._starts(), self.counts)
        others = np.full(len(self.ids), len(self.ids))
        for name in self.log_p:
            rank = np.empty_like(place)
            rank[np.lexsort((-self.log_p[name], token_of))] = place
            others = np.minimum(others, rank)
        urgency = np.where(place < self.top_k, place, self.top_k + others)
        urgency[self.ids == labels[token_of]] = -1
        rank = np.empty_like(place)
        rank[np.lexsort((urgency, token_of))] = place
        keep = rank < cap
        gone = token_of[~keep]
        for name, values in self.log_p.items():
            mass = np.bincount(gone, weights=np.exp(values[~keep]), minlength=len(self.counts))
            with np.errstate(divide="ignore"):
                self.tail[name] = np.logaddexp(self.tail[name], np.log(mass))
            np.maximum.at(self.floor[name], gone, values[~keep])
        self.dropped = len(gone) / len(self.counts)
        self.top_k = min(self.top_k, cap - 1)
        self.counts = np.bincount(token_of[keep], minlength=len(self.counts))
        self._take(keep.nonzero()[0])
