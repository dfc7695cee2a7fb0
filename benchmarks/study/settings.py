"""Sizes and budgets of the study, and of its quick form."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Settings:
    """What decides a result, beside cell, arm and seed. Stored with every result; another value is another study.

    student, teacher: (width, layers). lengths: operations of a problem. Scores are of ``samples`` completions.
    middle_at: where the middle base is stopped; without one where None.
    rates: the learning rates an arm may have; it gets one by its score on the dev seeds. widen: where the best rate is
    at an edge, the next one of ``rates.LADDER`` is tried, too.
    """

    student: tuple[int, int] = (64, 2)
    teacher: tuple[int, int] = (96, 2)
    lengths: tuple[int, ...] = (3,)
    longer: int = 4
    test_problems: int = 120
    dev_problems: int = 60
    check_problems: int = 60
    samples: int = 16
    dev_samples: int = 8
    temperatures: tuple[float, ...] = (0.3, 0.5, 0.7, 1.0)
    base_noise: float = 0.05
    strong_at: float = 0.60
    middle_at: float | None = None
    weak_at: float = 0.10
    check_every: int = 50
    pretraining_steps: int = 1500
    pretraining_batch: int = 64
    pretraining_rate: float = 5e-3
    teacher_steps: int = 1000
    teacher_rate: float = 5e-3
    continued_steps: int = 100
    continued_rate: float = 1e-3
    steps: int = 150
    batch: int = 32
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    widen: bool = False
    probe_rows: int = 192
    probe_noise: float = 0.3
    psft_refresh: int = 8
    dev_seeds: tuple[int, ...] = (101, 102)
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)

    def record(self) -> dict[str, Any]:
        """As JSON holds it. The lists of seeds are left out, so that seeds can be added to a study; so are settings that
        came later and are off, so that the results from before them stay."""
        later = {"middle_at", "widen"}
        stored = {
            name: value
            for name, value in asdict(self).items()
            if name not in ("seeds", "dev_seeds") and (name not in later or value)
        }
        return {name: list(value) if isinstance(value, tuple) else value for name, value in stored.items()}


FULL = Settings()
FULL_GRID = replace(FULL, middle_at=0.30, rates=(1e-3, 3e-3, 1e-2), widen=True, dev_seeds=(101, 102, 103))
QUICK = Settings(
    student=(32, 1),
    teacher=(32, 1),
    lengths=(2,),
    longer=3,
    test_problems=12,
    dev_problems=8,
    check_problems=8,
    samples=4,
    dev_samples=2,
    temperatures=(0.5, 1.0),
    check_every=40,
    pretraining_steps=120,
    teacher_steps=120,
    continued_steps=10,
    steps=12,
    rates=(1e-3,),
    probe_rows=24,
    dev_seeds=(101,),
    seeds=(1,),
)
QUICK_GRID = replace(QUICK, middle_at=0.30)
# recipes/noise_demo.py: a teacher that is the base, trained on, has the base's size
DEMO = replace(FULL, teacher=FULL.student)
QUICK_DEMO = replace(QUICK, lengths=FULL.lengths)
