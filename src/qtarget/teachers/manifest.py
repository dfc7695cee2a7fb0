"""What a teacher cache says of itself, and whether that is what a run needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qtarget.errors import ConfigError
from qtarget.teachers.shards import write_whole

FILE = "manifest.json"
FORMAT = 1
# How a difference is mended, by the part of the manifest it is in.
_MENDS = {
    "tokenizer": "train with the tokenizer the cache was built for, or build a cache for this one",
    "teacher": "name the teacher of the cache, leave the teacher out, or build a cache with this one",
    "rows": "train on the rows the cache was built for, or build a cache for these",
}
_MEND = "set it as it was, or build a cache with these settings"


def read(folder: str | Path) -> dict[str, Any]:
    """The manifest of a cache.

    Raises:
        ConfigError: there is none, it cannot be read, or it is of another format.
    """
    file = Path(folder) / FILE
    if not file.is_file():
        raise ConfigError(
            f"teacher_cache is {str(folder)!r}, which holds no {FILE}; name a folder that qtarget cache build made"
        )
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        known = isinstance(manifest, dict) and manifest["format"] == FORMAT
        if known and not {"index", "shards", "k", "rows", "tokens", "state"} <= manifest.keys():
            raise ValueError("parts of it are missing")
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{file} cannot be read ({error}); copy the cache again or build it anew in another folder"
        ) from error
    if not known:
        raise ConfigError(f"{file} has format {manifest['format']!r}, and this version reads {FORMAT}; build it anew")
    return manifest


def write(folder: Path, manifest: Mapping[str, Any]) -> None:
    write_whole(folder / FILE, (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode())


def first_difference(manifest: Mapping[str, Any], wanted: Mapping[str, Any], mend: str | None = None) -> str | None:
    """A sentence on the first setting in which a cache is not what is wanted; None where it is.

    ``wanted``: a part of a manifest; what it does not hold is not compared.
    """
    for name, value in wanted.items():
        had = manifest.get(name)
        if isinstance(value, Mapping) and isinstance(had, Mapping):
            for inner in value:
                if had.get(inner) != value[inner]:
                    return _sentence(name, inner, had.get(inner), value[inner], mend)
        elif had != value:
            return _sentence(name, name, had, value, mend)
    return None


def _sentence(part: str, name: str, had: Any, wanted: Any, mend: str | None) -> str:
    told = name if part in (name, "preparation") else f"{part}'s {name}"
    return (
        f"the cache was built with {told} {json.dumps(had, ensure_ascii=False)}, and this run has "
        f"{json.dumps(wanted, ensure_ascii=False)}; {mend or _MENDS.get(part, _MEND)}"
    )
