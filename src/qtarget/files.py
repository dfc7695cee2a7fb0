"""Writes files whole or not at all, keeps journals, and reads untrusted JSON."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import reprlib
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qtarget.errors import StorageError

# What the file system itself refuses. Another OSError is a fault of something else.
REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO, errno.ESTALE)
# The keyword arguments of ``pydantic.with_config`` for a record whose every field is known.
CLOSED: dict[str, Any] = {"strict": True, "extra": "forbid"}
_shown = reprlib.Repr()
_shown.maxlevel, _shown.maxstring, _shown.maxother = 3, 200, 100


# -- writing -----------------------------------------------------------------------------------------------------


def partial_of(path: Path) -> Path:
    """Where a file or folder is written before it gets its name; a kill leaves it there."""
    return path.with_name(path.name + ".partial")


@contextlib.contextmanager
def whole(path: Path, report: bool = True) -> Iterator[Path]:
    """Yields where to write; the file or folder gets its name, and is on the disk, when the block ends.

    Until then what was there is as it was, and so it stays where the block raises.

    Args:
        report: say what the file system refuses as a StorageError; else it stays the OSError that it is, for a caller who
            knows what to go on from.

    Raises:
        StorageError: the disk is full, the folder cannot be written, or a folder is where it would be written.
    """
    partial = partial_of(path)
    if partial.is_dir():
        raise StorageError(f"{path} is first written as {str(partial)!r}, which is a folder; rename that folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        for file in partial.rglob("*") if partial.is_dir() else [partial]:
            _to_disk(file)
        partial.replace(path)
        _to_disk(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            remove(partial)
        if not (report and isinstance(error, OSError) and _is_of_writing(error, path, partial)):
            raise
        why = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or error
        raise StorageError(
            f"{path} cannot be written: {why}; make room or choose another folder, and run the same command again: it "
            "resumes with what is already there"
        ) from error


def write(path: Path, data: str | bytes, report: bool = True) -> None:
    """Write a file as ``whole`` does."""
    with whole(path, report) as partial:
        partial.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))


def write_json(path: Path, value: Any, indent: int = 2) -> None:
    """Write a JSON file as ``whole`` does."""
    write(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def remove(path: Path) -> None:
    """Delete a file or folder that may not be there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _is_of_writing(error: OSError, path: Path, partial: Path) -> bool:
    """Whether the file system refuses to write, or speaks of what is written or of a folder it lies in."""
    if error.errno in REFUSED or not isinstance(error.filename, str | bytes):
        return error.errno in REFUSED
    named = Path(os.fsdecode(error.filename))
    return named in (path, *path.parents) or partial in (named, *named.parents)


def _to_disk(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


# -- journals ----------------------------------------------------------------------------------------------------


def line(record: Mapping[str, Any]) -> str:
    """A record as a line of JSON."""
    return json.dumps(record, ensure_ascii=False) + "\n"


class Journal:
    """A file of JSON lines that grows by its one writer; see ``read_lines``.

    A last line without its end, which a killed writer leaves, is cut off when the journal is opened.
    """

    def __init__(self, file: Path):
        self.file = file
        held = file.read_bytes() if file.is_file() else b""
        if half := len(held.rpartition(b"\n")[2]):
            with file.open("r+b") as stream:
                stream.truncate(len(held) - half)
                os.fsync(stream.fileno())

    def add(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Append records; they are on the disk when this returns."""
        with self.file.open("ab") as stream:
            stream.writelines(line(record).encode("utf-8", "surrogatepass") for record in records)
            stream.flush()
            os.fsync(stream.fileno())


def read_lines(file: Path, form: Any, mend: str, half_allowed: bool = False) -> list[Any]:
    """The records of a file of JSON lines.

    Args:
        form: of each record, see ``checked``. mend: what to do about a file that cannot be read, or "that line" in it.
        half_allowed: leave out a last line without its end, which another process may be writing.

    Raises:
        StorageError: it cannot be read, or a line is none of these records.
    """
    try:
        held = file.read_bytes()
    except OSError as error:
        raise StorageError(f"{file} cannot be read ({error.strerror}); {mend}") from error
    texts = held.split(b"\n")
    half = texts.pop()
    if half and not half_allowed:
        texts.append(half)
    records: list[Any] = texts
    for step in (loads, lambda value: checked(value, form)):  # a line that is no JSON is named first
        for number, record in enumerate(records, start=1):
            try:
                records[number - 1] = step(record)
            except ValueError as error:
                raise damaged(file, number, str(error), mend) from None
    return records


def damaged(file: Path, number: int, what: str, mend: str) -> StorageError:
    """The error for a line of a file of JSON lines."""
    return StorageError(f"{file} is damaged in line {number}; delete that line and {mend} ({what})")


# -- reading what somebody else may have written -----------------------------------------------------------------


def loads(text: str | bytes) -> Any:
    """The value of JSON, or ValueError: also where brackets stand deeper in each other than Python can follow."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None


def load(file: Path, form: Any, mend: str, format: int | None = None) -> Any:
    """The record of a JSON file.

    Args:
        form: see ``checked``. mend: what to do about a file that cannot be read. format: the number its field of that
            name must hold.

    Raises:
        StorageError: it cannot be read, is of another format, or is no such record.
    """
    try:
        value = loads(file.read_bytes())
        known = value.get("format") if isinstance(value, dict) else value
        if format is None or known == format:
            return checked(value, form)
    except (OSError, ValueError) as error:
        raise StorageError(f"{file} cannot be read ({error}); {mend}") from error
    raise StorageError(f"{file} has format {known!r}, and this version reads {format}; {mend}")


def checked(value: Any, form: Any) -> Any:
    """``value`` as it is where it has the form.

    Args:
        form: a type that pydantic validates, such as a TypedDict.

    Raises:
        ValueError: a sentence on the first field that is missing, unknown or of another kind, with its value.
    """
    import pydantic

    try:
        _validator(form).validate_python(value, strict=True)
    except pydantic.ValidationError as error:
        raise ValueError(_fault(value, error.errors(include_url=False))) from None
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None
    return value


@functools.cache
def _validator(form: Any) -> Any:
    import pydantic

    return pydantic.TypeAdapter(form)


def _fault(value: Any, errors: Sequence[Any]) -> str:
    """What pydantic found, by the field's name in the file and the value it has there."""
    # Of a field that may have several forms, the one it comes nearest to.
    error = max((e for e in errors if e["loc"][:1] == errors[0]["loc"][:1]), key=lambda e: len(e["loc"]))
    held, names = value, list[str]()
    for step in error["loc"]:  # pydantic also lists the kinds it tried, which are no part of the file
        if (isinstance(held, dict) and step in held) or (isinstance(held, list) and isinstance(step, int)):
            held, names = held[step], [*names, f"[{step}]" if isinstance(held, list) else f".{step}"]
    name = "".join(names).lstrip(".")
    if error["type"] == "missing":
        return f"{name or 'it'} has no {error['loc'][-1]}"
    if error["type"] == "extra_forbidden":
        return f"{name} is {_shown.repr(held)}, and no such file has a field of that name"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    return f"{name or 'it'} is {_shown.repr(held)}, which {error['msg'].replace('Input should', 'should')}"


def is_plain(name: str) -> bool:
    """Whether a name is that of a file in a folder, and leads nowhere else."""
    return name not in ("", ".", "..") and not set("/\\\0") & set(name)


# -- comparing ---------------------------------------------------------------------------------------------------


def differences(
    wanted: Mapping[str, Any],
    there: Mapping[str, Any],
    *,
    ignored: Collection[str] = (),
    partly: bool = False,
    nested: bool = True,
) -> Iterator[tuple[str, Any, Any]]:
    """(field, value wanted, value there) of each field in which two records differ, in the order of ``wanted``.

    Fields of fields are named as ``field.inner``. Two records of a model with the same hash of its ``weights`` are one
    model, which may have moved to another folder.

    Args:
        ignored: fields that may differ. partly: compare what is wanted and nothing else. nested: look into fields.
    """
    for name in [*wanted, *(name for name in there if name not in wanted and not partly)]:
        now, was = wanted.get(name), there.get(name)
        if now == was or name in ignored:
            continue
        if nested and isinstance(now, Mapping) and isinstance(was, Mapping):
            if now.get("weights") is None or now["weights"] != was.get("weights"):
                for inner, *values in differences(now, was, partly=partly):
                    yield f"{name}.{inner}", *values
        else:
            yield name, now, was
