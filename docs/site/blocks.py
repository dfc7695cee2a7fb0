"""What both kinds of page have: blocks of code, a target's YAML and Python, links to the study."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from qtarget import Target

DOCS = Path(__file__).resolve().parent.parent
# What a target needs → how a user gives it in a run, and the line of an example that makes it up.
NEEDS = {
    "teacher": (
        "a teacher with the student's tokenizer: `teacher_model_name_or_path`, or a `teacher_cache` "
        "([Teachers](../teachers.md))",
        "teacher_logits=torch.randn(2, 8, 100)",
    ),
    "reference": (
        "a reference: the model as it starts, or the one named in `reference_model_name_or_path`",
        "reference_logits=torch.randn(2, 8, 100)",
    ),
    "old_policy": (
        "the old policy: a copy of the model that is taken anew every `psft_refresh` steps, or the column `old_logps` "
        "with `psft_refresh: never`",
        "old_logps=torch.full((2, 8), -4.0)",
    ),
    "weight": ("weights: the column `weight`, or `weights: online`", "weight=torch.tensor([0.5, 1.5])"),
    "critical": ("the column `critical`, 0 or 1", "critical=torch.rand(2, 8) > 0.5"),
}


def fence(language: str, text: str) -> str:
    return f"```{language}\n{text.strip()}\n```"


def recipe(config: object) -> str:
    """The line ``target: ...`` of a recipe."""
    flow = yaml.safe_dump(config, default_flow_style=True, sort_keys=False, allow_unicode=True, width=1000)
    return f"target: {flow.removesuffix(chr(10) + '...' + chr(10)).strip()}"


def example(call: str, target: Target) -> str:
    """A loss and its gradient, on random numbers, that runs as it stands."""
    given = "".join(f",\n    {NEEDS[name][1]}" for name in sorted(target.requires))
    arguments = f"\n    logits,\n    labels,\n    target{given},\n" if given else "logits, labels, target"
    return f"""
import torch
import qtarget as qt

target = {call}
logits = torch.randn(2, 8, 100, requires_grad=True)  # of two rows, eight tokens each
labels = torch.randint(100, (2, 8))
out = qt.target_loss({arguments})
out.loss.backward()
print(out.stats["trust"])  # a, of each token
"""


def arguments(numbers: dict[str, Any]) -> str:
    """Keyword arguments after a first one."""
    written = {name: json.dumps(value) if isinstance(value, str) else repr(value) for name, value in numbers.items()}
    return "".join(f", {name}={value}" for name, value in written.items())


def bullets(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def chosen(name: str) -> str:
    """A link to the page on choosing, where that names it."""
    choosing = (DOCS / "choosing.md").read_text(encoding="utf-8")
    if not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", choosing):
        return ""
    return "[Which target?](../choosing.md) says when it is worth a try."


def paper(source: str) -> str:
    """The source, its arXiv number as a link."""
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", source)
