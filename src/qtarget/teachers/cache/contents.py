"""Checks the numbers in a teacher cache; its checksum tells only that somebody wrote them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qtarget.errors import StorageError
from qtarget.teachers.cache.index import KEY_BYTES
from qtarget.teachers.cache.shards import map_arrays

_ROWS = 1 << 16  # looked at at once
# More than rounding to 16 bits makes of a probability of 1.
_MOST_MASS = 1.05


def check_index(path: Path, manifest: Mapping[str, Any]) -> None:
    """Raise StorageError where the index is of another shape, or leads to tokens the cache does not have."""
    arrays = map_arrays(path)
    rows = manifest["rows"]
    _shapes(path, arrays, {"keys": ((rows, KEY_BYTES), "u1"), "counts": ((rows,), "<i4"), "starts": ((rows,), "<i8")})
    counts, starts = arrays["counts"].astype(np.int64), arrays["starts"]
    ends = starts + counts
    if rows and (
        counts.min() < 1 or starts.min() < 0 or ends.max() > manifest["tokens"] or counts.sum() != manifest["tokens"]
    ):
        raise _fault(path, f"the index leads outside the {manifest['tokens']} tokens (counts, starts)")


def check_shard(path: Path, line: Mapping[str, Any], manifest: Mapping[str, Any], values: bool) -> None:
    """Raise StorageError where a shard is of another shape than the manifest says, or holds no log-probabilities.

    Args:
        line: of the manifest. values: look at every number, which reads the file.
    """
    arrays = map_arrays(path)
    n, k, dtype = line["tokens"], manifest["k"], np.dtype(manifest["dtype"]).str
    _shapes(path, arrays, {"ids": ((n, k), "<i4"), "logprobs": ((n, k), dtype), "tail": ((n,), "<f4")})
    for begin in range(0, n if values else 0, _ROWS):
        part = slice(begin, begin + _ROWS)
        ids, tail = arrays["ids"][part], arrays["tail"][part]
        logprobs = arrays["logprobs"][part].astype(np.float32)
        low, high, vocab = int(ids.min()), int(ids.max()), manifest["vocab_size"]
        if low < 0 or high >= vocab:
            raise _fault(path, f"its ids run from {low} to {high}, outside the vocabulary of {vocab}")
        if not np.isfinite(logprobs).all() or np.isnan(tail).any():
            raise _fault(path, "its log-probabilities are NaN or infinite (logprobs, tail)")
        with np.errstate(over="ignore"):
            mass = float((np.exp(logprobs).sum(1) + np.exp(tail)).max())
        if mass > _MOST_MASS:
            raise _fault(path, f"its probabilities sum to {mass:.3g} for one token (logprobs, tail)")


def _shapes(path: Path, arrays: Mapping[str, np.ndarray], wanted: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
    for name, (shape, dtype) in wanted.items():
        if name not in arrays:
            raise _fault(path, f"it has no array {name}")
        held = arrays[name]
        if held.shape != shape or held.dtype != np.dtype(dtype):
            raise _fault(
                path,
                f"{name} is {held.dtype} of shape {list(held.shape)}, and the manifest says {np.dtype(dtype)} of shape "
                f"{list(shape)}",
            )


def _fault(path: Path, what: str) -> StorageError:
    return StorageError(f"{path} is not a file of this teacher cache: {what}; copy the cache again or build it anew")
