"""Finished problems on disk, so that a killed search goes on where it stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from qtarget import files


class Problem(TypedDict):
    """What every record has; see ``critical.Search`` for the rest."""

    problem: int


class Progress:
    """A journal of one line a problem, each on disk before the next problem is begun.

    Attributes:
        done: number of a problem → its record.

    Raises:
        StorageError: a whole line cannot be read.
    """

    def __init__(self, file: Path):
        self._journal = files.Journal(file)
        self.done: dict[int, dict[str, Any]] = {}
        for record in files.read_lines(file, Problem, "run the same command again") if file.is_file() else ():
            self.done.setdefault(record["problem"], record)

    def add(self, record: dict[str, Any]) -> None:
        self.done[record["problem"]] = record
        self._journal.add([record])
