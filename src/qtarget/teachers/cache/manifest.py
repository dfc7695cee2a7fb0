"""What a teacher cache says about itself, and whether that is what a run needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, Field, with_config
from typing_extensions import TypedDict

from qtarget import files
from qtarget.errors import StorageError
from qtarget.teachers.fingerprints import Model

FILE = "manifest.json"
FORMAT = 1
Count = Annotated[int, Field(ge=0)]


@with_config(**files.CLOSED)
class File(TypedDict):
    """A file of the cache, with the xxh3 checksum of its bytes."""

    file: str
    bytes: Count
    checksum: str


@with_config(**files.CLOSED)
class Shard(File):
    tokens: Count


@with_config(**files.CLOSED)
class Teacher(Model):
    """Where a server has the model under another name, that too."""

    served_as: NotRequired[str]


@with_config(**files.CLOSED)
class Member(Model):
    """A model of a pool and its weight in it."""

    weight: float


@with_config(**files.CLOSED)
class Pool(TypedDict):
    pool: list[Member]


@with_config(**files.CLOSED)
class Manifest(TypedDict):
    """``manifest.json``, in the order in which its fields are written."""

    format: int
    program: str
    state: Literal["building", "complete"]
    tokenizer: str
    chat_template: str | None
    vocab_size: Count
    teacher_context: dict[str, Any] | None
    preparation: dict[str, Any]
    end_token: Count | None
    teacher: Teacher | Pool
    coverage: NotRequired[dict[str, Any]]
    k: Count
    dtype: Literal["float16", "float32"]
    rows: Count
    tokens: Count
    planned_shards: Count
    index: File
    shards: list[Shard]


def _counted(manifest: Manifest) -> Manifest:
    held = sum(line["tokens"] for line in manifest["shards"])
    if manifest["state"] == "complete" and held != manifest["tokens"]:
        raise ValueError(f"its shards hold {held} tokens, and tokens is {manifest['tokens']}")
    return manifest


# How a difference is fixed, by the part of the manifest it is in.
_MENDS = {
    "tokenizer": "train with the tokenizer the cache was built for, or build a cache for this one",
    "teacher": "name the teacher of the cache, leave the teacher out, or build a cache with this one",
    "rows": "train on the rows the cache was built for, or build a cache for these",
}
_MEND = "set it as it was, or build a cache with these settings"


def read(folder: str | Path) -> Manifest:
    """The manifest of a cache.

    Raises:
        StorageError: there is none, it cannot be read, or it is of another format.
    """
    file = Path(folder) / FILE
    if not file.is_file():
        there = "" if file.parent.is_dir() else "is not a folder here and "
        raise StorageError(
            f"teacher_cache is {str(folder)!r}, which {there}holds no {FILE}; name a folder that qtarget cache build made"
        )
    mend = "copy the cache again or rebuild it in another folder"
    return files.load(file, Annotated[Manifest, AfterValidator(_counted)], mend, FORMAT)


def write(folder: Path, manifest: Mapping[str, Any]) -> None:
    files.write_json(folder / FILE, manifest, indent=1)


def first_difference(manifest: Mapping[str, Any], wanted: Mapping[str, Any], mend: str | None = None) -> str | None:
    """A sentence on the first setting in which a cache is not what is wanted; None where it is.

    ``wanted``: a part of a manifest; what it does not hold is not compared.
    """
    for name, now, had in files.differences(wanted, manifest, partly=True):
        part, _, inner = name.partition(".")
        field = name if not inner else inner if part == "preparation" else f"{part}'s {inner}"
        return (
            f"the cache was built with {field} {json.dumps(had, ensure_ascii=False)}, and this run has "
            f"{json.dumps(now, ensure_ascii=False)}; {mend or _MENDS.get(part, _MEND)}"
        )
    return None
