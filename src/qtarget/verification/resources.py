"""What half precision costs the loss, and whether memory stays within the plan."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qtarget.losses import Head
from qtarget.verification.check import Finding, check, expect, not_applicable, within
from qtarget.verification.expected import Expected, label_log_p, logits_of, own_logits
from qtarget.verification.subject import Sample, Subject, relative, supervised

# Twice what rounding a result to bfloat16's 8 bits does: on a GPU what the last product reads is rounded too.
_BF16 = 2**-8
# How far a step may be from its estimate, an allocator's slack included, and below which a process's own noise is larger.
_OVER, _UNDER, _LEAST = 1.35, 0.5, 256 << 20


@check(
    "bf16",
    "logits are rounded on the way: on a GPU check the device's bfloat16 matmuls, and report it with qtarget env",
    of_gradient=True,
)
def bf16(subject: Subject) -> Finding:
    """With states and heads in bfloat16 the loss adds no more error than rounding its result does."""
    expected = Expected(subject)
    gradients = [_bf16_gradients(expected, sample) for sample in subject.samples]
    engine, exact, unrounded, eager = (torch.cat(parts).double() for parts in zip(*gradients, strict=True))
    error, with_logits = relative(engine, exact), relative(eager, exact)
    total, shift = relative(engine, unrounded), _autocast_shift(subject)
    told = f"the loss adds {error:.1e} (with logits in bf16: {with_logits:.1e}); against fp32 {total:.1e}"
    told += "" if shift is None else f"; under autocast log p_y is off by {shift:.1e} on average"
    return within(error, _BF16, told, bf16_logits=with_logits, against_fp32=total, log_p_shift=shift)


def _bf16_gradients(expected: Expected, sample: Sample) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dH by the engine from rounded states and heads, in float64 from the same and from the unrounded ones; and what
    rounding the logits would add.
    """
    given = expected.given(sample)
    heads = {name: _rounded(head) if isinstance(head, Head) else head for name, head in sample.heads.items()}
    rounded = replace(sample, student=_rounded(sample.student), heads=heads)

    def exact(sample: Sample, logits: Tensor) -> Tensor:
        models = {f"{name}_logits": expected.dense(head, logits) for name, head in sample.heads.items()}
        return expected.hidden_gradient(sample, {**given, **models}, logits)

    engine, _ = expected.subject.engine(rounded, given)
    logits = logits_of(rounded.student)
    unrounded = exact(sample, logits_of(sample.student))
    return engine, exact(rounded, logits), unrounded, exact(rounded, logits.bfloat16().double())


def _rounded(head: Head) -> Head:
    bias = None if head.bias is None else head.bias.bfloat16()
    return replace(head, hidden=head.hidden.bfloat16(), weight=head.weight.detach().bfloat16(), bias=bias)


def _autocast_shift(subject: Subject) -> float | None:
    """Mean |Δ log p_y| over the first document when the model computes under bfloat16 autocast."""
    row = subject.rows[0]
    ids, labels = (torch.tensor([row[name]], device=subject.device) for name in ("input_ids", "labels"))
    places = torch.tensor(supervised(row), device=subject.device)

    def log_p() -> Tensor:
        return label_log_p(own_logits(subject.model, {"input_ids": ids})[0, places - 1], labels[0, places])

    with subject.without_dropout(), torch.no_grad():
        full = log_p()
        try:
            with torch.autocast(subject.device.type, torch.bfloat16):
                low = log_p()
        except RuntimeError:  # a device without it
            return None
    return float((low - full).abs().mean())


@check(
    "memory of a step",
    "the estimate does not know this model or attention: plan with the measured figure, and a margin",
)
def memory(subject: Subject) -> Finding:
    """Gradients, activations and the engine's buffers take as much memory as estimated."""
    batch = subject.step.batch
    positions, supervised = batch["labels"].numel(), int((batch["labels"][:, 1:] != -100).sum())
    measured = subject.step.bytes
    planned = None if subject.estimate is None else subject.estimate(positions, supervised)
    if measured is None:
        return not_applicable("this system does not report how much memory a piece of work used")
    figures = {"measured": measured, "estimate": planned, "positions": positions}
    told = f"{measured / 2**20:,.0f} MiB for {positions} positions"
    if planned is None:
        return not_applicable(f"{told}; there is no estimate for adapters or unknown shapes", **figures)
    told += f", estimated {planned / 2**20:,.0f}"
    if planned < _LEAST:
        return not_applicable(f"{told}; below {_LEAST >> 20} MiB the process's own noise is larger", **figures)
    share = measured / planned
    return expect(_UNDER <= share <= _OVER, f"{told} ({share:.2f} of it)", share=share, **figures)


CHECKS = [bf16, memory]
