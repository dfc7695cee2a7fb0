"""Which sliders a target has on the page, and which of its numbers they move.

A preset is built at values that nothing else has; a number of its form that is such a value h, 1 − h or −h becomes
``{of: "smoothing", times: -1, plus: 1}``. The form is then checked against the preset at other values. Where the preset
uses a hyperparameter in another way, it has no slider and stays as it is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any

from qtarget.targets import Target
from qtarget.targets.divergence import Divergence
from qtarget.targets.presets import Preset
from qtarget.targets.yaml_form import names_code

# What a slider covers: text, least, most, step. By the hyperparameter's name, or first the name of its preset or part. A
# letter means something else in every preset; the formula above the slider says what.
RANGES: dict[str, tuple[str, float, float, float]] = {
    "eta": ("eta η, the teacher’s share of the residual", 0, 1, 0.01),
    "alpha": ("alpha α", -1, 10, 0.1),
    "tau": ("tau τ", 0, 1, 0.01),
    "tau_low": ("tau_low, keep from this p_y", 0, 1, 0.01),
    "tau_high": ("tau_high, keep up to this p_y", 0, 1, 0.01),
    "top_k": ("top_k", 2, 50, 1),
    "power": ("power", 0.1, 4, 0.1),
    "kl_weight": ("kl_weight λ, weight of the residual", 0, 3, 0.01),
    "smoothing": ("smoothing ε", 0, 1, 0.01),
    "clip": ("clip", 0.01, 1, 0.01),
    "clip_high": ("clip_high (as clip until moved)", 0.01, 2, 0.01),
    "beta": ("beta β", 0.1, 2, 0.05),
    "temperature": ("temperature T", 0.25, 8, 0.05),
    "teacher_temperature": ("teacher_temperature", 0.25, 8, 0.05),
    "kd_weight": ("kd_weight λ, the teacher’s share", 0, 1, 0.01),
    "symmetric-ce.alpha": ("alpha α", 0, 2, 0.01),
    "gift.beta": ("beta β", 0.1, 30, 0.1),
    "idft.low": ("low, least of the exponent’s factor", 0, 1, 0.01),
    "idft.high": ("high, most of the exponent’s factor", 1, 4, 0.01),
    "poly.epsilon": ("epsilon ε", -1, 5, 0.1),
    "focal.gamma": ("gamma γ", 0, 5, 0.1),
    "infosft.confidence": ("confidence", 0.51, 0.99, 0.01),
    "stm.perplexity": ("perplexity", 1, 100, 0.5),
    "jsd.beta": ("beta β, the residual’s share of the mixture", 0.01, 0.99, 0.01),
    "skew_kl.alpha": ("alpha α, the residual’s share of the mixture", 0.01, 0.99, 0.01),
    "skew_reverse_kl.alpha": ("alpha α, the student’s share of the mixture", 0.01, 0.99, 0.01),
    "alpha.alpha": ("alpha α, from reverse KL at 0 to forward KL at 1", 0, 1, 0.01),
    "todi.slope": ("slope of the weight", 0, 10, 0.1),
}
# The words a hyperparameter may be, each with the hyperparameters that then play no part.
_CHOICES: dict[str, dict[Any, tuple[str, ...]]] = {
    "direction": {"higher": (), "lower": (), "middle": ("tau",), "forward": (), "reverse": ()},
    "by": {"prob": ("threshold",), "mass": ()},
    "toward": {"reference": (), "teacher": ()},
    "held": {False: (), True: ()},
    "normalizer": {"log_k": (), "none": (), 3.0: ()},
    "h": {"linear": (), "logsigmoid": ()},
}
# Of a default None: the number to start from, or the hyperparameter whose value it has until it is moved.
_STARTS = {"tau_low": 0.1, "tau_high": 0.9}
_FOLLOWS = {"clip_high": "clip"}
_DIVERGENCE = "divergence"
_WAYS = ((1, 0), (-1, 1), (-1, 0))

Values = dict[str, Any]


def composed(target: Target) -> Values:
    """The target as ``{trust, residual, scale, share}``, the residual a list. One of somebody's own is a pool there."""
    config = target.to_config(composed=True)
    assert isinstance(config, dict)
    config.pop("value", None)  # how the loss is reported plays no part here
    residual = config["residual"] if isinstance(config["residual"], list) else [config["residual"]]
    for place, (factor, pool, _) in enumerate(target.residual):
        beside, named = split(residual[place])
        if names_code(named) and pool.offset_slope is None:
            residual[place] = {**beside, "weight": factor, "pool": pool.nonzero}
    return config | {"residual": residual}


def split(residual: Any) -> tuple[Values, Any]:
    """The divergence of a residual as YAML writes it, if there is one, and the rest."""
    if not isinstance(residual, Mapping):
        return {}, residual
    beside = {key: value for key, value in residual.items() if key == _DIVERGENCE}
    return beside, {key: value for key, value in residual.items() if key != _DIVERGENCE}


def on_page(divergence: Any) -> bool:
    """Whether the page knows a divergence, as YAML writes it: one of the library's."""
    kind = Divergence.known.get(divergence if isinstance(divergence, str) else next(iter(divergence)))
    return kind is not None and kind.__module__ == Divergence.__module__


def slider(name: str, value: float, owner: str = "") -> Values:
    """The control of a hyperparameter that stands at ``value``; of one that ``RANGES`` lacks, with a range around it."""
    wide = (0, 1) if value == 0 else (0.01, 1) if 0 < value <= 1 else sorted((value / 10, 4 * value))
    around = (
        (min(1, value), 4 * value, 1)
        if isinstance(value, int) and value > 0
        else (*wide, round((wide[1] - wide[0]) / 100, 2))
    )
    text, low, high, step = RANGES.get(f"{owner}.{name}") or RANGES.get(name, (name, *around))
    return {"text": text, "start": value, "min": min(low, value), "max": max(high, value), "step": step}


def of_parts(part: Any, controls: Values, owner: str = "") -> Any:
    """A composed form with a slider for every parameter of its parts that ``RANGES`` has; they go into ``controls``."""
    if isinstance(part, list):
        return [of_parts(inner, controls) for inner in part]
    if not isinstance(part, Mapping):
        return part
    form = {}
    for key, value in part.items():
        _, low, high, _ = RANGES.get(f"{owner}.{key}") or RANGES.get(key, ("", 0, -1, 0))
        if isinstance(value, (int, float)) and low <= value <= high:
            name = key if key not in controls else f"{key}_{len(controls) + 1}"
            controls[name] = slider(key, value, owner)
            controls[name]["text"] += f" ({owner})"
            form[key] = {"of": name, "times": 1, "plus": 0}
        elif key == _DIVERGENCE and not on_page(value):
            form[key] = value
        else:
            form[key] = of_parts(value, controls, key)
    return form


def of_preset(preset: Preset, hyperparameters: Values) -> tuple[Values, list[Values]]:
    """(controls by hyperparameter, forms), one form for each choice of the hyperparameters that are words."""
    values = {**preset.parameters, **hyperparameters}
    choices = {
        name: [word for word in {**known, values[name]: ()} if _accepted(preset, values | {name: word})]
        for name in values
        if (known := _choices(name))
    }
    choices = {name: words for name, words in choices.items() if len(words) > 1}
    controls: Values = {
        name: {"start": _shown(values[name]), "choices": [*map(_shown, words)]} for name, words in choices.items()
    }
    forms = []
    for words in itertools.product(*choices.values()):
        when = dict(zip(choices, words, strict=True))
        start = _accepted(preset, values | when)
        if start is not None:  # else two choices that do not go together
            idle = {*when, *(other for name, word in when.items() for other in _choices(name).get(word, ()))}
            form, moved = _form(preset, start, {name: start[name] for name in start if name not in idle})
            shown = {name: _shown(word) for name, word in when.items()}
            forms.append({"when": shown, "sliders": [*moved], **form})
            controls |= moved
    return {name: controls[name] for name in values if name in controls}, forms


def _choices(name: str) -> Mapping[Any, tuple[str, ...]]:
    return dict.fromkeys(Divergence.known, ()) if name == _DIVERGENCE else _CHOICES.get(name, {})


def _shown(word: Any) -> Any:
    """A choice as the page writes it; a divergence with its numbers."""
    return str(word) if isinstance(word, Divergence) else word


def _accepted(preset: Preset, values: Values) -> Values | None:
    """These values as the preset takes them, a number in place of None or None; None where it takes neither."""
    empty = {name: None for name, default in preset.parameters.items() if default is None}
    numbers = {name: _STARTS[name] for name in empty if values[name] is None and name in _STARTS}
    return next((v for v in (values | numbers, values | empty) if _built(preset, v) is not None), None)


def _built(preset: Preset, values: Values) -> Target | None:
    """The preset's target, or None where it refuses these values."""
    try:
        return preset.build(**values)
    except Exception:  # a preset of somebody's own may fail as it likes
        return None


def _form(preset: Preset, values: Values, movable: Values) -> tuple[Values, Values]:
    """(the form around these values, the sliders that move it), as many as the preset's use of them allows."""
    controls: Values = {}
    marks: Values = {}
    for name, value in movable.items():
        follows = _FOLLOWS.get(name) if value is None else None
        number = values[follows] if follows else value
        if isinstance(number, (int, float)) and not isinstance(number, bool):
            control = slider(name, number, preset.name)
            if name not in _STARTS:  # tau_low and tau_high limit each other, and the page says where they cross
                control = _narrowed(control, preset, values, name)
            step = control["step"] if number + 4 * control["step"] <= control["max"] else -control["step"]
            # Beside the start, which may be a special case, and not what another one or a part's own number is.
            marks[name] = number + 3 * step if step == 1 else number + (3 + 0.1618 * (len(marks) + 1)) * step
            controls[name] = control | ({"start": None, "follows": follows} if follows else {})
    for chosen in (names for count in range(len(marks), 0, -1) for names in itertools.combinations(marks, count)):
        target = _built(preset, values | {name: marks[name] for name in chosen})
        if target is None:
            continue
        moving: set[str] = set()
        form = _marked(composed(target), {name: marks[name] for name in chosen}, moving)
        ranges = {name: (controls[name]["min"], values[name], marks[name], controls[name]["max"]) for name in chosen}
        if moving == {*chosen} and _holds(preset, values, form, ranges):
            return form, {name: controls[name] for name in chosen}
    return composed(preset.build(**values)), {}


def _narrowed(control: Values, preset: Preset, values: Values, name: str) -> Values:
    """The control over as much of its range as the preset takes beside the other values."""

    def end(limit: float) -> float:
        inward = math.copysign(control["step"], control["start"] - limit)
        steps = math.ceil(abs(control["start"] - limit) / control["step"])
        points = (limit, *(round(limit + k * inward, 9) for k in range(1, steps)))
        return next((point for point in points if _built(preset, values | {name: point}) is not None), control["start"])

    return control | {"min": end(control["min"]), "max": end(control["max"])}


def _marked(part: Any, marks: Mapping[str, float], moving: set[str]) -> Any:
    """A form in which every number that comes from a mark says from which, which goes into ``moving``, and how."""
    if isinstance(part, list):
        return [_marked(inner, marks, moving) for inner in part]
    if isinstance(part, Mapping):
        return {
            key: inner if key == _DIVERGENCE and not on_page(inner) else _marked(inner, marks, moving)
            for key, inner in part.items()
        }
    for (name, mark), (times, plus) in itertools.product(marks.items(), _WAYS):
        if part == plus + times * mark:
            moving.add(name)
            return {"of": name, "times": times, "plus": plus}
    return part


def _holds(preset: Preset, values: Values, form: Values, ranges: Mapping[str, Iterable[Any]]) -> bool:
    """Whether the form is what the preset builds, over the sliders' ranges."""
    for point in itertools.product(*ranges.values()):
        numbers = dict(zip(ranges, point, strict=True))
        target = _built(preset, values | numbers)  # None as where tau_low is above tau_high
        if target is not None and _meaning(target) != _meaning(Target.from_config(filled_in(form, numbers))):
            return False
    return True


def _meaning(target: Target) -> tuple:
    pools = [(factor, pool.nonzero, pool.offset_slope, by) for factor, pool, by in target.residual_terms]
    return target.trust, target.scale, target.share, pools


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
