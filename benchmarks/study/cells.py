"""The conditions, in two plans: one thing changed at a time around a centre, and a grid of bases and teachers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import chains
from arms import ARMS, DIALS, FEW, LABELS, PRESETS, TEACHERS, WITH_TEACHER
from chains import MIXED, ONE, UNSEEN, Style
from settings import FULL, FULL_GRID, QUICK, QUICK_GRID, Settings


@dataclass(frozen=True)
class Cell:
    """A condition.

    teacher_scale multiplies the teacher's logits: 2 is temperature 0.5. times: so many times the steps.
    rates_from: the cell whose dev runs chose the learning rates; its own where empty.
    labels_from: the cell that has the runs of the arms without a teacher; the cell itself where empty.
    """

    name: str
    says: str
    noise: float = 0.15
    kind: str = "carried"
    style: Style = ONE
    base: str = "base"
    teacher: str = "good"
    teacher_scale: float = 1.0
    clip: float | None = 1.0
    own_samples: bool = False
    times: int = 1
    rates_from: str = ""
    labels_from: str = ""
    arms: tuple[str, ...] = field(default=FEW)

    def where(self, arm: str) -> str:
        """The name of the cell in which the arm's runs of this condition are."""
        return self.labels_from if self.labels_from and arm not in WITH_TEACHER else self.name


@dataclass(frozen=True)
class Run:
    """One training."""

    seed: int
    cell: str
    arm: str
    rate: float


@dataclass(frozen=True)
class Plan:
    """name: of the folder of its results. rate_of: {arm: the arm whose learning rate it takes}."""

    name: str
    settings: Settings
    cells: Mapping[str, Cell]
    rate_of: Mapping[str, str]

    @property
    def tuned(self) -> list[tuple[str, str]]:
        """(cell, arm) of every pair that gets a learning rate of its own."""
        own = [cell for cell in self.cells.values() if not cell.rates_from]
        return [(cell.name, arm) for cell in own for arm in cell.arms if arm not in self.rate_of]

    def dev_runs(self, wanted: Iterable[tuple[str, str, float]]) -> list[Run]:
        """Runs of (cell, arm, rate) on every dev seed."""
        return [Run(seed, *one) for one in wanted for seed in self.settings.dev_seeds]

    def test_runs(self, rates: Mapping[tuple[str, str], float], seeds: Iterable[int] | None = None) -> list[Run]:
        """Every cell and arm; a seed is finished before the next begins."""
        return [
            Run(seed, cell.name, arm, rates[cell.rates_from or cell.name, self.rate_of.get(arm, arm)])
            for seed in (self.settings.seeds if seeds is None else seeds)
            for cell in self.cells.values()
            for arm in cell.arms
        ]

    @property
    def models(self) -> list[str]:
        """Names of the bases and teachers, weakest base first."""
        used = {name for cell in self.cells.values() for name in (cell.base, cell.teacher)}
        return [name for name in ("weak", "middle", "base", "good", "bad", "misaligned", "sharp") if name in used]


# -- one thing at a time -------------------------------------------------------------------------------------------

CENTRE = Cell(
    "centre", "15 % wrong steps, one style, good teacher, strong base", arms=tuple(a.name for a in [*PRESETS, *DIALS])
)
_TEACHERS = {
    "bad": "the teacher was trained on with 15 % wrong steps",
    "misaligned": "the teacher was trained on in the other layout only",
    "sharp": "the teacher was trained on with clean demonstrations of the style",
}


def _beside(name: str, says: str, arms: tuple[str, ...] = FEW, **changed: object) -> Cell:
    return replace(CENTRE, name=name, says=says, arms=arms, rates_from="centre", **changed)


def _other_teacher(name: str, says: str, **changed: object) -> Cell:
    with_teacher = tuple(arm for arm in FEW if arm in WITH_TEACHER)
    return _beside(f"teacher-{name}", says, with_teacher, labels_from="centre", **changed)


AXES = [
    CENTRE,
    *(
        _beside(f"noise-{round(100 * rho)}", f"{round(100 * rho)} % wrong steps", noise=rho)
        for rho in (0.0, 0.05, 0.3, 0.5)
    ),
    _beside("isolated", "a wrong step does not carry over", kind="isolated"),
    _beside("style-mixed", "demonstrations in all styles", style=MIXED),
    _beside("style-unseen", "a layout that no model has seen", style=UNSEEN),
    _beside("base-weak", "a base that can hardly do the task", base="weak"),
    *(_other_teacher(name, says, teacher=name) for name, says in _TEACHERS.items()),
    _other_teacher("tempered", "the good teacher at temperature 0.5", teacher_scale=2.0),
    _beside("clip-off", "no gradient clipping", clip=None),
    _beside("own-samples", "the base's own samples as demonstrations", ("sft", "dft"), own_samples=True),
]
_RATE_OF = {arm.name: arm.target["preset"] for arm in DIALS}

# -- the grid ------------------------------------------------------------------------------------------------------

BASES = {"weak": "weak", "middle": "middle", "strong": "base"}
GUIDES = {"sharp": ("sharp", 1.0), "good": ("good", 1.0), "cold": ("good", 3.0), "bad": ("bad", 1.0)}
CORNER = "weak-sharp"


def _grid() -> list[Cell]:
    cells = []
    for base, model in BASES.items():
        for number, (guide, (teacher, scale)) in enumerate(GUIDES.items()):
            labels = LABELS if number == 0 else ()  # the labels are the same whoever teaches
            cells.append(
                Cell(
                    f"{base}-{guide}",
                    f"{base} base, {guide} teacher",
                    base=model,
                    teacher=teacher,
                    teacher_scale=scale,
                    labels_from="" if labels else f"{base}-{next(iter(GUIDES))}",
                    arms=(*labels, *TEACHERS),
                )
            )
    corner = next(cell for cell in cells if cell.name == CORNER)
    return [
        *cells,
        replace(corner, name=f"{CORNER}-noise-0", says="the corner without wrong steps", noise=0.0),
        replace(corner, name=f"{CORNER}-noise-30", says="the corner with 30 % wrong steps", noise=0.3),
        replace(corner, name=f"{CORNER}-long", says="the corner with three times the steps", times=3),
    ]


GRID = _grid()

# -- the minute's demonstration, recipes/noise_demo.py: in no plan --------------------------------------------------

DEMO = _beside(
    "demo",
    "15 % of the demonstrations, of three steps each, have a wrong one",
    ("sft", "dft", "target-sft"),
    noise=1 - 0.85 ** (1 / 3),
    teacher="tutor",
)
CELLS = {cell.name: cell for cell in [*AXES, *GRID, DEMO]}


def plans(quick: bool) -> tuple[Plan, Plan]:
    """(one thing at a time, the grid)."""
    axes, grid = (QUICK, QUICK_GRID) if quick else (FULL, FULL_GRID)
    return (
        Plan("one_at_a_time", axes, {cell.name: cell for cell in AXES}, _RATE_OF),
        Plan("grid", grid, {cell.name: cell for cell in GRID}, {}),
    )


def demonstrations(
    cell: Cell, seed: int, count: int, lengths: tuple[int, ...]
) -> list[tuple[chains.Problem, chains.Solution]]:
    """The same problems in all cells of a seed."""
    return chains.demonstrations(f"demonstrations {seed}", count, lengths, cell.style, cell.noise, cell.kind)


assert {arm for cell in CELLS.values() for arm in cell.arms} == {*ARMS}
