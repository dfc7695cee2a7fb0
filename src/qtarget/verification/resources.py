"""What half precision costs the loss, and whether memory stays within the plan."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qtarget.data.columns import columns_of
from qtarget.losses import Head
from qtarget.verification.check import Check, Finding, expect, not_applicable, within
from qtarget.verification.expected import Oracle, at
from qtarget.verification.subject import Subject, relative

# Twice what rounding a result to bfloat16's 8 bits does: on a GPU what the last product reads is rounded too.
_BF16 = 2**-8
# How far a step may be from its estimate, an allocator's slack included, and below which a process's own noise is larger.
_OVER, _UNDER, _LEAST = 1.35, 0.5, 256 << 20


def bf16(subject: Subject) -> Finding:
    """States and heads rounded to bfloat16: the engine against float64 of the same rounded numbers, and of the unrounded
    ones; for comparison, what rounding the logits would add."""
    sample, oracle = subject.sample, Oracle(subject)
    _, columns = oracle.sampled
    made: dict[str, list[Tensor]] = {name: [] for name in ("engine", "exact", "unrounded", "eager")}
    for chosen, target in oracle.of_target():
        on = chosen.to(subject.device)
        hidden, labels = sample.hidden[on], sample.labels[chosen].to(subject.device)
        own = at(columns, chosen)
        read = {name: column for name, column in own.items() if name in columns_of(target)}
        heads = subject.heads_at(chosen)
        rounded = {name: _rounded(head) if isinstance(head, Head) else head for name, head in heads.items()}
        low = hidden.bfloat16()

        def exact(logits: Tensor, heads: Any, target: Any = target, labels: Tensor = labels, own: Any = own) -> Tensor:
            others = {name: oracle.dense(head, logits) for name, head in heads.items()}
            return oracle.p_minus_q(logits, labels, target, others, own)

        def down(logits: Tensor, g: Tensor) -> Tensor:
            return oracle.to_hidden(logits, g, torch.bfloat16)

        logits = oracle.logits_of(low, torch.bfloat16)
        made["engine"].append(subject.engine(low, labels, target, rounded, read, torch.bfloat16)[0])
        made["exact"].append(down(logits, exact(logits, rounded)))
        made["eager"].append(down(logits, exact(logits.bfloat16().double(), rounded)))
        logits = oracle.sampled_logits[on]
        made["unrounded"].append(oracle.to_hidden(logits, exact(logits, heads)))
    joined = {name: torch.cat(values).double() for name, values in made.items()}
    error, eager = relative(joined["engine"], joined["exact"]), relative(joined["eager"], joined["exact"])
    total, shift = relative(joined["engine"], joined["unrounded"]), _autocast_shift(subject, oracle)
    told = f"the loss adds {error:.1e} (with logits in bf16: {eager:.1e}); against fp32 {total:.1e}"
    told += "" if shift is None else f"; under autocast log p_y is off by {shift:.1e} on average"
    return within(error, _BF16, told, bf16_logits=eager, against_fp32=total, log_p_shift=shift)


def _rounded(head: Head) -> Head:
    bias = None if head.bias is None else head.bias.bfloat16()
    return replace(head, hidden=head.hidden.bfloat16(), weight=head.weight.detach().bfloat16(), bias=bias)


def _autocast_shift(subject: Subject, oracle: Oracle) -> float | None:
    """Mean |Δ log p_y| over the first document when the model computes under bfloat16 autocast."""
    row = subject.rows[0]
    ids = torch.tensor([row["input_ids"]], device=subject.device)
    labels = torch.tensor(row["labels"], device=subject.device)
    places = (labels != -100).nonzero().flatten()
    places = places[places > 0]

    def log_p() -> Tensor:
        logits = oracle.logits(subject.model, ids)[0, places - 1].float()
        return logits.log_softmax(-1).gather(-1, labels[places][:, None])

    with subject.without_dropout(), torch.no_grad():
        full = log_p()
        try:
            with torch.autocast(subject.device.type, torch.bfloat16):
                low = log_p()
        except RuntimeError:  # a device without it
            return None
    return float((low - full).abs().mean())


def memory(subject: Subject) -> Finding:
    batch = subject.step.batch
    positions, supervised = batch["labels"].numel(), int((batch["labels"][:, 1:] != -100).sum())
    measured = subject.step.bytes
    planned = None if subject.estimate is None else subject.estimate(positions, supervised)
    if measured is None:
        return not_applicable("this system does not tell how much memory a stretch of work took")
    figures = {"measured": measured, "estimate": planned, "positions": positions}
    told = f"{measured / 2**20:,.0f} MiB for {positions} positions"
    if planned is None:
        return not_applicable(f"{told}; there is no estimate of adapters, or of a shape not known", **figures)
    told += f", estimated {planned / 2**20:,.0f}"
    if planned < _LEAST:
        return not_applicable(f"{told}; below {_LEAST >> 20} MiB the process's own noise is larger", **figures)
    share = measured / planned
    return expect(_UNDER <= share <= _OVER, f"{told} ({share:.2f} of it)", share=share, **figures)


CHECKS = [
    Check(
        "bf16",
        "with states and heads in bfloat16 the loss adds no more error than rounding its result does",
        "logits are rounded on the way: on a GPU check the device's bfloat16 matmuls, and report it with qtarget env",
        bf16,
    ),
    Check(
        "memory of a step",
        "gradients, activations and the engine's buffers take what the estimate says",
        "the estimate does not know this model or attention: plan with the measured figure, and a margin",
        memory,
    ),
]
