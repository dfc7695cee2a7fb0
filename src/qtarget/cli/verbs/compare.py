"""``qtarget compare``: paired differences between result folders.

Folders that qtarget eval wrote for the same problems and settings are compared with the first one; so are the output
folders of lm_eval --log_samples and lighteval --save-details. An ARM is DIR, NAME=DIR, or NAME=DIR,DIR,... with one
folder for each training seed, in the same order for every arm.
"""

from __future__ import annotations

from typing import Any

from qtarget.cli import terminal
from qtarget.cli.arguments import FOLDER, NAME, Option, Verb, whole
from qtarget.errors import ConfigError

VERB = Verb("compare", __doc__)


@VERB.command(
    Option("output", "also write compare.md, compare.html (one self-contained file) and compare.json", FOLDER),
    Option("bootstrap", "bootstrap draws for the intervals", whole(100), 10_000),
    Option(
        "metric", "metric of other programs' logs: METRIC or METRIC:FILTER, separated by commas for several tasks", NAME
    ),
    Option("seed", "seed of the bootstrap", whole(0), 0),
    takes="ARM ARM ...",
)
def run(options: Any) -> int:
    from qtarget import files
    from qtarget.evaluation import compare, compare_report

    made = compare.compare(options.words, options.bootstrap, options.seed, options.metric)
    _show(made)
    folder = options.output
    if folder is not None:
        try:
            files.write(folder / "compare.md", compare_report.markdown(made), report=False)
            files.write(folder / "compare.html", compare_report.html(made), report=False)
            files.write(folder / "compare.json", compare_report.as_json(made), report=False)
        except OSError as error:
            raise ConfigError(f"output is {str(folder)!r}, which cannot be written ({error.strerror})") from error
        print(f"page       {folder / 'compare.html'}")
        print(f"markdown   {folder / 'compare.md'}")
    return 0


def _show(made: Any) -> None:
    from rich.text import Text

    from qtarget.evaluation import compare_report

    console = terminal.console(140)
    tables = (
        (compare_report.heads(made), [compare_report.cells(difference) for difference in made.differences]),
        compare_report.score_rows(made),
    )
    for names, rows in tables:
        table = terminal.table(*names, left=("arm", "score", "task", "reading"))
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)
        console.print()
    for fact in compare_report.facts(made):
        print(fact)
