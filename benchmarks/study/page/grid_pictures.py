"""The grid's pictures: how far each arm ends from the best one, and the map of bases and teachers."""

from __future__ import annotations

from pathlib import Path

from arms import WITH_TEACHER
from cells import BASES, CORNER, GUIDES
from matplotlib import pyplot
from regret import Regret
from results import Results

from page.grid_tables import MEASURES, titles
from page.pictures import COLOURS, save

OURS, SMALL = "target-sft", "target-sft-0.25"
DIAL = "#7d7d7d"
OTHER = {True: "#72b7b2", False: "#a9c0d8"}  # with a teacher, without
MAP_ENDS = (0.0, 30.0)  # points behind, white to full colour
BESIDE = {
    f"{CORNER}-noise-0": "no wrong steps",
    f"{CORNER}-noise-30": "30 % wrong steps",
    f"{CORNER}-long": "3 × the steps",
}


def draw(results: Results, regrets: dict[str, Regret], folder: Path) -> None:
    save(regret(results, regrets), folder / "study_regret.svg")
    save(chart(results, regrets["avg"]), folder / "study_map.svg")


def regret(results: Results, regrets: dict[str, Regret]):
    """One row an arm: a bar for the mean over conditions, a mark for the worst."""
    order = regrets["avg"].by_mean[::-1]
    figure, axes = pyplot.subplots(1, 3, figsize=(10, 0.32 * len(order) + 1.3), layout="constrained", sharey=True)
    for axis, measure in zip(axes, MEASURES, strict=True):
        for at, arm in enumerate(order):
            span, (_, worst) = regrets[measure].mean(arm), regrets[measure].worst(arm)
            colour = COLOURS[OURS] if arm == OURS else DIAL if arm.startswith(OURS) else OTHER[arm in WITH_TEACHER]
            axis.barh(at, 100 * span.value, 0.62, color=colour, alpha=0.75)
            axis.plot(
                [100 * span.low, 100 * span.high], [at, at], color="#8a8a8a" if arm == OURS else "#333333", lw=1.2
            )
            axis.plot(100 * worst.value, at, "D", color=colour, markersize=4.5, markeredgecolor="#555555", mew=0.6)
        axis.set_title(f"{titles(results)[measure]}: points behind the best", fontsize=9.5)
        axis.set_xlim(left=0)
        axis.grid(axis="x", alpha=0.25)
        axis.tick_params(labelsize=8)
    axes[0].set_yticks(range(len(order)), order, fontsize=9)
    for label in axes[0].get_yticklabels():
        label.set_fontweight("bold" if label.get_text() == OURS else "normal")
    figure.supxlabel(
        f"bar: mean of {len(regrets['avg'].cells)} conditions, with a 95 % interval     ◆: its worst condition     "
        "dark: target-sft, teal: other targets with a teacher, pale: without",
        fontsize=8.5,
    )
    return figure


def chart(results: Results, avg: Regret):
    """Bases × teachers, and beside it the corner's variants."""
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(10, 3.9), layout="constrained", width_ratios=(len(GUIDES), 1.15)
    )
    bases = [*BASES][::-1]  # weak at the bottom
    for row, base in enumerate(bases):
        for column, guide in enumerate(GUIDES):
            _square(left, column, row, avg, f"{base}-{guide}")
    _frame(left, [f"{guide} teacher" for guide in GUIDES], [f"{base} base" for base in bases])
    for row, cell in enumerate(BESIDE):
        _square(right, 0, row, avg, cell)
    _frame(right, ["weak base, sharp teacher"], [*BESIDE.values()])
    figure.suptitle(
        f"the best objective and its {titles(results)['avg']}; how many points {OURS} is behind it (colour: eta 0.5)",
        fontsize=10,
    )
    return figure


def _square(axis, column: int, row: int, avg: Regret, cell: str) -> None:
    span, best = avg.at(cell, OURS), avg.best(cell)
    share = min(1.0, max(0.0, (100 * span.value - MAP_ENDS[0]) / (MAP_ENDS[1] - MAP_ENDS[0])))
    axis.add_patch(
        pyplot.Rectangle((column - 0.48, row - 0.46), 0.96, 0.92, color=(0.89, 0.34, 0.18, 0.06 + 0.7 * share))
    )
    axis.text(column, row - 0.25, best, ha="center", va="center", fontsize=9.5, fontweight="bold")
    axis.text(
        column, row - 0.03, f"{100 * avg.means[avg.cells.index(cell)].max():.1f}", ha="center", va="center", fontsize=9
    )
    for line, (arm, eta) in enumerate(((OURS, "0.5"), (SMALL, "0.25"))):
        here = avg.at(cell, arm)
        text = f"eta {eta}: {100 * here.value:.1f} [{100 * here.low:.1f}, {100 * here.high:.1f}]"
        axis.text(column, row + 0.19 + 0.17 * line, text, ha="center", va="center", fontsize=7.5)


def _frame(axis, columns: list[str], rows: list[str]) -> None:
    axis.set_xlim(-0.5, len(columns) - 0.5)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xticks(range(len(columns)), columns, fontsize=8.5)
    axis.set_yticks(range(len(rows)), rows, fontsize=8.5)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
