"""When an objective helped and when not: it beside plain SFT, from the results of the controlled study."""

from __future__ import annotations

import functools
import sys
from typing import Any

import blocks

STUDY = blocks.DOCS.parent / "benchmarks" / "study"
_READINGS = {"higher": "Higher than sft", "lower": "Lower than sft", "no difference shown": "No difference shown"}


@functools.cache
def results() -> tuple[Any, Any, dict[str, Any], frozenset[str]]:
    """(those of one thing at a time, those of the grid, {arm: its target as a recipe holds it}, arms with a teacher)."""
    sys.path.insert(0, str(STUDY))
    try:
        from arms import ARMS, WITH_TEACHER
        from cells import plans
        from records import Record
        from results import Results
    finally:
        sys.path.remove(str(STUDY))
    axes, grid = (Results(Record(plan, STUDY.parent / "results" / "study" / plan.name)) for plan in plans(False))
    return axes, grid, {name: arm.target for name, arm in ARMS.items()}, WITH_TEACHER


def section(arm: str) -> str:
    """What the study found of an arm beside plain SFT; "" where it was no arm.

    The grid has conditions; an arm that it lacks is compared at the centre of the first plan.
    """
    axes, grid, targets, with_teacher = results()
    found, cells = grid, [name for name, cell in grid.plan.cells.items() if arm in cell.arms]
    if not cells and arm in targets and axes.has(f"centre/{arm}"):
        found, cells = axes, ["centre"]
    if not cells or arm == "sft":
        return ""
    samples = found.settings.samples
    lines, by_reading = [], {reading: [] for reading in _READINGS}
    for cell in cells:
        avg, passed = (found.contrast(f"{cell}/{arm}", f"{cell}/sft", measure) for measure in ("avg", "pass"))
        condition = _condition(found.plan.cells[cell].says, arm in with_teacher)
        lines.append(f"| {condition} | {_points(avg)} | {_points(passed)} | {avg.says} |")
        by_reading[avg.says].append(condition)
    about = (
        f"It is an arm of the [controlled study](../study.md){_setting(targets[arm])}, compared here with plain SFT. "
        f"avg@{samples} is the accuracy of samples at temperature 1, pass@{samples} the share of problems that at least "
        f"one of {samples} samples solves. Differences are in points, with 95 % intervals over {len(found.seeds)} seeds. "
        "The models have 0.1 million parameters and learn arithmetic; 15 % of the demonstrations' steps are wrong unless "
        "another share is named. The table shows in which cases the objective helps, not how much it helps your model."
    )
    counts = [
        f"**{_READINGS[reading]}** in {len(names)} of {len(cells)} conditions"
        + (f": {'; '.join(names)}." if len(names) <= len(cells) / 2 else ".")
        for reading, names in by_reading.items()
        if names and len(cells) > 1
    ]
    head = (
        f"| condition | avg@{samples} − sft's | pass@{samples} − sft's | reading of avg@{samples} |\n|---|---|---|---|"
    )
    return "\n\n".join(part for part in (about, blocks.bullets(counts), "\n".join([head, *lines])) if part)


def _condition(says: str, with_teacher: bool) -> str:
    """A cell in words. Without a teacher all teachers' cells are one."""
    whole = says.replace("the corner ", "weak base, sharp teacher, ").replace("15 % wrong steps, one style, ", "")
    return whole if with_teacher else whole.replace(", sharp teacher", "")


def _setting(target: dict[str, Any]) -> str:
    """How the arm differs from its preset at its defaults."""
    numbers = {name: value for name, value in target.items() if name != "preset"}
    return f", as `{blocks.recipe({'preset': target['preset'], **numbers})}`" if numbers else ""


def _points(found: Any) -> str:
    return f"{100 * found.value:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
