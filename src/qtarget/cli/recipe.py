"""The notes in a recipe, which training ignores: name, rows, where values come from.

Notes are keys of the YAML file. Where a value comes from is the comment behind it. Both are shown by
``qtarget train --dry_run`` and written into the run's recipe.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

FILE = "recipe.json"
# note → (its type, what it says)
NOTES: dict[str, tuple[type, str]] = {
    "name": (str, "what the recipe is called"),
    "unknown": (list, "notes on what is not public about the original"),
    "expected_rows": (int, "rows of the training data"),
    "expected_batch": (int, "rows of an optimiser step, over all GPUs"),
    "dataset_source": (str, "hub id that dataset_name was prepared from"),
    "dataset_source_revision": (str, "branch, tag or commit of it"),
    "dataset_source_split": (str, "split of it"),
    "dataset_source_columns": (dict, "prompt and completion → column, dotted where nested"),
    "dataset_source_prompt": (
        str,
        "chat_template: rendered with the model's; as_is: a column that is already rendered",
    ),
}
# How a comment begins that says where its value comes from.
ORIGINS = ("published", "borrowed", "ours")
_ORIGIN = re.compile(rf"#\s*(({'|'.join(ORIGINS)})\b.*)")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def provenance(text: str) -> dict[str, str]:
    """Field → the comment behind its value, where that begins with published, borrowed or ours.

    Args:
        text: of a YAML file that can be read. A field's parts are looked at too, one level deep.

    Example:
        >>> provenance("seed: 1  # ours\\ntarget:\\n  eta: 0.5  # ours: a guess\\nmax_steps: 91  # an epoch\\n")
        {'seed': 'ours', 'target.eta': 'ours: a guess'}
    """
    found = {}
    for field, key, value in _values(yaml.compose(text, Loader=yaml.SafeLoader)):
        comment = _ORIGIN.match(text[value.end_mark.index :].partition("\n")[0].strip())
        if comment and key.end_mark.line == value.end_mark.line:  # else it belongs to what stands on that other line
            found[field] = comment[1]
    return found


def _values(root: Any) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
    """(field, its key, its value) of a file and, as ``field.part``, of the mappings in it."""
    for key, value in root.value if isinstance(root, yaml.MappingNode) else ():
        yield str(key.value), key, value
        if isinstance(value, yaml.MappingNode):
            for part, inner in value.value:
                yield f"{key.value}.{part.value}", part, inner


def to_pin(fields: Mapping[str, Any]) -> list[str]:
    """Fields that name a branch or a tag, which move, and no commit."""
    revisions = {name: value for name, value in fields.items() if name.endswith("revision") and value is not None}
    return [name for name, value in revisions.items() if not _COMMIT.fullmatch(str(value))]


def faults(notes: Mapping[str, Any]) -> list[str]:
    """What is wrong with the notes of a file, a sentence each."""
    called = {str: "text", dict: "a mapping", list: "a list", int: "a whole number"}
    found = []
    for name, value in notes.items():
        kind, about = NOTES[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            found.append(f"{name} is {value!r}; use {called[kind]}: {about}")
    for name, value in notes.items():
        if not found and isinstance(value, list | dict):
            inside = [*value, *value.values()] if isinstance(value, dict) else value
            found += [f"{name} holds {entry!r}; write text there" for entry in inside if not isinstance(entry, str)]
    if found:
        return found
    found += [f"{name} is {n}; use a number from 1" for name, n in notes.items() if isinstance(n, int) and n < 1]
    if notes.get("dataset_source_prompt", "as_is") not in ("as_is", "chat_template"):
        found.append(f"dataset_source_prompt is {notes['dataset_source_prompt']!r}; use chat_template or as_is")
    columns = notes.get("dataset_source_columns", {"prompt": "", "completion": ""})
    if sorted(columns) != ["completion", "prompt"]:
        found.append(f"dataset_source_columns names {', '.join(columns) or 'nothing'}; name prompt and completion")
    return found


def write(folder: Path, notes: Mapping[str, Any], flags: Mapping[str, Any]) -> None:
    """Write the notes beside the model, with the settings that flags put in place of the file's."""
    text = json.dumps({**notes, "flags": dict(flags)}, indent=2, default=str, ensure_ascii=False)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")
