"""A page for each divergence, from its class."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import blocks
import commands
import pictures
import qtarget as qt
import studied
from qtarget import Target
from qtarget.targets import presets
from qtarget.targets.divergence import Divergence

_REACH = 4.0  # nats to both sides of 0 that the curve of the score shows


@dataclass(frozen=True)
class Facts:
    """record: what ``qtarget targets divergences`` says. target: kd by this divergence."""

    record: dict[str, Any]
    divergence: Divergence
    target: Target

    @classmethod
    def of(cls, record: dict[str, Any]) -> Facts:
        divergence = Divergence.known[record["name"]]()
        return cls(record, divergence, qt.preset("kd", divergence=divergence))

    @property
    def written(self) -> object:
        """Name and numbers as a recipe has them."""
        name, numbers = self.record["name"], self.record["parameters"]
        return {name: numbers} if numbers else name


def opening(facts: Facts) -> str:
    said = (inspect.getdoc(type(facts.divergence)) or "").partition("\n>>>")[0].strip()
    return f"# {facts.record['name']}\n\n{said}"


def formula(facts: Facts) -> str:
    text = blocks.fence("text", f"D(R, p) = {facts.record['equation']}\n\ng = b · p ⊙ (s − E_p[s])")
    legend = (
        "p is the student's distribution, R the residual and b its weight; g is the gradient on the logits. s, the "
        "score, is the derivative of D by p, less its value at p = R."
    )
    return f"## Formula\n\n{text}\n\n{legend}"


def score_picture(facts: Facts) -> str:
    d = torch.linspace(-_REACH, _REACH, 81, dtype=torch.float64)
    points = list(zip(d.tolist(), facts.divergence.score(d).tolist(), strict=True))
    title = f"The score of {facts.record['name']} over d"
    drawn = pictures.curve(points, "d = log p − log R", "s, the score", title, (-_REACH, _REACH), 0)
    return pictures.figure([drawn], "To the left the student has too little, to the right too much.")


def worked(facts: Facts) -> str:
    caption = (
        "What kd teaches by it on three tokens: p in grey, the target Q in blue, the label in bold. The probabilities "
        "are made up, Q is computed by qtarget.target_distribution. The teacher is surer than the student, and right."
    )
    return f"## Three tokens\n\n{pictures.figure(pictures.worked(facts.target), caption)}"


def limits(facts: Facts) -> str:
    reach = facts.record["reach"]
    lines = [
        "Q may leave the simplex, however small b is."
        if reach is None
        else f"Q stays on the simplex while a + {reach:.3g} b ≤ 1.",
        "It is infinite where the residual rules a token out (a logit of −∞): such a row is refused."
        if facts.record["needs_full_support"]
        else "It is finite where the residual rules a token out.",
    ]
    return f"## Limits\n\n{blocks.bullets(lines)}"


def in_a_recipe(facts: Facts) -> str:
    preset = blocks.recipe({"preset": "kd", "divergence": facts.written})
    parts = blocks.recipe({"trust": 0.5, "residual": {"teacher": {}, "divergence": facts.written}})
    return f"## In a recipe\n\n{blocks.fence('yaml', preset)}\n\nOr beside a residual:\n\n{blocks.fence('yaml', parts)}"


def in_python(facts: Facts) -> str:
    numbers = ", ".join(f"{name}={value!r}" for name, value in facts.record["parameters"].items())
    call = f'qt.preset("kd", divergence=qt.divergence.{facts.record["name"]}({numbers}))'
    return f"## In Python\n\n{blocks.fence('python', blocks.example(call, facts.target))}"


def defaults(facts: Facts) -> str:
    lines = [f"`{name}`: `{value}`" for name, value in facts.record["parameters"].items()]
    return f"## Defaults\n\n{blocks.bullets(lines) if lines else 'It has no numbers to set.'}"


def taken_by(facts: Facts) -> str:
    names = [name for name in presets.names() if "divergence" in presets.describe(name).parameters]
    links = ", ".join(f"[{name}](../objectives/{name}.md)" for name in names)
    return f"## Which objectives take it\n\n{links}, and any target of your own: [Targets](../targets.md)."


def helps(facts: Facts) -> str:
    said = studied.section(f"kd+{facts.record['name']}")
    return f"## When it helps, and when not\n\n{said}" if said else ""


SECTIONS: tuple[Callable[[Facts], str], ...] = (
    opening,
    formula,
    score_picture,
    worked,
    in_a_recipe,
    in_python,
    defaults,
    limits,
    taken_by,
    helps,
)


def pages() -> dict[str, str]:
    """Page by name of the divergence."""
    found = {}
    for record in commands.asked("divergences"):
        facts = Facts.of(record)
        found[record["name"]] = "\n\n".join(text for section in SECTIONS if (text := section(facts))) + "\n"
    return found


def navigation() -> list[str]:
    return [f"divergences/{name}.md" for name in Divergence.known]


def table() -> str:
    """The divergences with a link each."""
    lines = ["| divergence | D(R, p) | numbers |", "|---|---|---|"]
    for record in commands.asked("divergences"):
        numbers = ", ".join(f"{name} {value}" for name, value in record["parameters"].items()) or "-"
        equation = record["equation"].replace("|", "\\|")
        lines.append(f"| [{record['name']}]({record['name']}.md) | {equation} | {numbers} |")
    return "\n".join(lines)
