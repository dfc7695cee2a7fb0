"""The results on record as arrays, and paired differences between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import records
from arms import WITH_TEACHER
from records import Content, Record

from qtarget.evaluation import scores


@dataclass(frozen=True)
class Contrast:
    """value: the difference. low, high: its 95 % interval. signs: (seeds above 0, below 0)."""

    value: float
    low: float
    high: float
    signs: tuple[int, int]

    @property
    def says(self) -> str:
        return "higher" if self.low > 0 else "lower" if self.high < 0 else "no difference shown"


class Results:
    """A plan's results.

    seeds: those whose every run is on record. dev, scores, rates: as of the record.
    """

    def __init__(self, record: Record):
        self.plan, self.settings = record.plan, record.plan.settings
        self.dev, self.scores, self.rates = record.dev(), record.scores(), record.rates()
        wanted = {pair for pair in self.plan.tuned if pair not in self.rates}
        runs = {seed: [] if wanted else self.plan.test_runs(self.rates, [seed]) for seed in self.settings.seeds}
        there = {seed: record.finished("test", runs[seed]) for seed in runs}
        models = {seed: records.read(record.models(seed), self.settings) for seed in runs}
        self.seeds = [seed for seed in runs if runs[seed] and len(there[seed]) == len(runs[seed]) and models[seed]]
        self.models = {seed: content["models"] for seed, content in models.items() if content and seed in self.seeds}
        self.runs = {(run.cell, run.arm, seed): content for seed in self.seeds for run, content in there[seed].items()}

    def of(self, side: str) -> list[Content]:
        """One content a seed."""
        side = side.removesuffix("@best")
        if "/" not in side:
            return [self.models[seed][side] for seed in self.seeds]
        cell, arm = side.split("/")
        return [self.runs[self.plan.cells[cell].where(arm), arm, seed] for seed in self.seeds]

    def has(self, side: str) -> bool:
        cell, arm = side.split("/")
        return arm in self.plan.cells[self.plan.cells[cell].where(arm)].arms

    def arms_of(self, cell: str) -> list[str]:
        """All that are compared in a condition, those whose runs are in another cell first."""
        here = self.plan.cells[cell]
        shared = [arm for arm in self.plan.cells[here.labels_from or cell].arms if arm not in WITH_TEACHER]
        return list(dict.fromkeys([*shared, *here.arms]))

    # -- measures, [seeds, problems] or [seeds, 1] ------------------------------------------------------------------

    def measure(self, side: str, name: str) -> np.ndarray:
        if side.startswith("all/"):
            arm = side.removeprefix("all/")
            return np.mean([self.measure(f"{cell}/{arm}", name) for cell in self.plan.cells], 0)
        contents = self.of(side)
        n = self.settings.samples
        if name == "avg":
            key = "test_best_temperature" if side.endswith("@best") else "test"
            return np.array([[value.bit_count() / n for value in content[key]] for content in contents])
        if name.startswith("pass"):
            k = int(name.removeprefix("pass@")) if "@" in name else n
            counts = np.array([[value.bit_count() for value in content["test"]] for content in contents])
            return np.array([scores.pass_at(n, row, k) for row in counts])
        if name == "best":
            return self.measure(f"{side}@best", "avg")
        if name == "greedy":
            return np.array([content["greedy"] for content in contents], float)
        if name == "longer":
            return np.array([[value.bit_count() / 4 for value in content["longer"]] for content in contents])
        get: Callable[[Content], float] = {
            "kl": lambda c: c["after"]["kl_to_base"],
            "norm": lambda c: c["training"]["norm"],
            "norm_clipped": lambda c: c["training"]["norm_clipped"],
            "gflops": lambda c: c["training"]["flops"] / 1e9,
        }.get(name, lambda c: c[name])
        return np.array([[get(content)] for content in contents], float)

    def mean(self, side: str, name: str) -> float:
        return float(self.measure(side, name).mean())

    def interval(self, side: str, name: str) -> tuple[float, float]:
        return scores.interval(scores.one_level(self.measure(side, name), 4000))

    def contrast(self, left: str, right: str, name: str) -> Contrast:
        """left − right, paired by seed and problem. A side may be a sum written with − between its parts."""
        values = self._sum(left, name) - self._sum(right, name)
        low, high = scores.interval(scores.one_level(values, 4000))
        seeds = values.mean(1)
        return Contrast(float(values.mean()), low, high, (int((seeds > 1e-12).sum()), int((seeds < -1e-12).sum())))

    def _sum(self, side: str, name: str) -> np.ndarray:
        first, *rest = side.split(" − ")
        total = self.measure(first, name)
        for part in rest:
            total = total - self.measure(part, name)
        return total

    def kind(self, side: str, when: str, kind: str, figure: str) -> float | None:
        """A figure of the probe, mean over seeds; None where a seed has none."""
        values = [content[when][kind][figure] for content in self.of(side)]
        return None if None in values else float(np.mean(values))
