"""What verbs print with: bars, tables, and a width for pipes, which have none."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import math
import os
import string
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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


def table(*headings: str, left: tuple[str, ...] = (), title: str | None = None, **column: Any) -> Any:
    """A table without lines, of numbers but for the columns named in ``left``; ``column``: as rich's ``add_column``."""
    from rich.table import Table
    from rich.text import Text

    made = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for heading in headings:
        made.add_column(Text(heading), justify="left" if heading in left else "right", **column)
    return made


def tell(what: str, text: str) -> None:
    """A line of a summary, its text beside what it is about; long texts go on below."""
    width = max(20, min(104, console(116).width - 12))
    first, *more = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]
    print(f"  {what:<10}{first}")
    for line in more:
        print(f"  {'':<10}{line}")


def plot(curves: Mapping[str, Sequence[float]], axis: str, height: int = 16) -> str:
    """Curves over equally spaced points from 0 to 1, a column each, in plain characters.

    Each curve is drawn with a letter, equal ones with the same; where several meet, the first is seen.

    Args:
        curves: name → its values. axis: what stands below.
    """
    names: dict[tuple[float, ...], list[str]] = {}
    for name, values in curves.items():
        names.setdefault(tuple(values), []).append(name)
    letters = dict(zip(names, itertools.cycle(string.ascii_lowercase), strict=False))
    bottom = min(0.0, *map(min, names))
    top = max(bottom + 1e-9, *map(max, names))
    width = max(map(len, names))
    grid = [[" "] * width for _ in range(height)]
    for values, letter in reversed(letters.items()):
        for column, value in enumerate(values):
            grid[round((top - value) / (top - bottom) * (height - 1))][column] = letter
    marked = {row: f"{top + (bottom - top) * row / (height - 1):8.3g}" for row in (0, height // 2, height - 1)}
    lines = [f"{marked.get(row, ''):8} |{''.join(cells)}".rstrip() for row, cells in enumerate(grid)]
    lines += [f"{'':8} +{'-' * width}", f"{'':10}0{axis:^{width - 2}}1", ""]
    return "\n".join([*lines, *(f"{letter} = {', '.join(names[values])}" for values, letter in letters.items())])


def has_bars() -> bool:
    """Whether bars move beside what this process prints: it is the one that prints, and nothing of it goes elsewhere."""
    return is_main() and sys.stdout.isatty() and sys.stderr.isatty()


def silence_libraries() -> None:
    """No bars of Transformers, datasets and the hub from now on."""
    import datasets
    from transformers.utils import logging as transformers_logging

    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()


@contextlib.contextmanager
def progress(**how: Any) -> Iterator[Any]:
    """rich's ``Progress``, started: what is printed and logged meanwhile stands above its bars, each line whole.

    Args:
        how: arguments of ``Progress``; unless said otherwise it is on the main process's stderr, if that is a terminal.
    """
    from rich.console import Console
    from rich.progress import Progress

    ours = {"console": Console(stderr=True), "disable": not (is_main() and sys.stderr.isatty())}
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    handlers = [handler for one in loggers for handler in getattr(one, "handlers", ())]
    held = [one for one in handlers if vars(one).get("stream") is sys.stderr]
    with Progress(**{"redirect_stdout": sys.stdout.isatty(), **ours, **how}) as running:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "rich_proxied_file"):  # a stranger's bar flushes at each move, which would be a line
                stream.flush = lambda: None  # type: ignore[method-assign]
        for handler in held:
            handler.setStream(sys.stderr)
        try:
            yield running
        finally:
            for handler in held:
                handler.setStream(getattr(sys.stderr, "rich_proxied_file", sys.stderr))


def bar(total: int, what: str) -> Callable[[int], None]:
    """A progress bar on a terminal; called with the number done so far."""

    def track() -> Iterator[int]:
        with progress() as running:
            yield from running.track(range(total), description=what)

    steps = track()
    seen = -1  # the first step only starts the bar

    def advance(done: int) -> None:
        nonlocal seen
        while seen < done:
            next(steps, None)
            seen += 1

    return advance


def timed_bar(total: int, what: str, units: str, before: int = 0) -> Callable[..., None]:
    """A bar that once also prints how long the other ``units`` take: at the first call that does not forbid it."""
    advance, started, printed = bar(total, what), time.monotonic(), False
    advance(before)

    def step(done: int, tells: bool = True) -> None:
        nonlocal printed
        if tells and not printed:
            left = duration((time.monotonic() - started) * (total - done) / (done - before))
            print(f"about {left} for the other {total - done} {units}, by the first {done - before}", flush=True)
        printed = printed or tells
        advance(done)

    return step


@contextlib.contextmanager
def spinner(what: str) -> Iterator[Callable[..., None]]:
    """A bar without an end on the main process's terminal; yields what updates it, as ``rich.progress`` does."""
    with progress(transient=True) as running:
        yield functools.partial(running.update, running.add_task(what, total=None))


def duration(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def as_json(value: Any) -> str:
    """What ``--json`` writes. JSON has no NaN and no infinity: they become text."""

    def finite(part: Any) -> Any:
        if isinstance(part, dict):
            return {name: finite(inner) for name, inner in part.items()}
        if isinstance(part, list | tuple):
            return [finite(inner) for inner in part]
        return str(part) if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
