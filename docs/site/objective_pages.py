"""A page for each objective, from its preset: nothing on it is written twice.

A page is its sections in order; a section is a function of the objective's facts that gives Markdown, or "" where it has
nothing to say of this one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import yaml

import blocks
import commands
import pictures
import qtarget as qt
import studied
from qtarget import Target
from qtarget.data.columns import COLUMN_OF
from qtarget.targets import peers, presets
from qtarget.targets.stats import STATISTICS

GROUPS = {
    "label": "Trust in the label",
    "selection": "Which tokens are trained",
    "anchor": "Held to a reference",
    "distillation": "With a teacher",
}
# Other libraries' settings, as their users write them; what each becomes is read from the library.
SPELLINGS = (
    "{use_dft_loss: true}",
    "{enable_dft_loss: true}",
    "{liger_use_token_scaling: true}",
    "{use_eaft_loss: true}",
    "{use_eaft: true}",
    "{use_asft_loss: true}",
    "{mode: sft+kl}",
    "{mode: asft}",
    "{loss: gem}",
    "{prob_threshold: 0.1}",
    "{objective_trans: p}",
    "{objective_trans: DEFT}",
    "{lmbda: 0, beta: 0.5}",
    "{rlhf_type: gkd, lmbda: 0, temperature: 1, beta: 0.1}",
    "{kd_trainer: true, kd_ce_alpha: 0.1, kd_alpha: 0.9}",
)
# What stands in, on the three worked tokens, for what an objective needs.
_OTHER_MODELS = {
    "teacher": "The teacher is surer than the student, and right.",
    "reference": "The reference is less sure than the student.",
    "old_policy": "The old policy is less sure than the student.",
    "weight": "The weights are 1.5, 0.5 and 1.",
    "critical": "The third token is not critical.",
}
_ALIKE = 999  # tokens beside the label on the curve of the trust, each as likely as the next


@dataclass(frozen=True)
class Facts:
    """record: what ``qtarget targets show`` says. target: at its defaults. numbers: those defaults that are set."""

    record: dict[str, Any]
    target: Target
    numbers: dict[str, Any]

    @classmethod
    def of(cls, name: str) -> Facts:
        record = commands.asked("show", name)
        numbers = {key: value for key, value in record["parameters"].items() if value is not None}
        return cls(record, qt.preset(name), numbers)

    @property
    def name(self) -> str:
        return self.record["name"]


def opening(facts: Facts) -> str:
    aliases = facts.record["aliases"]
    called = f"\n\nAlso called {', '.join(f'`{alias}`' for alias in aliases)}." if aliases else ""
    return f"# {facts.name}\n\n{facts.record['summary']}{called}"


def formula(facts: Facts) -> str:
    text = blocks.fence("text", f"{facts.record['formula']}\n\n{facts.record['gradient']}")
    legend = (
        "L is the loss of a token and g its gradient on the logits. p is the student's distribution and p_y what it "
        "gives the label; δ is the label itself, R the residual, a and b their weights; sg(·) is held constant."
    )
    return f"## Formula\n\n{text}\n\n{legend}"


def trust(facts: Facts) -> str:
    lines = [f"**The label's trust a**: {facts.record['trusts']}.", f"**The rest**: {facts.record['rest']}."]
    return f"## Who gets the trust, and who the rest\n\n{blocks.bullets(lines)}"


def trust_picture(facts: Facts) -> str:
    if read := sorted(name for name in facts.target.needs if STATISTICS[name] is not None):
        return f"Its trust reads {', '.join(f'`{name}`' for name in read)}, so there is no curve of it over p_y alone."
    points = trust_curve(facts.target)
    drawn = pictures.curve(
        points, "p_y", "a, the weight of the label", f"The trust of {facts.name} over p_y", (0, 1), 1
    )
    caption = f"The weight of the label over its probability, the rest of p spread evenly over {_ALIKE} other tokens."
    return pictures.figure([drawn], caption)


def trust_curve(target: Target, points: int = 81) -> list[tuple[float, float]]:
    """(p_y, a) over (0, 1), the ends left out, where log p is not finite."""
    p_y = torch.linspace(0.001, 0.999, points, dtype=torch.float64)[:, None]
    logits = torch.cat([p_y, ((1 - p_y) / _ALIKE).expand(-1, _ALIKE)], 1).log()
    alone = Target(trust=target.trust, scale=target.scale, share=target.share)  # the residuals do not enter a
    out = qt.target_loss(logits, torch.zeros(points, dtype=torch.long), alone, reduction="none")
    return list(zip(p_y[:, 0].tolist(), out.stats["trust"].tolist(), strict=True))


def worked(facts: Facts) -> str:
    others = [_OTHER_MODELS[name] for name in facts.record["needs"] if name in _OTHER_MODELS]
    caption = " ".join(
        [
            "What it teaches on three tokens: p in grey, the target Q in blue, the label in bold. The probabilities are "
            "made up, Q is computed by qtarget.target_distribution.",
            *others,
        ]
    )
    return f"## Three tokens\n\n{pictures.figure(pictures.worked(facts.target), caption)}"


def in_a_recipe(facts: Facts) -> str:
    written = {"preset": facts.name, **facts.numbers} if facts.numbers else facts.name
    whole, parts = (blocks.fence("yaml", blocks.recipe(form)) for form in (written, facts.record["parts"]))
    return f"## In a recipe\n\n{whole}\n\nThe same in its parts; change one and it is your own:\n\n{parts}"


def in_python(facts: Facts) -> str:
    call = f'qt.preset("{facts.name}"{blocks.arguments(facts.numbers)})'
    return f"## In Python\n\n{blocks.fence('python', blocks.example(call, facts.target))}"


def defaults(facts: Facts) -> str:
    record = facts.record
    lines = [f"`{name}`: {_shown(value)}" for name, value in record["parameters"].items()]
    said = [blocks.bullets(lines) if lines else "It has no numbers to set."]
    if record["defaults"]:
        said.append(f"Whose they are: {record['defaults']}.")
    if record["schedule"]:
        moving = {"preset": facts.name, **record["schedule"]}
        said.append("In the published runs they move:\n\n" + blocks.fence("yaml", blocks.recipe(moving)))
    if "divergence" in record["parameters"]:
        said.append("Any of the [divergences](../divergences/index.md) may stand in place of forward KL.")
    return "## Defaults\n\n" + "\n\n".join(said)


def _shown(value: object) -> str:
    return "not set" if value is None else f"`{value}`"


def in_any_trainer(facts: Facts) -> str:
    needed = facts.record["needs"]
    given = ", teacher=teacher" if "teacher" in needed else ""
    columns = [column for need, column in COLUMN_OF.items() if need in needed]
    beside = f" The column `{columns[0]}` comes beside the labels." if columns else ""
    line = f'qt.apply_target(model, "{facts.name}"{given})'
    return (
        f"## In any trainer\n\n    {line}\n\nFrom then on the model's own forward returns this loss "
        f"([more](../training.md#in-another-trainer)).{beside}"
    )


def traps(facts: Facts) -> str:
    text = facts.record["traps"]
    return f"## Traps\n\n{text[0].upper()}{text[1:]}." if text else ""


def needs(facts: Facts) -> str:
    lines = [blocks.NEEDS[name][0] for name in facts.record["needs"]]
    return f"## What it needs\n\n{blocks.bullets(lines) if lines else 'Nothing but labels.'}"


def elsewhere(facts: Facts) -> str:
    notes = [note for text in SPELLINGS if (note := _note(text, facts.name))]
    if not notes:
        return ""
    return (
        "## What other libraries call it\n\nTheir settings may stand in a recipe as they are, with that library's "
        f"defaults:\n\n{blocks.bullets(notes)}"
    )


def _note(text: str, name: str) -> str:
    """A spelling and what it became, where it is this objective."""
    spelling = peers.read(yaml.safe_load(text))
    if spelling is None:
        raise ValueError(f"{text} is no other library's setting; take it out of SPELLINGS")
    return f"`{text}`: {spelling.note}." if spelling.target.name == name else ""


def helps(facts: Facts) -> str:
    said = "\n\n".join(part for part in (studied.section(facts.name), blocks.chosen(facts.name)) if part)
    return f"## When it helps, and when not\n\n{said}" if said else ""


def source(facts: Facts) -> str:
    return f"## Source\n\n{blocks.paper(facts.record['source'])}"


# One line more is one section more.
SECTIONS: tuple[Callable[[Facts], str], ...] = (
    opening,
    formula,
    trust,
    trust_picture,
    worked,
    helps,
    in_a_recipe,
    in_python,
    in_any_trainer,
    defaults,
    traps,
    needs,
    elsewhere,
    source,
)


def page(name: str) -> str:
    """The page of an objective."""
    facts = Facts.of(name)
    return "\n\n".join(text for section in SECTIONS if (text := section(facts))) + "\n"


def pages() -> dict[str, str]:
    """Page by name of the objective."""
    return {name: page(name) for name in presets.names()}


def navigation() -> list[dict[str, list[str]]]:
    """Paths of the pages under ``objectives/``, by group."""
    by_group: dict[str, list[str]] = {}
    for name in presets.names():
        by_group.setdefault(GROUPS[presets.describe(name).group], []).append(f"objectives/{name}.md")
    return [{group: paths} for group, paths in by_group.items()]


def table() -> str:
    """The objectives with a link each."""
    lines = ["| objective | what it is for | trusts | the rest | needs |", "|---|---|---|---|---|"]
    for record in commands.asked():
        needs = ", ".join(record["needs"]).replace("_", " ") or "-"
        cells = [record["summary"], record["trusts"], record["rest"], needs]
        lines.append(" | ".join([f"| [{record['name']}]({record['name']}.md)", *map(_cell, cells)]) + " |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
