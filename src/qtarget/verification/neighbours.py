"""Does a target become its neighbour where it must: eta 0 is dft, no smoothing is sft?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from qtarget.data.columns import columns_of
from qtarget.losses import Head
from qtarget.models.forward import HeadTransform, head_parameters
from qtarget.targets import Target, presets
from qtarget.verification.check import Check, Finding, within, worst
from qtarget.verification.expected import Oracle, at
from qtarget.verification.subject import Subject, relative


@dataclass
class Neighbour:
    """Two targets that must have one gradient; ``neighbour`` None: no gradient at all.

    Attributes:
        name: what is said of them. columns: in place of the run's own, a number or "log_p_y", the student's own.
        student_teaches: the student in place of the teacher or reference.
    """

    name: str
    target: Target
    neighbour: Target | None
    columns: dict[str, float | str] = field(default_factory=dict)
    student_teaches: bool = False


def of(target: Target, padded: bool = False) -> Iterator[Neighbour]:
    """The neighbours of a target, with its other hyperparameters as they are.

    ``padded``: the student's head has more rows than there are tokens, which a teacher says nothing of: the student as
    its own teacher is then not the student.
    """
    build, own, name = presets.build, target.hyperparameters, target.name
    sft, dft = build("sft"), build("dft")
    yield Neighbour("share 0 is sft", replace(target, share=0), sft)

    def at_value(key: str, value: float, neighbour: Target | None) -> Neighbour:
        number = f"{value:g}"
        told = "nothing" if neighbour is None else neighbour.name
        return Neighbour(f"{key} {number} is {told}", build(name, **{**own, key: value}), neighbour)

    if name == "sft":
        yield Neighbour("beyond-log at alpha 0", target, build("beyond-log", alpha=0))
    if name == "dft":
        yield Neighbour("beyond-log at alpha 1", target, build("beyond-log", alpha=1))
    if name == "beyond-log":
        yield at_value("alpha", 0, sft)
        yield at_value("alpha", 1, dft)
    if name == "profit":
        yield Neighbour("tau 0 is sft", build(name, tau=0.0), sft)
    if name == "eaft":
        yield at_value("power", 0, sft)
    if name == "iw-sft":
        yield Neighbour("weight 1 is sft", target, sft, {"weight": 1.0})
    if name == "cft":
        yield Neighbour("critical everywhere is sft", target, sft, {"critical": 1.0})
        yield Neighbour("critical nowhere is nothing", target, None, {"critical": 0.0})
    if name == "label-smoothing":
        yield at_value("smoothing", 0, sft)
    if name in ("sft-kl", "asft"):
        yield at_value("kl_weight", 0, sft if name == "sft-kl" else dft)
    if name in ("sft-kl", "asft") and not padded:
        same = f"the student as reference is {'sft' if name == 'sft-kl' else 'dft'}"
        yield Neighbour(same, target, sft if name == "sft-kl" else dft, student_teaches=True)
    if name == "psft":
        yield Neighbour("the present policy as the old one is sft", target, sft, {"old_logps": "log_p_y"})
    if name == "gem" and own["h"] == "linear":
        yield at_value("beta", 1, sft)
    if name == "kd":
        yield Neighbour("kd-hybrid at kd_weight 1", target, build("kd-hybrid", kd_weight=1.0, **own))
        if not padded:
            yield Neighbour("the student as teacher is nothing", target, None, student_teaches=True)
    if name == "kd-hybrid":
        yield at_value("kd_weight", 0, sft)
        yield at_value("kd_weight", 1, build("kd", temperature=own["temperature"]))
    if name == "target-sft":
        yield at_value("eta", 0, dft)
        if own["teacher_temperature"] == 1 and not padded:
            yield Neighbour("the student as teacher is dft", target, dft, student_teaches=True)


def neighbours(subject: Subject) -> Finding:
    oracle, errors = Oracle(subject), {}
    padded = head_parameters(subject.base)[0].shape[0] > subject.vocab
    for chosen, target in oracle.of_target():
        for one in of(target, padded):
            name = one.name if len(subject.targets) == 1 else f"{target}: {one.name}"
            errors[name] = _error(subject, oracle, chosen, one)
    told = "; ".join(f"{name}: {error:.1e}" for name, error in errors.items())
    return within(errors[worst(errors)], subject.rounding, told, **errors)


def _error(subject: Subject, oracle: Oracle, chosen: Tensor, one: Neighbour) -> float:
    """The engine's gradient of the one against float64's of the other, relative to sft's where that is nothing."""
    sample, on = subject.sample, chosen.to(subject.device)
    hidden, labels, logits = sample.hidden[on], sample.labels[chosen].to(subject.device), oracle.sampled_logits[on]
    others, columns = (at(given, chosen) for given in oracle.sampled)
    heads = subject.heads_at(chosen)
    if one.student_teaches:
        head = _own_head(subject, hidden)
        heads = {name: head for name in one.target.requires & {"teacher", "reference"}}
    log_p_y = logits.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    given = {
        name: log_p_y if value == "log_p_y" else torch.full_like(log_p_y, float(value))
        for name, value in one.columns.items()
    }
    read = {name: given.get(name, columns.get(name)) for name in columns_of(one.target)}
    got, _ = subject.engine(hidden, labels, one.target, heads, {n: c for n, c in read.items() if c is not None})
    against = presets.build("sft") if one.neighbour is None else one.neighbour
    wanted = oracle.to_hidden(logits, oracle.p_minus_q(logits, labels, against, others, columns))
    if one.neighbour is None:
        return float(got.double().norm() / wanted.norm())
    return relative(got, wanted)


def _own_head(subject: Subject, hidden: Tensor) -> Head:
    weight, bias = head_parameters(subject.base)
    transform = HeadTransform.of(subject.base.config)
    return Head(
        hidden.detach(),
        weight.detach(),
        None if bias is None else bias.detach(),
        logit_scale=transform.scale,
        logit_softcap=transform.softcap,
    )


CHECKS = [
    Check(
        "neighbours",
        "at the ends of its numbers the target has the gradient of the target it becomes there",
        "a number of the target does not do what its name says: see qtarget targets show NAME, or the target's own code",
        neighbours,
    ),
]
