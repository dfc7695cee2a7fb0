"""The notes in a recipe, which training ignores: name, sources of values, what to pin.

The notes are checked with the settings, looked at by ``qtarget train --dry_run`` and kept in the run's recipe.json.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

FILE = "recipe.json"
# note → (its type, what it says)
NOTES: dict[str, tuple[type, str]] = {
    "name": (str, "what the recipe is called"),
    "provenance": (dict, "field → published, ours or 'borrowed: NAME', each with '; a note' if there is more to say"),
    "to_pin": (list, "fields that name a branch and should name a commit"),
    "unknown": (list, "sentences on what nobody outside can know about the original"),
    "expected_rows": (int, "rows of the training data"),
    "expected_batch": (int, "rows of an optimiser step, over all GPUs"),
    "dataset_source": (str, "hub id that dataset_name was prepared from"),
    "dataset_source_revision": (str, "branch, tag or commit of it"),
    "dataset_source_split": (str, "split of it"),
    "dataset_source_columns": (dict, "prompt and completion → column, dotted where nested"),
    "dataset_source_prompt": (
        str,
        "chat_template: rendered with the model's; as_is: a column that is rendered already",
    ),
}
# Notes about the recipe as a whole, which have no provenance of their own.
ABOUT = ("name", "provenance", "to_pin", "unknown")
_ORIGIN = re.compile(r"(published|ours|borrowed: [^;]*[^;\s])(?:; (\S.*))?", re.DOTALL)
_COMMIT = re.compile(r"[0-9a-f]{40}")


def origin(text: Any) -> tuple[str, str] | None:
    """(published, ours or borrowed: NAME; the note or "") of an entry of ``provenance``; None where it is neither.

    >>> origin("borrowed: arXiv:2510.00526; its scripts")
    ('borrowed: arXiv:2510.00526', 'its scripts')
    """
    found = _ORIGIN.fullmatch(text) if isinstance(text, str) else None
    return None if found is None else (found[1], found[2] or "")


def faults(notes: Mapping[str, Any], fields: Mapping[str, Any]) -> list[str]:
    """What is wrong with the notes of a file, a sentence each.

    Args:
        notes: as the file has them. fields: all of the file's keys with their values, notes among them.
    """
    found = [
        f"{name} is {notes[name]!r}; use {_called(NOTES[name][0])}: {NOTES[name][1]}"
        for name in notes
        if not _is(notes[name], NOTES[name][0])
    ]
    found += [
        f"{name} holds {entry!r}; write text there"
        for name in notes
        if not found and NOTES[name][0] in (list, dict)
        for entry in _entries(notes[name])
        if not isinstance(entry, str)
    ]
    if found:
        return found
    found += [f"{name} is {notes[name]}; use a number from 1" for name in notes if _is_below_one(notes[name])]
    if notes.get("dataset_source_prompt", "as_is") not in ("as_is", "chat_template"):
        found.append(f"dataset_source_prompt is {notes['dataset_source_prompt']!r}; use chat_template or as_is")
    columns = notes.get("dataset_source_columns", {"prompt": "", "completion": ""})
    if sorted(columns) != ["completion", "prompt"]:
        found.append(f"dataset_source_columns names {', '.join(columns) or 'nothing'}; name prompt and completion")
    for name in notes.get("to_pin", []):
        value = fields.get(name)
        if name not in fields:
            found.append(f"to_pin names {name!r}, which the recipe does not set; take it out{_near(name, fields)}")
        elif _COMMIT.fullmatch(str(value)):
            found.append(f"to_pin names {name!r}, which is pinned to {value}; take it out")
    if "provenance" in notes:
        found += _provenance_faults(notes["provenance"], fields)
    return found


def _provenance_faults(entries: Mapping[str, Any], fields: Mapping[str, Any]) -> list[str]:
    """Every field has an entry, and no entry stands for nothing. ``target.eta`` speaks of a part of a field."""
    found = [
        f"provenance of {name} is {text!r}; use published, ours or 'borrowed: NAME', and '; a note' if there is one"
        for name, text in entries.items()
        if origin(text) is None
    ]
    found += [
        f"provenance names {name!r}, which the recipe does not set; take it out{_near(name, fields)}"
        for name in entries
        if not _holds(fields, str(name)) or name in ABOUT
    ]
    missing = [name for name in fields if name not in ABOUT and name not in entries]
    if missing:
        found.append(f"provenance has no entry for {', '.join(missing)}; say published, ours or 'borrowed: NAME'")
    return found


def write(folder: Path, notes: Mapping[str, Any], flags: Mapping[str, Any]) -> None:
    """Keep the notes beside the model, with the settings that flags put in place of the file's."""
    text = json.dumps({**notes, "flags": dict(flags)}, indent=2, default=str, ensure_ascii=False)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")


def _holds(fields: Mapping[str, Any], name: str) -> bool:
    value: Any = fields
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return False
        value = value[part]
    return True


def _near(name: str, valid: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name), [name for name in valid if name not in ABOUT], n=1)
    return f", or did you mean {near[0]!r}?" if near else ""


def _entries(value: Any) -> list[Any]:
    return [*value, *(value.values() if isinstance(value, Mapping) else [])]


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_below_one(value: Any) -> bool:
    return isinstance(value, int) and value < 1


def _called(kind: type) -> str:
    return {str: "text", dict: "a mapping", list: "a list", int: "a whole number"}[kind]
