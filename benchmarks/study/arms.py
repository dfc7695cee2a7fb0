"""What is compared: the objectives, by the names the study has for them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from qtarget.targets.schedule import ScheduledTarget


@dataclass(frozen=True)
class Arm:
    """target: as a recipe holds it."""

    name: str
    target: dict[str, Any]

    def build(self) -> ScheduledTarget:
        return ScheduledTarget.read(self.target)


def _arm(name: str, preset: str, **parameters: Any) -> Arm:
    return Arm(name, {"preset": preset, **parameters})


def _asked_for(name: str) -> Arm:
    """A preset at its defaults, or one with a divergence, as in ``kd+jsd``."""
    preset, _, divergence = name.partition("+")
    return _arm(name, preset, **({"divergence": divergence} if divergence else {}))


# The fifteen of the paper's table at their defaults, but for two: beyond-log's default has dft's gradient, and profit's
# threshold is BLL's. The quick form takes more, named in the environment, where the processes it starts see them too.
FIFTEEN = (
    "sft",
    "dft",
    "beyond-log",
    "profit",
    "eaft",
    "iw-sft",
    "cft",
    "label-smoothing",
    "sft-kl",
    "asft",
    "psft",
    "gem",
    "kd",
    "kd-hybrid",
    "target-sft",
)
FURTHER = os.environ.get("STUDY_ARMS", "").split()
PRESETS = [
    *(_arm(name, name, **{"beyond-log": {"alpha": 0.5}, "profit": {"tau": 0.2}}.get(name, {})) for name in FIFTEEN),
    *map(_asked_for, FURTHER),
]
DIALS = [
    _arm("beyond-log-2", "beyond-log", alpha=2.0),
    *(_arm(f"target-sft-{eta}", "target-sft", eta=eta) for eta in (0.0, 0.1, 0.25, 0.75, 1.0)),
]
# Those that only the grid has. At its default gift is sft; here a label needs a fiftieth of the teacher's probability to
# get half of the trust. taid's t goes to 1 as its authors' does.
WIDER = [
    _arm("idft", "idft"),
    _arm("gift", "gift", beta=4.0, toward="teacher"),
    _arm("taid", "taid", t={"schedule": "linear", "from": 0.4, "to": 1.0}),
    _asked_for("kd+reverse_kl"),
    _asked_for("kd+jsd"),
]
ARMS = {arm.name: arm for arm in [*PRESETS, *DIALS, *WIDER]}
FEW = ("sft", "dft", "kd", "kd-hybrid", "target-sft")
LABELS = ("sft", "dft", "asft", "idft")  # no teacher: one run serves all teachers of a condition
TEACHERS = (
    "kd",
    "kd+reverse_kl",
    "kd+jsd",
    "taid",
    "kd-hybrid",
    "gift",
    "target-sft-0.25",
    "target-sft",
    "target-sft-0.75",
    "target-sft-1.0",
)
WITH_TEACHER = frozenset(name for name, arm in ARMS.items() if "teacher" in arm.build().requires)
