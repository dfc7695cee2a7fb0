"""The named objectives, a file a family. One entry is all a new one needs: the function that composes it, what is known
of it as data, and its loss as the paper prints it. Command line, YAML, errors, docs, lens and ``verify`` read it.

``g = a (p − δ) + Σ b (p − R)`` is an objective's gradient on the logits; everything in a, b and R is held constant.
"""

# In this order they are listed: weights of the label, what it is held to, what a teacher says.
from qtarget.targets.presets import labels, anchors, teachers  # isort: skip  # noqa: F401
from qtarget.targets.presets.entry import Preset, build, describe, names, preset, printed_loss, written_as

__all__ = ["Preset", "build", "describe", "names", "preset", "printed_loss", "written_as"]
