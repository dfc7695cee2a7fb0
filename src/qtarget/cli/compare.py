"""``qtarget compare``: paired differences between result folders."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qtarget.cli import options
from qtarget.errors import ConfigError

_HELP = """\
usage: qtarget compare ARM ARM ... [-o DIR]

Compare folders that qtarget eval wrote, of the same problems and settings, with the first one. An ARM is DIR, NAME=DIR,
or NAME=DIR,DIR,... with one folder for each training seed, in the same order for every arm.

  -o DIR               also write compare.md, compare.html (one file without a network) and compare.json
  --bootstrap 10000    draws; --seed 0 of them
"""
_OPTIONS: dict[str, Any] = {"output": None, "bootstrap": 10_000, "seed": 0}


def run(arguments: Sequence[str]) -> int:
    words = list(arguments)
    if not words or "-h" in words or "--help" in words:
        print(_HELP, end="")
        return 0
    own, rest = options.take(words, _OPTIONS)
    if wrong := [word for word in rest if word.startswith("-")]:
        from qtarget.errors import unknown

        raise unknown("option", wrong[0].removeprefix("--").partition("=")[0], [*_OPTIONS])
    draws, seed = options.whole("bootstrap", own["bootstrap"], 100), options.whole("seed", own["seed"], 0)
    from qtarget import files
    from qtarget.evaluation import compare, compare_report

    made = compare.compare(rest, draws, seed)
    _tell(made)
    if own["output"] is not None:
        folder = Path(own["output"])
        try:
            files.write(folder / "compare.md", compare_report.markdown(made), report=False)
            files.write(folder / "compare.html", compare_report.html(made), report=False)
            files.write(folder / "compare.json", compare_report.as_json(made), report=False)
        except OSError as error:
            raise ConfigError(f"output is {str(folder)!r}, which cannot be written ({error.strerror})") from error
        print(f"page       {folder / 'compare.html'}")
        print(f"markdown   {folder / 'compare.md'}")
    return 0


def _tell(made: Any) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from qtarget.evaluation import compare_report

    console = Console(width=140 if not sys.stdout.isatty() else None)
    tables = (
        (compare_report.heads(made), [compare_report.cells(difference) for difference in made.differences]),
        compare_report.score_rows(made),
    )
    for names, rows in tables:
        table = Table(box=None, pad_edge=False)
        for name in names:
            left = name in ("arm", "score", "task", "reading")
            table.add_column(Text(name), justify="left" if left else "right")
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)
        console.print()
    for fact in compare_report.facts(made):
        print(fact)
