"""A cache's safetensors files: written whole or not at all, mapped, with checksums."""

from __future__ import annotations

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

_DTYPES = {"I32": "<i4", "I64": "<i8", "F16": "<f2", "F32": "<f4", "U8": "u1"}
_READ_BYTES = 1 << 22


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
        return (
            f"the manifest names the shard {line['file']!r}; only a name without folders is read: build the cache anew"
        )
    path = folder / line["file"]
    mend = "copy the cache again, or delete that file and run the same qtarget cache build, which makes it anew"
    if not path.is_file():
        return f"{path} is missing; {mend}"
    size = path.stat().st_size
    if size != line["bytes"]:
        return f"{path} has {size} bytes, and the manifest says {line['bytes']}: it was cut short or changed; {mend}"
    if checksum and _checksum(path) != line["checksum"]:
        return f"{path} is not what was written: its checksum differs from the manifest's; {mend}"
    return None


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


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
        raise StorageError(f"{path} is not a file of a teacher cache: {error}; copy or build the cache anew") from error
