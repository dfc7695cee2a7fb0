"""How far each arm of a plan ends from the best one of each condition: what not knowing the condition costs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from results import Results

from qtarget.evaluation import scores

DRAWS = 4000


@dataclass(frozen=True)
class Span:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float


class Regret:
    """Of one measure: avg, pass or greedy.

    arms: those that every condition has. behind: [cells, arms] how far each is from the best arm of the cell, from 0 up.
    Intervals are of a bootstrap over seeds and problems, drawn once for all cells and arms, in which the best arm is
    looked for anew each time. The best of many is best by luck, too, so every arm looks a little farther away than it is.
    """

    def __init__(self, results: Results, measure: str):
        self.cells = list(results.plan.cells)
        of = {cell: results.arms_of(cell) for cell in self.cells}
        self.arms = [arm for arm in of[self.cells[0]] if all(arm in of[cell] for cell in self.cells)]
        values = np.array([[results.measure(f"{cell}/{arm}", measure) for arm in self.arms] for cell in self.cells])
        self.means = values.mean((2, 3))
        self.behind = self.means.max(1, keepdims=True) - self.means
        drawn = _drawn(values)
        self._drawn = drawn.max(2, keepdims=True) - drawn

    def best(self, cell: str) -> str:
        return self.arms[int(self.means[self.cells.index(cell)].argmax())]

    def at(self, cell: str, arm: str) -> Span:
        here = self.cells.index(cell), self.arms.index(arm)
        return Span(self.behind[here], *scores.interval(self._drawn[:, *here]))

    def mean(self, arm: str) -> Span:
        number = self.arms.index(arm)
        return Span(self.behind[:, number].mean(), *scores.interval(self._drawn[:, :, number].mean(1)))

    def worst(self, arm: str) -> tuple[str, Span]:
        """The condition in which it is farthest behind, and how far the farthest is."""
        number = self.arms.index(arm)
        cell = self.cells[int(self.behind[:, number].argmax())]
        return cell, Span(self.behind[:, number].max(), *scores.interval(self._drawn[:, :, number].max(1)))

    @property
    def by_mean(self) -> list[str]:
        """Arms, that with the least regret first."""
        return sorted(self.arms, key=lambda arm: self.behind[:, self.arms.index(arm)].mean())


def _drawn(values: np.ndarray) -> np.ndarray:
    """[draws, cells, arms] means with seeds and problems drawn anew, from [cells, arms, seeds, problems]."""
    cells, arms, seeds, problems = values.shape
    generator = np.random.default_rng(0)
    weight_s = generator.multinomial(seeds, np.full(seeds, 1 / seeds), DRAWS) / seeds
    weight_p = generator.multinomial(problems, np.full(problems, 1 / problems), DRAWS) / problems
    weights = (weight_s[:, :, None] * weight_p[:, None]).reshape(DRAWS, -1)
    return (weights @ values.reshape(cells * arms, -1).T).reshape(DRAWS, cells, arms)
