"""docs/study.md with pictures, docs/choosing.md and a part of the README: ``make study-report``."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import cells
from arms import DIALS, PRESETS
from cells import CORNER
from expectations import EXPECTED, EXPECTED_OF_THE_GRID
from page import grid_pictures, grid_tables, pictures, tables
from page.grid_tables import MEASURES
from page.tables import percent, signed, table
from records import Record
from regret import Regret
from results import Results
from run import QUICK_BUILD, RESULTS, ROOT

PAGE = Path(__file__).parent / "page"


class Report:
    """axes, grid: results of the two plans. regrets: of the grid, a measure each."""

    def __init__(self, folder: Path, quick: bool):
        self.axes, self.grid = (Results(Record(plan, folder / plan.name)) for plan in cells.plans(quick))
        for results in (self.axes, self.grid):
            if not results.seeds:
                raise SystemExit(f"{results.plan.name}: no seed is finished yet; make study goes on")
        self.regrets = {measure: Regret(self.grid, measure) for measure in MEASURES}

    def page(self) -> str:
        axes, grid = self.axes, self.grid
        settings, both = axes.settings, (axes, grid)
        runs = [content for results in both for content in results.runs.values()]
        tried = [c for results in both for rates in results.dev.values() for found in rates.values() for c in found]
        seconds = sum(c["seconds"] for c in runs) + sum(c["training"]["seconds"] for c in tried)
        small = [arm.name for arm in PRESETS]
        expected, met = tables.expectation_table(axes, EXPECTED)
        grid_expected, grid_met = tables.expectation_table(grid, EXPECTED_OF_THE_GRID)
        values = {
            "seeds": str(len(axes.seeds)),
            "runs": f"{len(runs) + len(tried):,}",
            "hours": f"{seconds / 3600:.1f}",
            "machine": ", ".join(sorted({content["machine"]["processor"] for content in runs})),
            "torch": ", ".join(sorted({content["machine"]["torch"] for content in runs})),
            "problems": str(settings.test_problems),
            "steps": str(settings.steps),
            "batch": str(settings.batch),
            "student": f"{axes.models[axes.seeds[0]]['base']['parameters']:,}",
            "teacher": f"{axes.models[axes.seeds[0]]['good']['parameters']:,}",
            "models": tables.model_table(axes),
            "rates": tables.rate_table(axes) if axes.scores else "There was one.",
            "presets": tables.centre_table(axes, small),
            "costs": tables.cost_table(axes, small),
            "dials": tables.centre_table(axes, ["dft", "beyond-log", "target-sft", *(arm.name for arm in DIALS)]),
            "cells": table(
                ["cell", "differs from the centre by"], [[c.name, c.says] for c in axes.plan.cells.values()]
            ),
            "cells_avg": tables.cell_table(axes, "avg"),
            "cells_pass": tables.cell_table(axes, "pass"),
            "kinds": tables.kind_table(axes),
            "controls": tables.control_table(axes),
            "expected": expected,
            "met": f"{met} of {len(EXPECTED)}",
            "losses": tables.losses(axes),
            "identity": tables.identity(axes),
            "dev_seeds": str(len(grid.settings.dev_seeds)),
            "regret": grid_tables.regret_table(grid, self.regrets),
            "grid_models": grid_tables.model_table(grid),
            **{f"grid_{measure}": grid_tables.score_table(grid, measure) for measure in MEASURES},
            "corner": grid_tables.corner_table(grid),
            "corner_kinds": grid_tables.kind_table(grid, CORNER),
            "grid_rates": grid_tables.rate_table(grid),
            "at_an_end": grid_tables.at_an_end(grid),
            "grid_expected": grid_expected,
            "grid_met": f"{grid_met} of {len(EXPECTED_OF_THE_GRID)}",
        }
        text = (PAGE / "study.md.in").read_text()
        for name, value in values.items():
            text = text.replace("{{" + name + "}}", value)
        return self.filled(text)

    def readme(self) -> str:
        """The README, its part between two marks written anew."""
        start, end = "<!-- of benchmarks/study/report.py -->\n", "<!-- end of the study -->\n"
        before, rest = (ROOT / "README.md").read_text().split(start)
        block = self.filled((PAGE / "readme.md.in").read_text())
        return before + start + block + end + rest.split(end)[1]

    def filled(self, text: str) -> str:
        """Figures in a sentence, so that none is written by hand.

        ``{{mean SIDE MEASURE}}``, ``{{LEFT vs RIGHT MEASURE}}``; of the probe ``{{taught SIDE WHEN KIND FIGURE}}``; and
        of the grid ``{{regret ARM MEASURE}}``, ``{{worst ARM MEASURE}}`` and ``{{best CELL MEASURE}}``.
        """

        def mean(side: str, measure: str) -> str:
            value = self._of(side).mean(side, measure)
            return f"{value:.2f}" if "entropy" in measure else percent(value)

        def contrast(left: str, right: str, measure: str) -> str:
            made = self._of(left).contrast(left, right, measure)
            if "entropy" in measure:
                return f"{made.value:+.2f} [{made.low:+.2f}, {made.high:+.2f}]"
            return signed(made).removesuffix(" *")

        def taught(side: str, when: str, kind: str, figure: str) -> str:
            value = self._of(side).kind(side, when, kind, figure)
            return "none" if value is None else f"{value:.2f}"

        text = text.replace("{{conditions}}", str(len(self.grid.plan.cells)))
        text = text.replace("{{samples}}", str(self.grid.settings.samples))
        made = {
            r"\{\{mean (\S+) ([\w@]+)\}\}": mean,
            r"\{\{(\S+) vs (\S+) ([\w@]+)\}\}": contrast,
            r"\{\{taught (\S+) (\w+) (\w+) (\w+)\}\}": taught,
            r"\{\{regret (\S+) (\w+)\}\}": lambda arm, m: grid_tables.points(self.regrets[m].mean(arm)),
            r"\{\{worst (\S+) (\w+)\}\}": lambda arm, m: grid_tables.points(self.regrets[m].worst(arm)[1]),
            r"\{\{best (\S+) (\w+)\}\}": lambda cell, m: self.regrets[m].best(cell),
        }
        for pattern, fill in made.items():
            text = re.sub(pattern, lambda found, fill=fill: fill(*found.groups()), text)
        return text

    def _of(self, side: str) -> Results:
        name = side.split("/")[0]
        return self.grid if name in ("all", "middle", *self.grid.plan.cells) else self.axes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="of the quick form, into build/study-quick")
    parser.add_argument("--build", type=Path, default=QUICK_BUILD, help="folder of the quick form")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where the page goes; default docs")
    args = parser.parse_args()
    folder, docs = (args.build / "results", args.build) if args.quick else (RESULTS, args.docs)
    report = Report(folder, args.quick)
    pictures.draw(report.axes, docs / "assets")
    grid_pictures.draw(report.grid, report.regrets, docs / "assets")
    (docs / "study.md").write_text(report.page())
    (docs / "choosing.md").write_text(report.filled((PAGE / "choosing.md.in").read_text()))
    (ROOT if docs == ROOT / "docs" else docs).joinpath("README.md").write_text(report.readme())
    print(f"{docs / 'study.md'}: {len(report.axes.seeds)} and {len(report.grid.seeds)} seeds")


if __name__ == "__main__":
    main()
