"""What verbs print with: bars, tables, and a width for pipes, which have none."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

from qtarget.errors import ConfigError


def is_main() -> bool:
    """Whether this process is the one that prints, of those that a launcher started."""
    return int(os.environ.get("RANK", "0")) == 0


def refuse_processes(what: str) -> None:
    """Raise ConfigError where a launcher started several processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"{what} runs in one process; start it without accelerate launch or torchrun")


def console(width: int) -> Any:
    """The terminal; a pipe has no width of its own, and gets this one."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else width, highlight=False)


def table(*headings: str, left: tuple[str, ...] = (), title: str | None = None) -> Any:
    """A table without lines, of numbers but for the columns named in ``left``."""
    from rich.table import Table
    from rich.text import Text

    made = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for heading in headings:
        made.add_column(Text(heading), justify="left" if heading in left else "right")
    return made


def bar(total: int, what: str) -> Callable[[int], None]:
    """A progress bar on a terminal; called with the number done so far."""
    from rich.progress import track

    steps = iter(track(range(total), description=what, disable=not sys.stderr.isatty()))
    seen = -1  # the first step only starts the bar

    def advance(done: int) -> None:
        nonlocal seen
        while seen < done:
            next(steps, None)
            seen += 1

    return advance


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


class TimeLeft:
    """Seconds that the rest of a work takes, by what is done since this was made."""

    def __init__(self, total: int, before: int = 0):
        self._total, self._before, self._started = total, before, time.monotonic()

    def estimate(self, done: int) -> str:
        left = (time.monotonic() - self._started) * (self._total - done) / (done - self._before)
        return duration(left)
