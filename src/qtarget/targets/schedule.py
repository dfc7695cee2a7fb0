"""Numbers of a target that change during training, and the target at each step.

    target: {preset: target-sft, eta: {schedule: linear, from: 0.0, to: 0.5, steps: 200}}
    target: {preset: dft, warmup_from_sft: 100}
    target: {preset: idft, strength: {schedule: linear, from: 0.0, to: 1.0, start: 0.2, steps: 0.1}}
    target: {preset: taid, t: [{schedule: constant, to: 0.4, steps: 100}, {schedule: linear, from: 0.4, to: 1.0}]}

Until ``start`` the value is ``from``. ``start`` and ``steps`` are whole numbers of steps, or shares of the run below 1. A
list is schedules one after another. A value depends on the step alone, so a resumed run goes on exactly where it stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qtarget.errors import ConfigError, check_range, unknown
from qtarget.targets.target import Target

KINDS = ("constant", "linear", "cosine")
_KEYS = ("schedule", "from", "to", "start", "steps")
_WARMUP = "warmup_from_sft"


@dataclass(frozen=True)
class Piece:
    """One number over a stretch of the run, from ``start`` to ``end`` and monotone between them.

    ``steps`` is a whole number, a share of the run below 1, or None: all that is left of the run.
    """

    kind: str
    start: float
    end: float
    steps: int | float | None = None

    def at(self, done: float) -> float:
        """The value where this share of the piece is done."""
        if self.kind == "constant" or done == 1:
            return self.end
        if self.kind == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.start + (self.end - self.start) * done

    @property
    def looks(self) -> tuple[float, float, float]:
        """The values at both ends and between them: what a target is at these, it is at all others."""
        return self.at(0), self.at(0.5), self.end


@dataclass(frozen=True)
class Schedule:
    """One number over time, piece after piece; after the last one it stays as it is."""

    pieces: tuple[Piece, ...]

    @property
    def end(self) -> float:
        return self.pieces[-1].end

    @property
    def looks(self) -> list[float]:
        return [value for piece in self.pieces for value in piece.looks]

    def _spans(self, total_steps: int) -> Iterator[tuple[Piece, int, int]]:
        """Each piece with the step it begins at, and the one at which it is over."""
        begin = 0
        for piece in self.pieces:
            steps = piece.steps if piece.steps is not None else max(0, total_steps - begin)
            end = begin + (round(steps * total_steps) if isinstance(steps, float) else steps)
            yield piece, begin, end
            begin = end

    def at(self, step: int, total_steps: int) -> float:
        """The value for the optimiser step that follows ``step`` finished ones."""
        for piece, begin, end in self._spans(total_steps):
            if step < end:
                return piece.at((step - begin) / (end - begin))
        return self.end

    def ahead(self, step: int, total_steps: int) -> list[float]:
        """The looks of the pieces that are not over at ``step``, and the last value."""
        return [v for piece, _, end in self._spans(total_steps) if step < end for v in piece.looks] + [self.end]

    def __str__(self) -> str:
        told: list[str] = []
        for piece in self.pieces:
            share = f"{piece.steps:.3g} of the run" if isinstance(piece.steps, float) else f"{piece.steps} steps"
            over = share if piece.steps is not None else f"the {'rest of the' if told else 'whole'} run"
            if piece.kind != "constant":
                told.append(f"{piece.start:g} → {piece.end:g} ({piece.kind}, {over})")
            else:
                told.append(f"{piece.end:g}" if piece is self.pieces[-1] else f"{piece.end:g} for {over}")
        return ", then ".join(told)


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
    _required: dict[tuple, frozenset[str]] = field(default_factory=dict, compare=False, repr=False)

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
        for look in range(max(len(schedule.looks) for schedule in schedules.values())):
            target._try(look)
        return target

    def _try(self, look: int) -> None:
        values = {place: s.looks[min(look, len(s.looks) - 1)] for place, s in self.schedules.items()}
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
            self._made.clear()  # one step's target is enough: most values do not come back
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
    def requires(self) -> frozenset[str]:
        """What the target cannot do without at some step."""
        if not self.schedules:
            return self.final.requires
        return self._requires({place: schedule.looks for place, schedule in self.schedules.items()})

    def requires_from(self, step: int, total_steps: int) -> frozenset[str]:
        """What the target cannot do without at this step or later."""
        if not self.schedules:
            return self.final.requires
        return self._requires({place: s.ahead(step, total_steps) for place, s in self.schedules.items()})

    def _requires(self, looks: Mapping[tuple[str, ...], Sequence[float]]) -> frozenset[str]:
        """What some combination of these values requires: where two numbers move, they meet at unknown steps."""
        key = tuple(map(tuple, looks.values()))
        if key not in self._required:
            required: set[str] = set()
            for values in itertools.product(*looks.values()):
                with contextlib.suppress(ConfigError):  # values that never meet
                    required |= self._build(dict(zip(looks, values, strict=True))).requires
            self._required[key] = frozenset(required)
        return self._required[key]

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
    field = ".".join(place) or "target"
    if isinstance(config, (list, tuple)) and any(
        isinstance(piece, Mapping) and "schedule" in piece for piece in config
    ):
        found[place] = _one_after_another(config, field)
    elif isinstance(config, Mapping) and "schedule" in config:
        piece = _parse(config, field)
        found[place] = Schedule((*_held(config, piece, field), piece))
    elif isinstance(config, Mapping):
        for key, value in config.items():
            _collect(value, (*place, str(key)), found)


def _one_after_another(config: Sequence, field: str) -> Schedule:
    pieces = []
    for number, written in enumerate(config, 1):
        of = f"{field}[{number}]"
        if not isinstance(written, Mapping) or "schedule" not in written:
            raise ConfigError(
                f"{of} is {written!r}; in a list of schedules each has its own schedule: linear, from, to"
            )
        if "start" in written:
            raise ConfigError(f"{of} has a start; in a list write a schedule: constant before it")
        pieces.append(_parse(written, of))
        if pieces[-1].steps is None and number < len(config):
            raise ConfigError(f"{of} has no steps; only the last of a list may run to the end")
    return Schedule(tuple(pieces))


def _held(config: Mapping, piece: Piece, field: str) -> list[Piece]:
    """The stretch before ``start``, if there is one."""
    if "start" not in config:
        return []
    if "from" not in config:
        raise ConfigError(f"the schedule of {field} has a start but no from, which is its value until then; give both")
    return [Piece("constant", piece.start, piece.start, _steps(config["start"], f"{field}.start"))]


def _parse(config: Mapping, field: str) -> Piece:
    for key in config:
        if key not in _KEYS:
            raise unknown(f"key of the schedule of {field}", key, _KEYS)
    kind = config["schedule"]
    if kind not in KINDS:
        raise unknown(f"schedule of {field}", kind, KINDS)
    if "to" not in config or ("from" not in config and kind != "constant"):
        raise ConfigError(f"the schedule of {field} has no {'to' if 'to' not in config else 'from'}; give both")
    end = check_range(f"{field}.to", config["to"])
    start = check_range(f"{field}.from", config.get("from", end))
    steps = config.get("steps")
    return Piece(kind, start, end, None if steps is None else _steps(steps, f"{field}.steps"))


def _steps(value: object, field: str) -> int | float:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    if isinstance(value, float) and 0 < value < 1:
        return value
    raise ConfigError(
        f"{field} is {value!r}; use a whole number of steps from 1, a share of the run below 1, or leave it out"
    )


def _replaced(config: Mapping, place: tuple[str, ...], value: float) -> dict:
    key, *rest = place
    changed = dict(config)
    changed[key] = _replaced(changed[key], tuple(rest), value) if rest else value
    return changed
