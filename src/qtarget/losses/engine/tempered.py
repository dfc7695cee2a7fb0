"""Distillation at a temperature in a block of rows: one difference, in place.

Its two residuals are b (p − R) and −b (p − B), B the student and R the teacher at the temperature. In float32 the two
terms lose the digits of p that are not in their sum, which is b (B − R): where the teacher is 5e-3 nats away a
gradient is off by 1.8e-3, and by 2e-7 as one difference.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qtarget.losses.engine.buffers import Scratch, Student

# A probability from which a logarithm is read off: below it, the rounding of its exponent shows.
_READABLE = 1e-12


@dataclass
class Difference:
    """b (B − R) for a block of rows.

    Attributes:
        kl: KL(R ‖ B), [r]. cross: Σ (B − R) log p, [r]. at_label: B − R at the label, [r].
    """

    kl: Tensor
    cross: Tensor
    at_label: Tensor


def add_difference(
    g: Tensor,
    pooled: Tensor,
    z: Tensor,
    c: float,
    labels: Tensor,
    student: Student,
    a: Tensor,
    b: Tensor,
    work: Scratch,
) -> Difference:
    """Write a p + b (B − R) over the logits, the label's column still to be put right.

    B − R is (B + R) tanh(−d/2) with d = log R − log B: no cancellation where the two are near, no overflow where they
    are hundreds of nats apart. Both sum to one, so Σ (R − B) tells by how much the normalisers are off.

    Args:
        g: [r, v], where it goes; may be ``z``. pooled: [r, s] logits of R on the columns it covers, overwritten.
        z: [r, v] the student's logits; c: their coefficient in B.
    """
    rows, width = z.shape
    support = pooled.shape[1]
    inside = z[:, :support]
    d = torch.sub(pooled, inside, alpha=c, out=work.get("shift", rows, support))  # up to the normalisers
    R = torch.softmax(pooled, -1, out=pooled)
    B = torch.mul(z, c, out=work.get("base", rows, width))
    torch.softmax(B, -1, out=B)
    R_top, at = R.max(-1, keepdim=True)
    B_top = B.gather(1, at)
    shift = d.gather(1, at) + (B_top.log() - R_top.log())
    if bool((B_top < _READABLE).any()):  # then through the logits
        exact = (d + c * inside).logsumexp(-1, keepdim=True) - (c * z).logsumexp(-1, keepdim=True)
        shift = torch.where(B_top < _READABLE, exact, shift)
    d.sub_(shift)
    kl = work.dot(R, d)
    if bool(torch.isnan(kl).any()):  # an entry that R rules out: 0 · (−inf)
        kl = torch.where(R > 0, R * d, torch.zeros_like(R)).sum(-1)
    difference = work.tanh_half_(d).mul_(R.add_(B[:, :support]))  # R − B
    drift = difference.sum(-1) - B[:, support:].sum(-1)
    known = labels.clamp(max=support - 1)
    B_y = B.gather(1, labels[:, None]).squeeze(1)
    R_less_B = torch.where(known == labels, difference.gather(1, known[:, None]).squeeze(1), -B_y) - drift * B_y
    log_p = torch.sub(z, student.lse[:, None], out=work.get("log_p", rows, width))
    cross = drift * work.dot(B, log_p) - work.dot(difference, log_p[:, :support])
    if support < width:
        cross = cross + (B[:, support:] * log_p[:, support:]).sum(-1)
    torch.mul(student.scaled, (a * student.inv)[:, None], out=g)
    g[:, :support].addcmul_(difference, -b[:, None])
    g[:, support:].addcmul_(B[:, support:], b[:, None])
    g.addcmul_(B, (b * drift)[:, None])
    return Difference(kl - drift, cross, -R_less_B)
