"""The results on record as arrays, and paired differences between them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import arms
import numpy as np
from arms import CELLS, WITH_TEACHER
from settings import Settings

from qtarget.evaluation import scores

Content = dict[str, Any]


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
    """seeds: those whose every run is on record. rates: of the arms."""

    def __init__(self, settings: Settings, folder: Path):
        self.settings, self.folder = settings, folder
        self.dev = {
            (run.arm, run.rate): [self._read(f"dev/{other.file}") for other in same]
            for run in arms.dev_runs(settings.dev_seeds[:1], settings.rates)
            for same in [[arms.Run(seed, "centre", run.arm, run.rate) for seed in settings.dev_seeds]]
        }
        self.rates = arms.chosen_rates(
            {key: [content["dev"]["1.0"] for content in found] for key, found in self.dev.items()}
        )
        self.seeds = [
            seed
            for seed in settings.seeds
            if (folder / f"models/seed-{seed}.json").exists()
            and all((folder / "test" / run.file).exists() for run in arms.test_runs([seed], self.rates))
        ]
        self.models = {seed: self._read(f"models/seed-{seed}.json")["models"] for seed in self.seeds}
        self.runs = {
            (run.cell, run.arm, run.seed): self._read(f"test/{run.file}")
            for run in arms.test_runs(self.seeds, self.rates)
        }

    def _read(self, name: str) -> Content:
        content = json.loads((self.folder / name).read_text())
        if content["settings"] != json.loads(json.dumps(self.settings.record())):
            raise SystemExit(f"{name} was made with other settings")
        return content

    def of(self, side: str) -> list[Content]:
        """One content a seed. A teacher's cell has the centre's runs of arms without a teacher."""
        side = side.removesuffix("@best")
        if "/" not in side:
            return [self.models[seed][side] for seed in self.seeds]
        cell, arm = side.split("/")
        if cell.startswith("teacher-") and arm not in WITH_TEACHER:
            cell = "centre"
        return [self.runs[cell, arm, seed] for seed in self.seeds]

    def has(self, side: str) -> bool:
        cell, _, arm = side.partition("/")
        return not arm or arm in CELLS[cell].arms or (cell.startswith("teacher-") and arm in CELLS["centre"].arms)

    # -- measures, [seeds, problems] or [seeds, 1] ------------------------------------------------------------------

    def measure(self, side: str, name: str) -> np.ndarray:
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
