"""A cache's safetensors files: written whole or not at all, mapped, and checked.

Checksums tell what was changed later; the numbers are checked too, for anybody can write a checksum.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from safetensors.numpy import save

from qtarget import files
from qtarget.errors import StorageError
from qtarget.teachers.cache.index import KEY_BYTES

_DTYPES = {"I32": "<i4", "I64": "<i8", "F16": "<f2", "F32": "<f4", "U8": "u1"}
_ROWS = 1 << 16  # looked at at once
# More than rounding to 16 bits makes of a probability of 1.
_MOST_MASS = 1.05


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Write a safetensors file. Returns its line of the manifest: file, bytes, checksum."""
    data = save({name: np.ascontiguousarray(value) for name, value in arrays.items()})
    files.write(path, data)
    return {"file": path.name, "bytes": len(data), "checksum": xxhash.xxh3_128_hexdigest(data)}


def fault(folder: Path, line: Mapping[str, Any], checksum: bool = True) -> str | None:
    """What is wrong with a file of the manifest, in a sentence, or None.

    ``checksum``: read all of it; else only its size is looked at.
    """
    if not files.is_plain(line["file"]):
        return f"the manifest names the shard {line['file']!r}; only a name without folders is read: rebuild the cache"
    path = folder / line["file"]
    mend = "copy the cache again, or delete that file and run the same qtarget cache build, which rebuilds it"
    if not path.is_file():
        return f"{path} is missing; {mend}"
    size = path.stat().st_size
    if size != line["bytes"]:
        return f"{path} has {size} bytes, and the manifest says {line['bytes']}: it was cut short or changed; {mend}"
    if checksum and _checksum(path) != line["checksum"]:
        return f"{path} is not what was written: its checksum differs from the manifest's; {mend}"
    return None


def _checksum(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()


def map_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, mapped and not read.

    Raises:
        StorageError: the file is not one.
    """
    try:
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > path.stat().st_size:
                raise ValueError("its header is longer than the file")
            header = files.loads(stream.read(length))
        arrays = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"])
            fits = all(isinstance(n, int) and n >= 0 for n in (begin, end, *shape))
            fits = fits and end - begin == dtype.itemsize * math.prod(shape)
            if not fits or 8 + length + end > path.stat().st_size:
                raise ValueError(f"{name} does not fit")
            if end == begin:
                arrays[name] = np.empty(shape, dtype)
            else:
                arrays[name] = np.memmap(path, dtype=dtype, mode="r", offset=8 + length + begin, shape=shape)
        return arrays
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise StorageError(f"{path} is not a file of a teacher cache: {error}; copy or rebuild the cache") from error


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
        raise _foreign(path, f"the index leads outside the {manifest['tokens']} tokens (counts, starts)")


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
            raise _foreign(path, f"its ids run from {low} to {high}, outside the vocabulary of {vocab}")
        if not np.isfinite(logprobs).all() or np.isnan(tail).any():
            raise _foreign(path, "its log-probabilities are NaN or infinite (logprobs, tail)")
        with np.errstate(over="ignore"):
            mass = float((np.exp(logprobs).sum(1) + np.exp(tail)).max())
        if mass > _MOST_MASS:
            raise _foreign(path, f"its probabilities sum to {mass:.3g} for one token (logprobs, tail)")


def _shapes(path: Path, arrays: Mapping[str, np.ndarray], wanted: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
    for name, (shape, dtype) in wanted.items():
        if name not in arrays:
            raise _foreign(path, f"it has no array {name}")
        held = arrays[name]
        if held.shape != shape or held.dtype != np.dtype(dtype):
            raise _foreign(
                path,
                f"{name} is {held.dtype} of shape {list(held.shape)}, and the manifest says {np.dtype(dtype)} of shape "
                f"{list(shape)}",
            )


def _foreign(path: Path, what: str) -> StorageError:
    return StorageError(f"{path} is not a file of this teacher cache: {what}; copy the cache again or rebuild it")
