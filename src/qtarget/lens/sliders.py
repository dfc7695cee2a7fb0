"""How the numbers of a preset's composed form follow its hyperparameters, so that the page can move them.

The preset is built at two values of each hyperparameter, which gives ``{of: "smoothing", times: -1, plus: 1}`` for a
number that is 1 − smoothing; the form is then checked against the preset at other values. A hyperparameter that the
numbers follow in another way has no slider and stays as it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from qtarget.errors import ConfigError
from qtarget.targets import Target, TokenStats
from qtarget.targets.presets import Preset

# What a slider covers, by the name of the hyperparameter: text, least, most, step.
RANGES: dict[str, tuple[str, float, float, float]] = {
    "eta": ("eta η, the teacher’s share of the residual", 0, 1, 0.01),
    "alpha": ("alpha α, power of p_y", -1, 10, 0.1),
    "tau": ("tau τ, threshold on p_y", 0, 1, 0.01),
    "tau_low": ("tau_low, keep from this p_y", 0, 1, 0.01),
    "tau_high": ("tau_high, keep below this p_y", 0, 1, 0.01),
    "top_k": ("top_k, ids in the entropy", 2, 50, 1),
    "power": ("power of the entropy", 0.1, 4, 0.1),
    "kl_weight": ("kl_weight λ, weight of the reference", 0, 3, 0.01),
    "smoothing": ("smoothing ε", 0, 1, 0.01),
    "clip": ("clip", 0.01, 1, 0.01),
    "clip_high": ("clip_high (as clip until moved)", 0.01, 2, 0.01),
    "beta": ("beta β, temperature of the sharpened student", 0.1, 2, 0.05),
    "temperature": ("temperature T", 0.25, 8, 0.05),
    "teacher_temperature": ("teacher_temperature", 0.25, 8, 0.05),
    "kd_weight": ("kd_weight λ, the teacher’s share", 0, 1, 0.01),
}
_CHOICES: dict[str, tuple[Any, ...]] = {
    "direction": ("higher", "lower", "middle"),
    "normalizer": ("log_k", "none", 3.0),
    "h": ("linear", "logsigmoid"),
}
# Of a default None: the number to start from, or the hyperparameter whose value it has until it is moved.
_STARTS = {"tau_low": 0.1, "tau_high": 0.9}
_FOLLOWS = {"clip_high": "clip"}

# Tokens of every kind. Two targets that do the same to all of them are one.
_SPREAD = torch.linspace(0, 1, 97, dtype=torch.float64)
_LOG_P = -6 * _SPREAD - 1e-3
_PROBE = TokenStats(
    {
        "log_p_y": _LOG_P,
        "rest_mass": -torch.expm1(_LOG_P),
        "old_logps": _LOG_P + (9 * _SPREAD).sin(),
        "critical": (50 * _SPREAD).round() % 2,
        "weight": 3 * _SPREAD.roll(30),
        "entropy": 9 * _SPREAD.roll(40),
        "offset_mass": 0.1 + _SPREAD.roll(50),
        "teacher_log_p_y": -5 * _SPREAD.roll(60),
        "reference_log_p_y": -7 * _SPREAD.roll(70),
    },
    lambda k: _SPREAD.roll(20) * k**0.5,
)

Values = dict[str, Any]


def composed(target: Target) -> dict[str, Any]:
    """The target as ``{trust, residual, scale, share}``, whatever it is called."""
    config = target.with_share(1.0).named("composed", {}).to_config()
    assert isinstance(config, dict)
    config.pop("value", None)  # how the loss is reported plays no part here
    return config | ({} if target.share == 1 else {"share": target.share})


def slider(name: str, value: float) -> Values:
    """The control of a hyperparameter that stands at ``value``; one that ``RANGES`` does not know has a wide range."""
    wide = (0, 1) if value == 0 else (0.01, 1) if 0 < value <= 1 else sorted((value / 10, 4 * value))
    text, low, high, step = RANGES.get(name, (name, *wide, (wide[1] - wide[0]) / 100))
    return {"text": text, "start": value, "min": min(low, value), "max": max(high, value), "step": step}


def released(part: Any, controls: Values) -> Any:
    """A composed form whose parts' parameters have sliders; these go into ``controls``."""
    if isinstance(part, list):
        return [released(inner, controls) for inner in part]
    if not isinstance(part, Mapping):
        return part
    made = {}
    for key, value in part.items():
        name = key if key not in controls else f"{key}_{len(controls) + 1}"
        if key in RANGES and isinstance(value, (int, float)) and RANGES[key][1] <= value <= RANGES[key][2]:
            controls[name] = slider(key, value)
            made[key] = {"of": name, "times": 1, "plus": 0}
        else:
            made[key] = released(value, controls)
    return made


def of_preset(preset: Preset, hyperparameters: Values) -> tuple[Values, list[Values]]:
    """(controls by hyperparameter, forms), one form for each choice of the hyperparameters that are words."""
    values = {**preset.parameters, **hyperparameters}
    choices = {
        name: [v for v in dict.fromkeys((*_CHOICES[name], values[name])) if _accepted(preset, {**values, name: v})]
        for name in _CHOICES.keys() & values.keys()
    }
    choices = {name: words for name, words in choices.items() if len(words) > 1}
    pickings = [dict(zip(choices, picked, strict=True)) for picked in itertools.product(*choices.values())]
    controls: Values = {name: {"start": values[name], "choices": words} for name, words in choices.items()}
    forms = []
    for when in pickings:
        start = _accepted(preset, values | when)
        if start is not None:  # else two choices that do not go together
            form = _Form(preset, start, when)
            forms.append({"when": when, "sliders": [*form.controls], **form.tree})
            controls |= form.controls
    return {name: controls[name] for name in values if name in controls}, forms


def _accepted(preset: Preset, values: Values) -> Values | None:
    """These values as the preset takes them, a number in place of None or None; None where it takes neither."""
    empty = {name: None for name, default in preset.parameters.items() if default is None}
    numbers = {name: _STARTS[name] for name in empty if values[name] is None and name in _STARTS}
    for candidate in (values | numbers, values | empty):
        try:
            preset.build(**candidate)
            return candidate
        except ConfigError:
            continue
    return None


class _Form:
    """A preset's composed form around some values of its hyperparameters.

    tree: the form, with ``{of, times, plus}`` for what a slider moves. controls: the sliders that move something.
    """

    def __init__(self, preset: Preset, values: Values, when: Values):
        self.preset, self.values = preset, values
        self.tree = composed(preset.build(**values))
        self.controls: Values = {}
        for name, value in values.items():
            follows = _FOLLOWS.get(name) if value is None else None
            number = values[follows] if follows else value
            if name not in when and isinstance(number, (int, float)) and not isinstance(number, bool):
                control = slider(name, number)
                self._release(name, control | ({"start": None, "follows": follows} if follows else {}), number)

    def _release(self, name: str, control: Values, start: float) -> None:
        """Let ``name`` move the form, if it does, and if the form then is what the preset builds everywhere."""
        step = control["step"] if start + 7 * control["step"] <= control["max"] else -control["step"]
        near = (start + 3 * step, start + 7 * step)  # beside the start, which may be a special case
        controls = self.controls | {name: control | {"near": near}}
        if not any(self._moves(name, x) for x in (control["min"], *near, control["max"])):
            return
        points = {other: c["near"][0] for other, c in controls.items()}
        base, places = dict(_leaves(self._at(points))), {}
        for other, c in controls.items():
            x, further = c["near"]
            changed = dict(_leaves(self._at(points | {other: further})))
            if changed.keys() != base.keys():
                return
            for place in base:
                if changed[place] != base[place]:
                    times = _plain((changed[place] - base[place]) / (further - x))
                    places[place] = {"of": other, "times": times, "plus": _plain(base[place] - times * x)}
        tree = _replaced(self._at(points), places)
        values = [(c["min"], self.values[other], *c["near"], c["max"]) for other, c in controls.items()]
        for point in itertools.product(*values):
            numbers = dict(zip(controls, point, strict=True))
            try:
                target = self.preset.build(**self.values | numbers)
            except ConfigError:
                continue  # as where tau_low is above tau_high
            if not _alike(target, Target.from_config(filled_in(tree, numbers))):
                return
        self.tree, self.controls = tree, controls

    def _at(self, numbers: Values) -> Values:
        return composed(self.preset.build(**self.values | numbers))

    def _moves(self, name: str, value: float) -> bool:
        try:
            return not _alike(self.preset.build(**self.values | {name: value}), self.preset.build(**self.values))
        except ConfigError:
            return False


def _alike(one: Target, other: Target) -> bool:
    """Whether two targets do the same to every token."""
    weights = [torch.stack([a, *b]) for a, b in (one.weights(_PROBE), other.weights(_PROBE))]
    pools = [
        [[p.student, p.teacher, p.reference, p.offset_slope or 0] for _, p in target.residual_terms]
        for target in (one, other)
    ]
    return all(np.shape(x) == np.shape(y) and np.allclose(x, y, rtol=1e-9, atol=1e-12) for x, y in (weights, pools))


def filled_in(part: Any, numbers: Values) -> Any:
    """A form with its numbers put in, as targets.js does it."""
    if isinstance(part, list):
        return [filled_in(inner, numbers) for inner in part]
    if not isinstance(part, Mapping):
        return part
    if "of" in part:
        number = numbers[part["of"]]
        return None if number is None else part["plus"] + part["times"] * number
    return {key: filled_in(inner, numbers) for key, inner in part.items()}


def _leaves(part: Any, place: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """(place, value) of everything in a form that is neither a mapping nor a list."""
    inner = part.items() if isinstance(part, Mapping) else enumerate(part) if isinstance(part, list) else None
    if inner is None:
        yield place, part
    else:
        for key, value in inner:
            yield from _leaves(value, (*place, key))


def _replaced(part: Any, places: Mapping[tuple, Values], place: tuple = ()) -> Any:
    """A form with other values at some places."""
    if isinstance(part, Mapping):
        return {key: _replaced(value, places, (*place, key)) for key, value in part.items()}
    if isinstance(part, list):
        return [_replaced(value, places, (*place, key)) for key, value in enumerate(part)]
    return places.get(place, part)


def _plain(number: float) -> float:
    """Without rounding's last digits; a whole number is an integer, as top_k has to be."""
    number = round(number, 12)
    return int(number) if number == int(number) else number
