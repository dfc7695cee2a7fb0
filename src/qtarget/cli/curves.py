"""A picture of a run: the loss and what the target did, step by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

_PANELS = [
    ("loss and negative log-likelihood", ("loss", "nll")),
    ("weight of label and residual", ("trust", "residual_mass")),
    ("update: share of probability asked to move", ("update",)),
    ("student's entropy (nats)", ("entropy",)),
]


def draw(log_history: Sequence[Mapping[str, float]], title: str, path: Path) -> bool:
    """Write the curves of ``trainer.state.log_history`` to ``path``; False where there is nothing to draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [entry for entry in log_history if "loss" in entry]
    if not steps:
        return False
    figure, axes = pyplot.subplots(2, 2, figsize=(9, 5.5), layout="constrained")
    for axis, (heading, names) in zip(axes.flat, _PANELS, strict=True):
        for name, style in zip(names, ("-", "--"), strict=False):
            points = [(entry["step"], entry[name]) for entry in steps if name in entry]
            if points:
                axis.plot(*zip(*points, strict=True), style, marker="." if len(points) < 50 else None, label=name)
        held_out = [(entry["step"], entry["eval_nll"]) for entry in log_history if "eval_nll" in entry]
        if "nll" in names and held_out:
            axis.plot(*zip(*held_out, strict=True), "s", fillstyle="none", label="held-out nll")
        axis.set_title(heading, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if len(axis.lines) > 1:
            axis.legend(fontsize=8)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True
