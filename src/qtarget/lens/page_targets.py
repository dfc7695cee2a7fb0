"""The targets of a page as trust rules and residuals: a new preset needs no JavaScript.

    {name, own, formula, summary, source, notes, parameters: {eta: {start, text, min, max, step}}, forms: [form]}
    form     {when: {h: "linear"}, sliders: ["beta"], trust, residual, scale, share}, written as YAML has a target
             and its notes, or with the reason why it is not on the page
    or       {name, own, reason}: why it is not on the page

A rule that targets.js has not is evaluated here, and the page gets its weights token by token. A divergence of somebody's
own becomes a table.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from qtarget.errors import reason
from qtarget.lens import sliders
from qtarget.lens.record import Record
from qtarget.lens.replay import Replay
from qtarget.lens.scores import tabulated
from qtarget.targets import Target, presets
from qtarget.targets.divergence import as_divergence
from qtarget.targets.objective import Objective
from qtarget.targets.yaml_form import names_code

Entry = dict[str, Any]

# The rules that targets.js computes, with sliders; every other is evaluated here.
RULES = (
    "affine_probability anchored bernoulli_variance clipped_probability clipped_ratio confidence_gap constant entropy "
    "focal gibbs mixture_ratio offset_mass probability probability_power probability_threshold reference_probability "
    "reference_threshold shaped_probability surprise_power token_mask toward_half trajectory_weight"
)


def packed(values: Any, dtype: str) -> str:
    """Numbers as the page's unpack reads them."""
    return base64.b64encode(np.asarray(values).astype(f"<{dtype}").tobytes()).decode()


def manifest_targets(objective: Objective) -> dict[str, Any]:
    """Lines of a capture's manifest: the run's target, and where a page would have to run code for it, its parts."""
    held = {}
    for source, target in objective.targets.items():
        config = target.final.to_config()
        name = f"{target}" if source is None else f"{source}: {target}"
        held[name] = sliders.composed(target.final) if names_code(config) else config
    whole = objective.to_config()
    return {"target": whole} | ({} if [*held.values()] == [whole] else {"run_targets": held})


def targets_of_run(record: Record) -> dict[str, Target | str]:
    """The captured run's targets by name, or why one is not known. A capture may be somebody else's: no code is run."""
    config = record.manifest.get("target")
    held = record.manifest.get("run_targets") or ({} if config is None else {str(config): config})
    found: dict[str, Target | str] = {}
    for name, written in held.items():
        if names_code(written):
            found[name] = f"{_code(written)} is code, which is not run from a capture; name the target with --target"
            continue
        try:
            target = Target.from_config(written)
        except ValueError as error:
            found[name] = f"{reason(error)}; capture again"
        else:
            found[str(target) if name == str(written) else name] = target
    return found


def page_entries(record: Record, tokens: Sequence[int], asked: Target | None = None) -> list[Entry]:
    """The run's own targets, ``asked``, whose code may be run, and every preset.

    Args:
        record: see ``record.read``. tokens: those that the page shows.
    """
    entry = _Entries(record, tokens)
    own: dict[str, tuple[str, Target | str]] = {
        name: ("this run", target) for name, target in targets_of_run(record).items()
    }
    if asked is not None:
        name = str(asked)
        kind, run = own.get(name, ("asked for", ""))
        same = isinstance(run, str) or sliders.composed(run) == sliders.composed(asked)
        own |= {name: (kind, asked)} if same else {f"{name}, asked for": ("asked for", asked)}
    built = {name: _built(name) for name in presets.names()}
    names = {str(target): name for name, target in built.items()}
    entries = [{"name": names.get(name, name), "own": kind, **entry.of(target)} for name, (kind, target) in own.items()]
    shown = {entry["name"] for entry in entries}
    return entries + [{"name": name, **entry.of(built[name])} for name in built if name not in shown]


def _built(name: str) -> Target | str:
    try:
        return presets.build(name)
    except Exception as error:  # a preset of somebody's own, which must not take the page with it
        return f"{name} failed: {reason(error)}"


class _Entries:
    """What stands in an entry beside its name."""

    def __init__(self, record: Record, tokens: Sequence[int]):
        self.record, self.tokens = record, tokens

    def of(self, target: Target | str) -> Entry:
        if isinstance(target, str):
            return {"reason": target, "parameters": {}}
        entry = self._shown(target)
        return entry | {"forms": [_with_tables(form, target) for form in entry.get("forms", ())]}

    def _shown(self, target: Target) -> Entry:
        form = sliders.composed(target)
        if any(names_code(named) for _, named in map(sliders.split, form["residual"])):
            return {"reason": f"{_code(form)} has an offset that the page does not know", "parameters": {}}
        known = target.name in presets.names()
        preset = presets.describe(target.name) if known else presets.written_as(target.name)
        entry: Entry = {"formula": target.formula, "summary": "", "source": "", "parameters": {}, "notes": []}
        if preset is not None:
            entry |= {"summary": preset.summary, "source": preset.source}
        if _by_python(form):
            given = self._given(target, {"when": {}, **form})
            return {"reason": given["reason"], "parameters": {}} if "reason" in given else entry | {"forms": [given]}
        if preset is None or target.share != 1:
            form = sliders.of_parts(form, entry["parameters"])
            return entry | {"forms": [{"when": {}, "sliders": [*entry["parameters"]], **form}]}
        parameters, forms = sliders.of_preset(preset, target.hyperparameters)
        for place, form in enumerate(forms):
            if _by_python(form):
                parts = {key: part for key, part in form.items() if key not in ("when", "sliders")}
                starts = {name: parameters[name]["start"] for name in form["sliders"]}
                forms[place] = self._given(Target.from_config(sliders.filled_in(parts, starts)), form)
        moved = {name for form in forms for name in form["sliders"]}
        parameters = {name: control for name, control in parameters.items() if name in moved or "choices" in control}
        numbers = {key: value for key, value in target.hyperparameters.items() if isinstance(value, (int, float))}
        notes = [f"{key} stays at {value} on this page" for key, value in numbers.items() if key not in parameters]
        return entry | {"parameters": parameters, "forms": forms, "notes": notes}

    @cached_property
    def _replay(self) -> Replay:
        """Made only where it is needed, for it pads every list of the record."""
        return Replay(self.record)

    def _given(self, target: Target, form: Entry) -> Entry:
        """The form with the weights of its rules in place of them, and notes on them."""
        names = _by_python(form)
        notes: list[str] = []
        try:
            a, b, unsure = self._replay.weights(target, notes)
        except Exception as error:  # code of somebody else's, or a model that was not captured
            return {**form, "sliders": [], "reason": f"{names} failed: {reason(error)}"}
        rest = b[0] / target.residual_terms[0].factor if b else np.zeros_like(a)
        given = {"trust": a, "rest": rest, "unsure": unsure}
        trust = {"given": {key: packed(values[self.tokens], "f4") for key, values in given.items()}}
        notes.append(f"{names} was evaluated in Python and has no sliders")
        return {"when": form["when"], "sliders": [], "trust": trust, "residual": form["residual"], "notes": notes}


def _with_tables(form: Entry, target: Target) -> Entry:
    """A form with the scores of divergences that the page does not know in place of their names."""
    written = [str(sliders.split(part)[0]) for part in sliders.composed(target)["residual"]]
    own = dict(zip(written, target.residual, strict=True))

    def on_page(residual: Any) -> Any:
        beside, named = sliders.split(residual)
        if not beside or sliders.on_page(beside["divergence"]):
            return residual
        # A function of the target need not have a path that leads to it.
        known = own[str(beside)].divergence if str(beside) in own else as_divergence(beside["divergence"])
        numbers = tabulated(known)
        return {**named, "divergence": {"given": numbers | {"table": packed(numbers["table"], "f4")}}}

    return form | {"residual": [*map(on_page, form["residual"])]}


def _by_python(form: Entry) -> str:
    """Every path of an object in a form, or the rules in it that the page does not compute."""
    return _code(form) or ", ".join(filter(None, map(_unknown_rule, (form["trust"], form.get("scale")))))


def _unknown_rule(rule: Any) -> str:
    """The first rule that ``RULES`` lacks, in a rule or within it."""
    if not isinstance(rule, (str, Mapping)):  # none, or a number
        return ""
    [(name, parameters)] = rule.items() if isinstance(rule, Mapping) else [(rule, {})]
    return _unknown_rule(parameters.get("trust")) if name in RULES.split() else name


def _code(config: Any) -> str:
    """Every path of an object in a configuration."""
    if isinstance(config, str):
        return config if ":" in config else ""
    parts = [*config, *config.values()] if isinstance(config, Mapping) else config if isinstance(config, list) else ()
    return ", ".join(filter(None, map(_code, parts)))
