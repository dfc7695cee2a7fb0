"""The study's pictures, byte-equal each time they are drawn."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from arms import FEW, WITH_TEACHER
from chains import KINDS
from results import Results

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "study"
from matplotlib import pyplot  # noqa: E402

COLOURS = dict(zip((*FEW, "base"), ("#4c78a8", "#e4572e", "#72b7b2", "#b279a2", "#2f2f2f", "#9a9a9a"), strict=True))
NOISE = {"noise-0": 0, "noise-5": 5, "centre": 15, "noise-30": 30, "noise-50": 50}
TEACHERS = {
    "centre": "good",
    "teacher-sharp": "sharp",
    "teacher-tempered": "tempered",
    "teacher-bad": "bad",
    "teacher-misaligned": "misaligned",
}


def draw(results: Results, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in {"noise": noise, "teachers": teachers, "passes": passes, "kinds": kinds}.items():
        save(make(results), folder / f"study_{name}.svg")


def save(figure, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def noise(results: Results):
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained", sharex=True)
    for axis, measure, title in zip(axes, ("avg", "pass"), (_avg(results), _pass(results)), strict=True):
        for arm in FEW:
            points = [(rho, 100 * results.mean(f"{cell}/{arm}", measure)) for cell, rho in NOISE.items()]
            ends = [[100 * v for v in results.interval(f"{cell}/{arm}", measure)] for cell in NOISE]
            axis.plot(*zip(*points, strict=True), color=COLOURS[arm], marker="o", markersize=3, label=arm)
            axis.fill_between([x for x, _ in points], *zip(*ends, strict=True), color=COLOURS[arm], alpha=0.12)
        axis.axhline(100 * results.mean("base", measure), color=COLOURS["base"], ls=":", label="base")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("wrong steps in the demonstrations, %")
    axes[0].legend(fontsize=8)
    return figure


def teachers(results: Results):
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, measure, title in zip(axes, ("avg", "pass"), (_avg(results), _pass(results)), strict=True):
        for number, arm in enumerate(arm for arm in FEW if arm in WITH_TEACHER):
            for at, cell in enumerate(TEACHERS):
                low, high = results.interval(f"{cell}/{arm}", measure)
                x, value = at + 0.2 * (number - 1), 100 * results.mean(f"{cell}/{arm}", measure)
                axis.plot([x, x], [100 * low, 100 * high], color=COLOURS[arm], lw=1.5)
                axis.plot(x, value, "o", color=COLOURS[arm], markersize=4, label=arm if at == 0 else None)
        for arm in ("sft", "dft"):
            axis.axhline(
                100 * results.mean(f"centre/{arm}", measure), color=COLOURS[arm], ls=":", label=f"{arm} (no teacher)"
            )
        axis.set_xticks(range(len(TEACHERS)), TEACHERS.values(), fontsize=8)
        axis.set_title(title, fontsize=10)
    axes[0].legend(fontsize=8)
    return figure


def passes(results: Results):
    figure, axis = pyplot.subplots(figsize=(5.4, 3.6), layout="constrained")
    n = results.settings.samples
    for arm in ("base", *FEW):
        side = arm if arm == "base" else f"centre/{arm}"
        curve = [100 * results.mean(side, f"pass@{k}") for k in range(1, n + 1)]
        axis.plot(range(1, n + 1), curve, color=COLOURS[arm], label=arm, ls=":" if arm == "base" else "-")
    axis.set_xlabel("k")
    axis.set_title("pass@k at the centre, %", fontsize=10)
    axis.legend(fontsize=8)
    return figure


def kinds(results: Results):
    figures = {"trust": "trust in the label", "on_right_others": "share of the rest on other right tokens"}
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axis, (name, title) in zip(axes, figures.items(), strict=True):
        for number, arm in enumerate(FEW):
            for at, kind in enumerate(KINDS):
                value = results.kind(f"centre/{arm}", "before", kind, name)
                if value is not None:
                    axis.bar(at + 0.16 * (number - 2), value, 0.15, color=COLOURS[arm], label=arm if at == 1 else None)
        axis.set_xticks(range(len(KINDS)), [f"{kind} tokens" for kind in KINDS], fontsize=8)
        axis.set_ylim(0, 1.05)
        axis.set_title(f"{title}, before training", fontsize=10)
    axes[0].legend(fontsize=8)
    return figure


def _avg(results: Results) -> str:
    return f"avg@{results.settings.samples} at temperature 1, %"


def _pass(results: Results) -> str:
    return f"pass@{results.settings.samples}, %"
