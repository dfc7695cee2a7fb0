"""The tables of the grid: bases and teachers around the paper's condition."""

from __future__ import annotations

import rates
from arms import LABELS, TEACHERS
from cells import BASES, CORNER, GUIDES
from chains import KINDS
from regret import Regret, Span
from results import Results

from page.tables import percent, table

MEASURES = ("avg", "pass", "greedy")
ARMS = (*LABELS, *TEACHERS)
CORNERS = (f"{CORNER}-noise-0", CORNER, f"{CORNER}-noise-30", f"{CORNER}-long")
# Those whose teaching is shown, token by token.
TAUGHT = ("sft", "dft", "kd", "kd-hybrid", "gift", "target-sft")


def points(span: Span) -> str:
    return f"{100 * span.value:.1f} [{100 * span.low:.1f}, {100 * span.high:.1f}]"


def titles(results: Results) -> dict[str, str]:
    n = results.settings.samples
    return {"avg": f"avg@{n}", "pass": f"pass@{n}", "greedy": "greedy"}


def regret_table(results: Results, regrets: dict[str, Regret]) -> str:
    head = ["arm"]
    for measure in MEASURES:
        head += [f"{titles(results)[measure]}, mean", "worst", "in"]
    lines = []
    for arm in regrets["avg"].by_mean:
        line = [arm]
        for measure in MEASURES:
            cell, worst = regrets[measure].worst(arm)
            line += [points(regrets[measure].mean(arm)), points(worst), cell]
        lines.append(line)
    return table(head, lines)


def score_table(results: Results, measure: str) -> str:
    """Every arm in every condition; the best of each is bold."""
    cells = list(results.plan.cells)
    values = {cell: {arm: results.mean(f"{cell}/{arm}", measure) for arm in ARMS} for cell in cells}
    lines = []
    for cell in cells:
        best = max(values[cell].values())
        shown = [percent(value) if value < best else f"**{percent(value)}**" for value in values[cell].values()]
        lines.append([cell, *shown])
    return table(["condition", *ARMS], lines)


def model_table(results: Results) -> str:
    names = {model: f"{base} base" for base, model in BASES.items()}
    names |= {model: f"{guide} teacher" for guide, (model, scale) in GUIDES.items() if scale == 1}
    measures = ("avg", "best", "greedy", "pass")
    lines = [
        [label, *(percent(results.mean(name, m)) for m in measures), f"{results.mean(name, 'entropy'):.3f}"]
        for name, label in names.items()
    ]
    n = results.settings.samples
    return table(["model", f"avg@{n}", "at its best temperature", "greedy", f"pass@{n}", "entropy"], lines)


def rate_table(results: Results) -> str:
    lines = []
    for cell in results.plan.cells:
        lines.append([cell, *(f"{results.rates[results.plan.cells[cell].where(arm), arm]:g}" for arm in ARMS)])
    return table(["condition", *ARMS], lines)


def at_an_end(results: Results) -> str:
    """How many of the chosen rates are the last of the ladder, where nothing beyond was tried."""
    ends = [pair for pair, rate in results.rates.items() if rate in (rates.LADDER[0], rates.LADDER[-1])]
    return f"{len(ends)} of {len(results.rates)}"


def corner_table(results: Results) -> str:
    """The corner and its three variants, one line an arm."""
    head = ["arm", *(f"{titles(results)[m]}, {results.plan.cells[c].says}" for m in ("avg", "pass") for c in CORNERS)]
    lines = []
    for arm in ARMS:
        lines.append([arm, *(percent(results.mean(f"{c}/{arm}", m)) for m in ("avg", "pass") for c in CORNERS)])
    return table(head, lines)


def kind_table(results: Results, cell: str) -> str:
    """What each target teaches in a condition, before and after training, by kind of token."""
    figures = (
        ("p of the label, before", "before", "p"),
        ("p of the label, after", "after", "p"),
        ("trust, before", "before", "trust"),
        ("trust, after", "after", "trust"),
        ("rest on right others, before", "before", "on_right_others"),
    )
    lines = []
    for arm in TAUGHT:
        for label, when, figure in figures:
            values = [results.kind(f"{cell}/{arm}", when, kind, figure) for kind in KINDS]
            if any(value is not None for value in values):
                lines.append([arm, label, *("" if value is None else f"{value:.2f}" for value in values)])
    return table(["arm", "", *KINDS], lines)
