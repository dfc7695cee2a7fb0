"""What is compared: arms (objectives), cells (conditions), and the rule that gives an arm its learning rate."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import chains
from chains import MIXED, ONE, UNSEEN, Style

import qtarget as qt


@dataclass(frozen=True)
class Arm:
    """target: as a recipe holds it. rate_of: the arm whose learning rate it takes; its own where None."""

    name: str
    target: dict[str, Any]
    rate_of: str | None = None

    def build(self) -> qt.Target:
        return qt.Target.from_config(self.target)


def _arm(name: str, preset: str, rate_of: str | None = None, **parameters: Any) -> Arm:
    return Arm(name, {"preset": preset, **parameters}, rate_of)


def _asked_for(name: str) -> Arm:
    """A preset at its defaults, or one with a divergence, as in ``kd+jsd``."""
    preset, _, divergence = name.partition("+")
    return _arm(name, preset, **({"divergence": divergence} if divergence else {}))


# The fifteen of the paper's table at their defaults, but for two: beyond-log's default has dft's gradient, and profit's
# threshold is BLL's. The quick form takes more, named in the environment, where the processes it starts see them too.
FIFTEEN = (
    "sft",
    "dft",
    "beyond-log",
    "profit",
    "eaft",
    "iw-sft",
    "cft",
    "label-smoothing",
    "sft-kl",
    "asft",
    "psft",
    "gem",
    "kd",
    "kd-hybrid",
    "target-sft",
)
FURTHER = os.environ.get("STUDY_ARMS", "").split()
PRESETS = [
    *(_arm(name, name, **{"beyond-log": {"alpha": 0.5}, "profit": {"tau": 0.2}}.get(name, {})) for name in FIFTEEN),
    *map(_asked_for, FURTHER),
]
# Dials around the centre, at the rate of the arm they belong to.
DIALS = [
    _arm("beyond-log-2", "beyond-log", "beyond-log", alpha=2.0),
    *(_arm(f"target-sft-{eta}", "target-sft", "target-sft", eta=eta) for eta in (0.0, 0.1, 0.25, 0.75, 1.0)),
]
ARMS = {arm.name: arm for arm in [*PRESETS, *DIALS]}
FEW = ("sft", "dft", "kd", "kd-hybrid", "target-sft")
WITH_TEACHER = ("kd", "kd-hybrid", "target-sft")


@dataclass(frozen=True)
class Cell:
    """A condition. Every cell but the centre differs from it in one thing."""

    name: str
    says: str
    noise: float = 0.15
    kind: str = "carried"
    style: Style = ONE
    base: str = "base"
    teacher: str = "good"
    teacher_scale: float = 1.0  # multiplies the teacher's logits: 2 is temperature 0.5
    clip: float | None = 1.0
    own_samples: bool = False
    arms: tuple[str, ...] = field(default=FEW)


CENTRE = Cell("centre", "15 % wrong steps, one style, good teacher, strong base", arms=tuple(ARMS))
_TEACHERS = {
    "bad": "the teacher was trained on with 15 % wrong steps",
    "misaligned": "the teacher was trained on in the other layout only",
    "sharp": "the teacher was trained on with clean demonstrations of the style",
}
CELLS = {
    cell.name: cell
    for cell in [
        CENTRE,
        *(
            replace(
                CENTRE, name=f"noise-{round(100 * rho)}", says=f"{round(100 * rho)} % wrong steps", noise=rho, arms=FEW
            )
            for rho in (0.0, 0.05, 0.3, 0.5)
        ),
        replace(CENTRE, name="isolated", says="a wrong step does not carry over", kind="isolated", arms=FEW),
        replace(CENTRE, name="style-mixed", says="demonstrations in all styles", style=MIXED, arms=FEW),
        replace(CENTRE, name="style-unseen", says="a layout that no model has seen", style=UNSEEN, arms=FEW),
        replace(CENTRE, name="base-weak", says="a base that can hardly do the task", base="weak", arms=FEW),
        *(
            replace(CENTRE, name=f"teacher-{name}", says=says, teacher=name, arms=WITH_TEACHER)
            for name, says in _TEACHERS.items()
        ),
        replace(
            CENTRE,
            name="teacher-tempered",
            says="the good teacher at temperature 0.5",
            teacher_scale=2.0,
            arms=WITH_TEACHER,
        ),
        replace(CENTRE, name="clip-off", says="no gradient clipping", clip=None, arms=FEW),
        replace(
            CENTRE,
            name="own-samples",
            says="the base's own samples as demonstrations",
            own_samples=True,
            arms=("sft", "dft"),
        ),
    ]
}


@dataclass(frozen=True)
class Run:
    """One training: its result is one file."""

    seed: int
    cell: str
    arm: str
    rate: float

    @property
    def file(self) -> str:
        return f"{self.cell}/{self.arm}/seed-{self.seed}-rate-{self.rate:g}.json"


def dev_runs(seeds: Iterable[int], rates: Iterable[float]) -> list[Run]:
    """The centre at every rate, of every arm that has a rate of its own."""
    rates = list(rates)
    return [
        Run(seed, "centre", arm.name, rate)
        for seed in seeds
        for arm in PRESETS
        if arm.rate_of is None
        for rate in rates
    ]


def chosen_rates(scores: Mapping[tuple[str, float], list[float]]) -> dict[str, float]:
    """{arm: rate} with the highest mean score over dev seeds; of equal ones the lowest rate.

    Args:
        scores: {(arm, rate): avg@n on dev problems, one a dev seed}.

    >>> chosen_rates({("sft", 1e-3): [0.5, 0.7], ("sft", 3e-4): [0.6, 0.6], ("dft", 1e-3): [0.1]})
    {'sft': 0.0003, 'dft': 0.001}
    """
    best: dict[str, tuple[float, float]] = {}
    for (arm, rate), found in scores.items():
        entry = (sum(found) / len(found), -rate)
        best[arm] = max(best.get(arm, entry), entry)
    return {arm: -rate for arm, (_, rate) in best.items()}


def test_runs(seeds: Iterable[int], rates: Mapping[str, float]) -> list[Run]:
    """Every cell and arm; a seed is finished before the next begins."""
    return [
        Run(seed, cell.name, name, rates[ARMS[name].rate_of or name])
        for seed in seeds
        for cell in CELLS.values()
        for name in cell.arms
    ]


def demonstrations(
    cell: Cell, seed: int, count: int, lengths: tuple[int, ...]
) -> list[tuple[chains.Problem, chains.Solution]]:
    """The same problems in all cells of a seed."""
    return chains.demonstrations(f"demonstrations {seed}", count, lengths, cell.style, cell.noise, cell.kind)
