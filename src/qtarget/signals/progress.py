"""Finished problems as JSON lines on disk, so that a killed search goes on where it stopped."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from qtarget.errors import ConfigError


class Progress:
    """One line a problem, each on disk before the next problem is.

    A last line without its end, which a killed process leaves, is cut off; its problem is done again.

    Attributes:
        done: number of a problem → its record.

    Raises:
        ConfigError: a whole line cannot be read.
    """

    def __init__(self, file: Path):
        self._file = file
        self.done: dict[int, dict[str, Any]] = {}
        held = file.read_bytes() if file.is_file() else b""
        whole, newline, half = held.rpartition(b"\n")
        for number, line in enumerate(whole.split(b"\n") if newline else [], start=1):
            try:
                record = json.loads(line)
                self.done.setdefault(record["problem"], record)
            except (ValueError, KeyError, TypeError):
                raise ConfigError(
                    f"{file} is damaged in line {number}; delete that line, or the whole folder"
                ) from None
        if half:
            with file.open("r+b") as stream:
                stream.truncate(len(held) - len(half))
                os.fsync(stream.fileno())

    def add(self, record: dict[str, Any]) -> None:
        self.done[record["problem"]] = record
        with self._file.open("ab") as stream:
            stream.write(json.dumps(record).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
