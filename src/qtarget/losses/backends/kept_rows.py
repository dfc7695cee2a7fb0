"""A residual given by its k largest entries, with a tail in the student's shape: no dense row is ever formed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qtarget.losses.backends.parts import KeptRows, Rows, Scratch, Student, Term
from qtarget.targets.residual import Pool


@dataclass
class Outside:
    """What lies outside the kept ids of a top-k distribution: Σ p and Σ p (−log p) over real tokens, [r] each."""

    kept: KeptRows
    mass: Tensor
    nll: Tensor


def outside_kept(pool: Pool, rows: Rows, student: Student, real: int, scratch: Scratch) -> Outside | None:
    """What lies outside the kept ids, where the residual is ∝ p there and no dense row is needed; else None."""
    sources = [rows.others[name] for name in pool.requires]
    kept = sources[0] if len(sources) == 1 else None
    if not isinstance(kept, KeptRows) or kept.tail != "student" or not pool.keeps_student_shape:
        return None
    inside = student.scaled.gather(1, kept.ids)
    student.scaled.scatter_(1, kept.ids, 0.0)
    p = student.scaled[:, :real]
    mass = p.sum(-1) * student.inv
    nll = student.lse * mass - student.inv * scratch.dot(p, rows.z[:, :real])
    student.scaled.scatter_(1, kept.ids, inside)
    # Where the student leaves next to nothing outside the k, p has lost the tail's shape; logits have not.
    return None if bool((mass < 1e-30).any()) else Outside(kept, mass, nll)


def add_kept(
    outside: Outside,
    pool: Pool,
    rows: Rows,
    student: Student,
    weight: Tensor,
    g: Tensor,
    start: Tensor | None,
    real: int,
) -> tuple[Term, Tensor]:
    """As ``RowMath._add_dense`` for a top-k distribution whose tail has the student's shape: k gathers, no exponentials.

    Outside the k, t = p (1 − T_K)/(1 − P_K), so R/p is one number per row.
    """
    kept, rest = outside.kept, outside.mass
    z = rows.z
    (power,) = (c for name, c in pool.terms.items() if name != "student")
    log_p_rk = student.log_p(z, kept.ids)
    p_rk = log_p_rk.exp()
    rest_log = rest.log()
    # log of R/p before normalising, on the kept ids and outside them
    gap_rk = power * (kept.logprobs - log_p_rk)
    gap_tail = power * (kept.log_tail - rest_log)
    pooled = torch.cat([log_p_rk + gap_rk, (rest_log + gap_tail)[:, None]], 1)
    log_norm = pooled.logsumexp(-1)
    d_rk, d_tail = gap_rk - log_norm[:, None], gap_tail - log_norm
    log_R = pooled - log_norm[:, None]
    R_rk, R_tail = log_R[:, :-1].exp(), log_R[:, -1].exp()
    zero = torch.zeros_like(d_rk)
    ce = -torch.where(R_rk > 0, R_rk * log_p_rk, zero).sum(-1) + (R_tail / rest) * outside.nll
    kl = torch.where(R_rk > 0, R_rk * d_rk, zero).sum(-1) + torch.where(R_tail > 0, R_tail * d_tail, zero[:, 0])

    difference_rk = -(p_rk + R_rk) * torch.tanh(d_rk / 2)  # p − R
    shrink_tail = -torch.expm1(d_tail)  # (p − R)/p outside the k
    label_in_k = kept.ids == rows.labels[:, None]
    label_pull = torch.where(label_in_k.any(-1), (difference_rk * label_in_k).sum(-1), student.p_y * shrink_tail)
    base_rk = p_rk * (start / student.inv[:, None]) if start is not None else g.gather(1, kept.ids)
    # Real tokens outside the k, then padded rows, where R is 0.
    for part, pull in ((slice(0, real), weight * shrink_tail), (slice(real, z.shape[-1]), weight)):
        p, factor = student.scaled[:, part], (pull * student.inv)[:, None]
        if start is not None:
            torch.mul(p, start + factor, out=g[:, part])
        else:
            g[:, part].addcmul_(p, factor)
    g.scatter_(1, kept.ids, base_rk + weight[:, None] * difference_rk)
    return Term(ce, kl, log_norm), weight * label_pull
