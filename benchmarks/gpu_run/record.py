"""What a run found: rows of numbers as they come, failures, the file they are written to, and the table at the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

DONE, CUT, CRASHED, NOT_REACHED = "done", "cut by its deadline", "crashed", "not reached"


@dataclass
class Settings:
    """How a run is made. On a CPU in Triton's interpreter the kernels are judged, too.

    Attributes:
        device: "cuda" or "cpu". smoke: tiny shapes, and nothing that needs CUDA.
        folder: where parts leave files for one another. check: correctness alone, without times.
        backend: whose rows' mathematics is judged: Triton's on a GPU.
    """

    device: torch.device
    smoke: bool
    folder: Path
    check: bool = False

    @property
    def backend(self) -> str:
        interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
        return "triton" if self.device.type == "cuda" or interpreted else "torch"


@dataclass
class Part:
    """One part of the run.

    Attributes:
        run: does it; runs in a process of its own, so that what it breaks or keeps in memory is gone with it.
        seconds: its deadline. background: starts programs that run beside this part and the next one, which reads what
            they left in the settings' folder.
    """

    name: str
    run: Callable[[Talk], None]
    seconds: float
    background: Callable[[Settings], list[subprocess.Popen]] | None = None


class Talk:
    """What a part says: rows, failures, notes. ``send`` takes each away at once: none is lost with the process."""

    def __init__(self, settings: Settings, send: Callable[[dict], None], seconds: float):
        self.settings, self._send = settings, send
        self._until = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self._until - time.monotonic()

    def row(self, what: str, **numbers: Any) -> None:
        """One line of results."""
        self._send({"row": {"what": what, **numbers}})

    def fail(self, sentence: str) -> None:
        """A wrong number, or a limit missed."""
        self._send({"fail": sentence})

    def note(self, sentence: str) -> None:
        """What is not there, or was left out."""
        self._send({"note": sentence})

    def limit(self, what: str, value: float, most: float | None = None, least: float | None = None) -> None:
        """A failure where ``value`` is above ``most`` or below ``least``."""
        if most is not None and not value <= most:
            self.fail(f"{what} is {value:.4g}; at most {most:g} is allowed")
        if least is not None and not value >= least:
            self.fail(f"{what} is {value:.4g}; at least {least:g} is asked for")


@dataclass
class Found:
    """What one part found. ``state`` is one of the four above."""

    name: str
    deadline_seconds: float
    seconds: float = 0.0
    state: str = NOT_REACHED
    error: str = ""
    rows: list[dict] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def take(self, message: dict) -> None:
        if "row" in message:
            self.rows.append(message["row"])
        elif "fail" in message:
            self.failures.append(message["fail"])
        elif "note" in message:
            self.notes.append(message["note"])
        elif "error" in message:
            self.error = message["error"]


@dataclass
class Record:
    """The whole run, and its file."""

    path: Path
    about: dict[str, Any]
    parts: list[Found]

    @property
    def failures(self) -> list[str]:
        """Each failure with its part's name; a crash is one."""
        found = []
        for part in self.parts:
            if part.state == CRASHED:
                found.append(f"{part.name}: crashed: {part.error}")
            found += [f"{part.name}: {sentence}" for sentence in part.failures]
        return found

    @property
    def unfinished(self) -> list[str]:
        return [f"{part.name}: {part.state}" for part in self.parts if part.state in (CUT, NOT_REACHED)]

    def write(self) -> None:
        """Replace the file, so that it can be read at every moment."""
        verdict = {"failures": self.failures, "unfinished": self.unfinished}
        whole = {**self.about, **verdict, "parts": [vars(part) for part in self.parts]}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(self.path.name + ".part")
        beside.write_text(json.dumps(_plain(whole), indent=1) + "\n")
        os.replace(beside, self.path)

    def print_table(self) -> None:
        for part in self.parts:
            print(f"\n== {part.name}: {part.state}, {part.seconds:.0f} of {part.deadline_seconds:.0f} s")
            for row in part.rows:
                print("  " + _line(row))
            for sentence in part.notes:
                print(f"  note: {sentence}")
        print()
        for sentence in self.unfinished:
            print(f"UNFINISHED {sentence}")
        for sentence in self.failures:
            print(f"FAIL {sentence}")
        if not self.failures:
            print("nothing failed" + (", but the run is not whole" if self.unfinished else ""))
        print(f"results: {self.path}")
        sys.stdout.flush()


def _line(row: dict) -> str:
    numbers = [f"{name} {_number(value)}" for name, value in row.items() if name != "what" and value is not None]
    return f"{row['what']:<58} " + "  ".join(numbers)


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return "[" + " ".join(_number(one) for one in value) + "]"
    if isinstance(value, dict):
        return " ".join(f"{name}:{_number(one)}" for name, one in value.items())
    return str(value)


def _plain(value: Any) -> Any:
    """For JSON, which has no NaN: None in its place."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
