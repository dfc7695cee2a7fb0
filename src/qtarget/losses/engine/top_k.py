"""A residual given by its k largest entries, with a tail in the student's shape: no dense row is ever formed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qtarget.losses.engine.buffers import KeptRows, Rows, Scratch, Student, Term
from qtarget.targets.residual import Pool


@dataclass
class Sums:
    """Sums over the unnormalised p of a block of rows, [r, 1] each.

    Attributes:
        rest: Σ p without the label, so that 1 − p_y keeps its digits where p_y is near 1. dot: Σ p z.
        outside: what lies outside the kept ids, where there are any.
    """

    rest: Tensor
    dot: Tensor
    outside: Outside | None = None


@dataclass
class Outside:
    """What lies outside the kept ids of a top-k distribution, over unnormalised p, [r, 1] each.

    Attributes:
        mass, dot: Σ p and Σ p z over real tokens. but_label: the mass without the label. padded: Σ p over padded rows.
    """

    kept: KeptRows
    mass: Tensor
    dot: Tensor
    but_label: Tensor
    padded: Tensor


def kept_for(pools: list[Pool], rows: Rows) -> KeptRows | None:
    """The top-k distribution that some residual follows without a dense row: its tail and the pool are ∝ p outside."""
    for pool in pools:
        sources = [rows.others[name] for name in pool.requires]
        kept = sources[0] if len(sources) == 1 else None
        if isinstance(kept, KeptRows) and kept.tail == "student" and pool.keeps_student_shape:
            return kept
    return None


def sums(p: Tensor, z: Tensor, y: Tensor, p_y: Tensor, kept: KeptRows | None, real: int, scratch: Scratch) -> Sums:
    """Each entry is read once for Σ p and once for Σ p z, with kept ids or without; p is as it was afterwards."""
    if kept is None:
        p.scatter_(1, y, 0.0)
        rest = p.sum(-1, keepdim=True)
        p.scatter_(1, y, p_y)
        return Sums(rest, scratch.dot(p, z)[:, None])
    inside, z_y = p.gather(1, kept.ids), z.gather(1, y)
    p.scatter_(1, kept.ids, 0.0).scatter_(1, y, 0.0)
    product = torch.mul(p, z, out=scratch.get("product", *z.shape))
    but_label, dot = (x[:, :real].sum(-1, keepdim=True) for x in (p, product))
    padded, padded_dot = torch.zeros_like(p_y), torch.zeros_like(p_y)
    if real < p.shape[1]:
        padded, padded_dot = (x[:, real:].sum(-1, keepdim=True) for x in (p, product))
    p.scatter_(1, y, p_y).scatter_(1, kept.ids, inside)
    is_label = kept.ids == y
    label_outside = torch.where(is_label.any(-1, keepdim=True), 0.0, p_y)
    outside = Outside(kept, but_label + label_outside, dot + label_outside * z_y, but_label, padded)
    rest = but_label + padded + inside.masked_fill(is_label, 0.0).sum(-1, keepdim=True)
    in_dot = (inside * z.gather(1, kept.ids)).sum(-1, keepdim=True)
    # Where the student leaves next to nothing outside the k, p has lost the tail's shape; logits have not.
    lost = bool((outside.mass < 1e-30 * (rest + p_y)).any())
    return Sums(rest, outside.dot + padded_dot + in_dot, None if lost else outside)


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
    kept, z = outside.kept, rows.z
    rest = outside.mass.squeeze(1) * student.inv
    rest_nll = student.lse * rest - student.inv * outside.dot.squeeze(1)
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
    ce = -torch.where(R_rk > 0, R_rk * log_p_rk, zero).sum(-1) + (R_tail / rest) * rest_nll
    kl = torch.where(R_rk > 0, R_rk * d_rk, zero).sum(-1) + torch.where(R_tail > 0, R_tail * d_tail, zero[:, 0])

    difference_rk = -(p_rk + R_rk) * torch.tanh(d_rk / 2)  # p − R
    shrink_tail = -torch.expm1(d_tail)  # (p − R)/p outside the k
    is_label = kept.ids == rows.labels[:, None]
    label_pull = torch.where(is_label.any(-1), (difference_rk * is_label).sum(-1), student.p_y * shrink_tail)
    base_rk = p_rk * (start / student.inv[:, None]) if start is not None else g.gather(1, kept.ids)
    # Real tokens outside the k, then padded rows, where R is 0.
    for part, pull in ((slice(0, real), weight * shrink_tail), (slice(real, z.shape[-1]), weight)):
        p, factor = student.scaled[:, part], (pull * student.inv)[:, None]
        if start is not None:
            torch.mul(p, start + factor, out=g[:, part])
        else:
            g[:, part].addcmul_(p, factor)
    g_rk = base_rk + weight[:, None] * difference_rk
    g.scatter_(1, kept.ids, g_rk)
    if start is None:  # it comes on top of another term
        return Term(ce, kl, log_norm), weight * label_pull
    a = start.squeeze(1) / student.inv
    size = (a + weight * shrink_tail).abs() * outside.but_label.squeeze(1) * student.inv
    size = size + (a + weight).abs() * outside.padded.squeeze(1) * student.inv
    size = size + g_rk.masked_fill(is_label, 0.0).abs().sum(-1)
    return Term(ce, kl, log_norm, size), weight * label_pull
