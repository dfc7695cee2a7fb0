"""What a teacher cache says of itself, and whether that is what a run needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qtarget import json_text
from qtarget.errors import ConfigError
from qtarget.teachers.cache.shards import write_whole

FILE = "manifest.json"
FORMAT = 1
_NONE = type(None)
# What a manifest must hold: part → its kinds.
_PARTS: dict[str, tuple[type, ...]] = {
    "program": (str,),
    "state": (str,),
    "tokenizer": (str,),
    "chat_template": (str, _NONE),
    "vocab_size": (int,),
    "teacher_context": (dict, _NONE),
    "preparation": (dict,),
    "end_token": (int, _NONE),
    "teacher": (dict,),
    "k": (int,),
    "dtype": (str,),
    "rows": (int,),
    "tokens": (int,),
    "planned_shards": (int,),
    "index": (dict,),
    "shards": (list,),
}
DTYPES = ("float16", "float32")  # of the log-probabilities
_FILE: dict[str, tuple[type, ...]] = {"file": (str,), "bytes": (int,), "checksum": (str,)}
_TEACHER: dict[str, tuple[type, ...]] = {"name": (str,), "revision": (str, _NONE), "weights": (str, _NONE)}
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
        manifest = json_text.loads(file.read_bytes())
        if not isinstance(manifest, dict):
            raise ValueError(f"it holds a {type(manifest).__name__}")
        known = manifest.get("format") == FORMAT
        if known:
            _check(manifest)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file} cannot be read ({error}); copy the cache again or build it anew in another folder"
        ) from error
    if not known:
        format = manifest.get("format")
        raise ConfigError(f"{file} has format {format!r}, and this version reads {FORMAT}; build it anew")
    return manifest


def _check(manifest: Mapping[str, Any]) -> None:
    """Raise ValueError where a part is missing or of another kind: a cache may be somebody else's."""
    _check_parts(manifest, _PARTS, "it")
    if manifest["dtype"] not in DTYPES:
        raise ValueError(f"dtype is {manifest['dtype']!r}")
    _check_parts(manifest["index"], _FILE, "index")
    for number, line in enumerate(manifest["shards"]):
        if not isinstance(line, Mapping):
            raise ValueError(f"shards holds {line!r}")
        _check_parts(line, _FILE | {"tokens": (int,)}, f"shard {number}")
    teacher = manifest["teacher"]
    for one in teacher["pool"] if isinstance(teacher.get("pool"), list) else [teacher]:
        if not isinstance(one, Mapping):
            raise ValueError(f"teacher is {teacher!r}")
        _check_parts(one, _TEACHER | ({"weight": (float, int)} if "pool" in teacher else {}), "teacher")
    told = sum(line["tokens"] for line in manifest["shards"])
    if manifest["state"] == "complete" and told != manifest["tokens"]:
        raise ValueError(f"its shards hold {told} tokens, and tokens is {manifest['tokens']}")


def _check_parts(held: Mapping[str, Any], parts: Mapping[str, tuple[type, ...]], what: str) -> None:
    for name, kinds in parts.items():
        if name not in held:
            raise ValueError(f"{what} has no {name}")
        value = held[name]
        if not isinstance(value, kinds) or isinstance(value, bool) or (isinstance(value, int) and value < 0):
            raise ValueError(f"{name} is {value!r}")


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
