"""Finds rows in a cache by their contents, whatever their order.

A row's key is a hash of its token ids, of which of them are supervised, and of the context its teacher reads before
them. Text, template, tokenizer, mask, cut and context all come to it through these; the order of rows does not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

KEY_BYTES = 16


def supervised_positions(labels: Sequence[int]) -> np.ndarray:
    """[n] int64: positions whose label is trained; nothing predicts position 0."""
    (places,) = np.nonzero(np.asarray(labels, dtype=np.int64) != -100)
    return places[places > 0]


def row_key(input_ids: Sequence[int], labels: Sequence[int], context: Sequence[int] = ()) -> bytes:
    """16 bytes. ``context``: what the teacher reads in place of the row's prompt, where it has a context of its own."""
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for part in (input_ids, supervised_positions(labels), context):
        numbers = np.asarray(part, dtype="<i4")
        digest.update(len(numbers).to_bytes(8, "little"))
        digest.update(numbers.tobytes())
    return digest.digest()


class RowIndex:
    """From a row's key to where its tokens are.

    Args:
        keys: [R, 16] uint8, no key twice. starts: [R] int64, place of each row's first token among those of the cache.
    """

    def __init__(self, keys: np.ndarray, starts: np.ndarray):
        self.keys, self.starts = keys, starts
        first = np.ascontiguousarray(keys).view("<u8")[:, 0]
        self._order = np.argsort(first, kind="stable")
        self._sorted = first[self._order]

    def __len__(self) -> int:
        return len(self.keys)

    def find(self, key: bytes) -> int | None:
        """Number of the row, or None."""
        first = np.frombuffer(key, "<u8", count=1)[0]
        alike = slice(*(int(np.searchsorted(self._sorted, first, side)) for side in ("left", "right")))
        return next((int(row) for row in self._order[alike] if self.keys[row].tobytes() == key), None)

    def places(self, number: int, labels: Sequence[int]) -> list[int]:
        """One place per token of the row, −1 where nothing is supervised."""
        places = np.full(len(labels), -1, dtype=np.int64)
        positions = supervised_positions(labels)
        places[positions] = self.starts[number] + np.arange(len(positions))
        return places.tolist()
