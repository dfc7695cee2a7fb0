"""The named objectives, one entry each: names, YAML, help, docs, verify and tests read them.

An entry is the function that composes the objective, its description as data, and its loss as the paper prints it.

``g = a (p − δ) + Σ b (p − R)`` is an objective's gradient on the logits; everything in a, b and R is held constant.
"""

# In this order they are listed, group by group.
from qtarget.targets.presets import labels, certainty, classification, selection, anchors, teachers  # isort: skip  # noqa: F401
from qtarget.targets.presets.entry import Preset, build, describe, names, preset, printed_loss, written_as

__all__ = ["Preset", "build", "describe", "names", "preset", "printed_loss", "written_as"]
