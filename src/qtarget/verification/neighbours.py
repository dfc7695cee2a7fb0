"""Does a target reduce to a related one where it must: eta 0 is dft, no smoothing is sft?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from qtarget.targets import Target, presets
from qtarget.verification.check import Finding, check, within, worst
from qtarget.verification.expected import Expected, label_log_p, logits_of
from qtarget.verification.subject import Given, Sample, Subject, relative

# The numbers of presets at which they are sft, and dft.
_SFT_AT: dict[str, dict[str, float]] = {
    "profit": {"tau": 0},
    "eaft": {"power": 0},
    "label-smoothing": {"smoothing": 0},
    "kd-hybrid": {"kd_weight": 0},
    "mixce": {"mixing_ratio": 1},
    "gold-floor": {"floor": 1},
    "tailr": {"gamma": 0},
    "focal": {"gamma": 0},
    "poly": {"epsilon": 0},
    "sed-sft": {"weight": 0},
    "gift": {"beta": 200},
    "sft-entropy": {"entropy_weight": 0},
}
_DFT_AT: dict[str, dict[str, float]] = {
    "talr": {"tau": 1},
    "mixce": {"mixing_ratio": 0},
    "gold-floor": {"floor": 0},
    "tailr": {"gamma": 1},
    "trsft": {"high": 1},
    "idft": {"strength": 0},
    "target-sft": {"eta": 0},
}


@dataclass
class Neighbour:
    """Two targets that must have one gradient; ``neighbour`` None: no gradient at all.

    Attributes:
        name: the limit in words. columns: in place of the run's own; None: the student's own log p of the label.
        student_teaches: the student in place of the teacher or reference.
    """

    name: str
    target: Target
    neighbour: Target | None
    columns: dict[str, float | None] = field(default_factory=dict)
    student_teaches: bool = False


def limits(target: Target) -> Iterator[Neighbour]:
    """What a target becomes at the ends of its numbers, its other hyperparameters as they are."""
    build, numbers, name = presets.build, target.hyperparameters, target.name
    sft, dft = build("sft"), build("dft")
    yield Neighbour("share 0 is sft", replace(target, share=0), sft)

    def at_value(key: str, value: float, neighbour: Target) -> Neighbour:
        return Neighbour(f"{key} {value:g} is {neighbour.name}", build(name, **{**numbers, key: value}), neighbour)

    if name == "sft":
        yield Neighbour("beyond-log at alpha 0", target, build("beyond-log", alpha=0))
    if name == "dft":
        yield Neighbour("beyond-log at alpha 1", target, build("beyond-log", alpha=1))
    if name == "beyond-log":
        yield at_value("alpha", 0, sft)
        yield at_value("alpha", 1, dft)
    for key, value in _SFT_AT.get(name, {}).items():
        yield at_value(key, value, sft)
    for key, value in _DFT_AT.get(name, {}).items():
        yield at_value(key, value, dft)
    if name == "iw-sft":
        yield Neighbour("weight 1 is sft", target, sft, {"weight": 1.0})
    if name == "cft":
        yield Neighbour("critical everywhere is sft", target, sft, {"critical": 1.0})
        yield Neighbour("critical nowhere is nothing", target, None, {"critical": 0.0})
    if name in ("sft-kl", "asft"):
        anchored = sft if name == "sft-kl" else dft
        yield at_value("kl_weight", 0, anchored)
        yield Neighbour(f"the student as reference is {anchored.name}", target, anchored, student_teaches=True)
    if name == "psft":
        yield Neighbour("the present policy as the old one is sft", target, sft, {"old_logps": None})
    if name == "gem" and numbers["h"] == "linear":
        yield at_value("beta", 1, sft)
    if name == "kd":
        yield Neighbour("kd-hybrid at kd_weight 1", target, build("kd-hybrid", kd_weight=1.0, **numbers))
        yield Neighbour("the student as teacher is nothing", target, None, student_teaches=True)
    if name == "kd-hybrid":
        yield at_value("kd_weight", 1, build("kd", **{key: numbers[key] for key in numbers if key != "kd_weight"}))
    if name == "taid":
        yield at_value("t", 1, build("kd"))
    if name in ("taid", "todi"):
        yield Neighbour("the student as teacher is nothing", target, None, student_teaches=True)
    if name == "target-sft" and numbers["teacher_temperature"] == 1:
        yield Neighbour("the student as teacher is dft", target, dft, student_teaches=True)


@check(
    "neighbours",
    "a parameter of the target does not do what its name says: see qtarget targets show NAME, or the target's own code",
    of_gradient=True,
)
def neighbours(subject: Subject) -> Finding:
    """At the limits of its parameters the target has the gradient of the target it reduces to."""
    expected, errors = Expected(subject), {}
    for sample in subject.samples:
        # A teacher says nothing of a head's padded rows: the student as its own teacher is then not the student.
        padded = sample.student.width > subject.vocab
        given = expected.given(sample)
        for limit in limits(sample.target):
            if not (limit.student_teaches and padded):
                name = limit.name if len(subject.targets) == 1 else f"{sample.target}: {limit.name}"
                errors[name] = _error(expected, sample, given, limit)
    told = "; ".join(f"{name}: {error:.1e}" for name, error in errors.items())
    return within(errors[worst(errors)], subject.rounding, told, **errors)


def _error(expected: Expected, sample: Sample, given: Given, limit: Neighbour) -> float:
    """The engine's gradient of the one against float64's of the other, relative to sft's where that is nothing."""
    heads = sample.heads
    if limit.student_teaches:
        heads = {"teacher": sample.student, "reference": sample.student}
    log_p_y = label_log_p(logits_of(sample.student), sample.labels)
    columns = {
        name: log_p_y if value is None else torch.full_like(log_p_y, value) for name, value in limit.columns.items()
    }
    got, _ = expected.subject.engine(replace(sample, target=limit.target, heads=heads), {**given, **columns})
    neighbour = presets.build("sft") if limit.neighbour is None else limit.neighbour
    wanted = expected.hidden_gradient(replace(sample, target=neighbour), given)
    return float(got.double().norm() / wanted.norm()) if limit.neighbour is None else relative(got, wanted)


CHECKS = [neighbours]
