"""Numbers of a target that move during training, and the target at each step.

    target: {preset: target-sft, eta: {schedule: linear, from: 0.0, to: 0.5, steps: 200}}
    target: {preset: dft, warmup_from_sft: 100}

A value depends on the step alone, so a resumed run goes on exactly where it stopped.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qtarget.errors import ConfigError, check_range, unknown
from qtarget.targets.target import Target

KINDS = ("constant", "linear", "cosine")
_KEYS = ("schedule", "from", "to", "steps")
_WARMUP = "warmup_from_sft"


@dataclass(frozen=True)
class Schedule:
    """One number over time: ``start`` at step 0, ``end`` from step ``steps`` on (None: the whole run)."""

    kind: str
    start: float
    end: float
    steps: int | None = None

    def at(self, step: int, total_steps: int) -> float:
        """The value for the optimiser step that follows ``step`` finished ones."""
        steps = self.steps if self.steps is not None else total_steps
        done = 1.0 if steps <= 0 else min(1.0, step / steps)
        if self.kind == "constant" or done == 1.0:
            return self.end
        if self.kind == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.start + (self.end - self.start) * done

    def __str__(self) -> str:
        over = "the whole run" if self.steps is None else f"{self.steps} steps"
        return f"{self.end:g}" if self.kind == "constant" else f"{self.start:g} → {self.end:g} ({self.kind}, {over})"


@dataclass(frozen=True)
class ScheduledTarget:
    """A target as configured: fixed, or with numbers on a schedule.

    Attributes:
        config: what was written: a ``Target``, or its YAML form with schedules in it.
        schedules: the numbers that move, by their place in ``config``, such as ``("eta",)``.
    """

    config: Any
    schedules: dict[tuple[str, ...], Schedule] = field(default_factory=dict)
    _made: dict[tuple[float, ...], Target] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def read(cls, config: object) -> ScheduledTarget:
        """From what ``Target.from_config`` reads, with ``{schedule: ...}`` in place of any number.

        Raises:
            ConfigError: a faulty target or schedule, or one that leaves its parameter's range.
        """
        if isinstance(config, ScheduledTarget):
            return config
        if isinstance(config, Mapping):
            config = dict(config)
            if _WARMUP in config:
                config["share"] = _warmup(config)
        schedules: dict[tuple[str, ...], Schedule] = {}
        _collect(config, (), schedules)
        target = cls(config, schedules)
        if not schedules:
            _ = target.final  # built once; every step has it
            return target
        for done in (0.0, 0.5, 1.0):  # the values are monotone between these
            target._try(done)
        return target

    def _try(self, done: float) -> None:
        total = 1000
        values = {
            place: s.at(round(done * (total if s.steps is None else s.steps)), total)
            for place, s in self.schedules.items()
        }
        try:
            self._build(values)
        except ConfigError as error:
            shown = ", ".join(f"{'.'.join(place)} {s}" for place, s in self.schedules.items())
            raise ConfigError([f"on the schedule {shown}: {fault}" for fault in error.faults]) from None

    def _build(self, values: Mapping[tuple[str, ...], float]) -> Target:
        config = self.config
        for place, value in values.items():
            config = _replaced(config, place, value)
        return Target.from_config(config)

    def at(self, step: int, total_steps: int) -> Target:
        """The target for the optimiser step that follows ``step`` finished ones."""
        if not self.schedules:
            return self.final
        values = {place: schedule.at(step, total_steps) for place, schedule in self.schedules.items()}
        key = tuple(values.values())
        if key not in self._made:
            self._made.clear()  # one step's target is enough: a schedule does not come back
            self._made[key] = self._build(values)
        return self._made[key]

    def values(self, step: int, total_steps: int) -> dict[str, float]:
        """The numbers that move, as they are at that step."""
        return {".".join(place): schedule.at(step, total_steps) for place, schedule in self.schedules.items()}

    @functools.cached_property
    def final(self) -> Target:
        """The target once every schedule has ended."""
        return self._build({place: schedule.end for place, schedule in self.schedules.items()})

    @functools.cached_property
    def first(self) -> Target:
        """The target of the first step."""
        return self._build({place: schedule.at(0, 1) for place, schedule in self.schedules.items()})

    @functools.cached_property
    def requires(self) -> frozenset[str]:
        """What the target cannot do without at some step."""
        if not self.schedules:
            return self.final.requires
        middle = {place: (schedule.start + schedule.end) / 2 for place, schedule in self.schedules.items()}
        return self.first.requires | self._build(middle).requires | self.final.requires

    def to_config(self) -> Any:
        """The YAML form, schedules included."""
        return self.config if self.schedules else self.final.to_config()

    def __str__(self) -> str:
        if not self.schedules:
            return str(self.final)
        moving = ", ".join(f"{'.'.join(place)} {schedule}" for place, schedule in self.schedules.items())
        return f"{dataclasses.replace(self.final, share=1.0)} with {moving}"


def _warmup(config: dict) -> dict:
    steps = config.pop(_WARMUP)
    if "share" in config:
        raise ConfigError(f"target has both share and {_WARMUP}, which is a schedule of share; keep one of them")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"{_WARMUP} is {steps!r}; use the number of steps, a whole number from 1")
    return {"schedule": "linear", "from": 0.0, "to": 1.0, "steps": steps}


def _collect(config: object, place: tuple[str, ...], found: dict[tuple[str, ...], Schedule]) -> None:
    if not isinstance(config, Mapping):
        return
    if "schedule" in config:
        found[place] = _parse(config, ".".join(place) or "target")
        return
    for key, value in config.items():
        _collect(value, (*place, str(key)), found)


def _parse(config: Mapping, field: str) -> Schedule:
    for key in config:
        if key not in _KEYS:
            raise unknown(f"key of the schedule of {field}", key, _KEYS)
    kind = config["schedule"]
    if kind not in KINDS:
        raise unknown(f"schedule of {field}", kind, KINDS)
    if "to" not in config or ("from" not in config and kind != "constant"):
        raise ConfigError(f"the schedule of {field} lacks its {'to' if 'to' not in config else 'from'}; give both")
    end = check_range(f"{field}.to", config["to"])
    start = check_range(f"{field}.from", config.get("from", end))
    steps = config.get("steps")
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise ConfigError(f"{field}.steps is {steps!r}; use a whole number from 1, or leave it out for the whole run")
    return Schedule(kind, start, end, steps)


def _replaced(config: Mapping, place: tuple[str, ...], value: float) -> dict:
    key, *rest = place
    changed = dict(config)
    changed[key] = _replaced(changed[key], tuple(rest), value) if rest else value
    return changed
