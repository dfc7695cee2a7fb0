"""A residual given by its k largest entries and a tail in the student's shape.

For the blocks of a CPU (``block.py``), and for two passes over logits from which the k entries have been taken out
(``device/device_rows.py``). Shape suffixes: r rows of the block, v vocabulary, k kept ids.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qtarget.losses.engine.buffers import PerRow, Rows, Scratch, Student, TermValues, TopKRows
from qtarget.losses.engine.device.row_functions import derived, kl_terms
from qtarget.losses.engine.device.row_plan import NEVER, TABLE, RowPlan
from qtarget.targets.divergence import Divergence
from qtarget.targets.residual import Residual, Term


@dataclass
class Outside:
    """What lies outside the kept ids of a top-k distribution, over unnormalised p, [r, 1] each.

    Attributes:
        mass, dot: Σ p and Σ p z over real tokens. but_label: the mass without the label. padded: Σ p over padded rows.
    """

    kept: TopKRows
    mass: Tensor
    dot: Tensor
    but_label: Tensor
    padded: Tensor


def cheap_rows(pools: list[Residual], rows: Rows) -> TopKRows | None:
    """The top-k distribution that some residual follows without a dense row: its tail and the pool are ∝ p outside."""
    for pool in pools:
        sources = [rows.aux[name] for name in pool.requires]
        kept = sources[0] if len(sources) == 1 else None
        if isinstance(kept, TopKRows) and kept.tail == "student" and pool.keeps_student_shape:
            return kept
    return None


def sums(
    p: Tensor, z: Tensor, y: Tensor, p_y: Tensor, kept: TopKRows | None, vocab_size: int, scratch: Scratch
) -> tuple[Tensor, Tensor, Outside | None]:
    """(Σ p without the label, so that 1 − p_y keeps its digits near 1; Σ p z; what is outside the kept ids), [r, 1] each.

    Each entry is read once for Σ p and once for Σ p z, with kept ids or without; p is as it was afterwards.
    """
    if kept is None:
        p.scatter_(1, y, 0.0)
        rest = p.sum(-1, keepdim=True)
        p.scatter_(1, y, p_y)
        return rest, scratch.dot(p, z)[:, None], None
    inside, z_y = p.gather(1, kept.ids), z.gather(1, y)
    p.scatter_(1, kept.ids, 0.0).scatter_(1, y, 0.0)
    product = torch.mul(p, z, out=scratch.get("product", *z.shape))
    but_label, dot = (x[:, :vocab_size].sum(-1, keepdim=True) for x in (p, product))
    padded, padded_dot = torch.zeros_like(p_y), torch.zeros_like(p_y)
    if vocab_size < p.shape[1]:
        padded, padded_dot = (x[:, vocab_size:].sum(-1, keepdim=True) for x in (p, product))
    p.scatter_(1, y, p_y).scatter_(1, kept.ids, inside)
    is_label = kept.ids == y
    label_outside = torch.where(is_label.any(-1, keepdim=True), 0.0, p_y)
    outside = Outside(kept, but_label + label_outside, dot + label_outside * z_y, but_label, padded)
    rest = but_label + padded + inside.masked_fill(is_label, 0.0).sum(-1, keepdim=True)
    in_dot = (inside * z.gather(1, kept.ids)).sum(-1, keepdim=True)
    # Where the student leaves next to nothing outside the k, p has lost the tail's shape; logits have not.
    lost = bool((outside.mass < 1e-30 * (rest + p_y)).any())
    return rest, outside.dot + padded_dot + in_dot, None if lost else outside


def add_top_k(
    outside: Outside,
    residual: Term,
    rows: Rows,
    student: Student,
    weight: Tensor,
    g: Tensor,
    start: Tensor | None,
    vocab_size: int,
) -> tuple[TermValues, Tensor]:
    """As ``DenseTerms._add_forward_kl`` where a tail has the student's shape: k gathers, no exponentials.

    Outside the k, t = p (1 − T_K)/(1 − P_K), so R/p is one number per row: the problem has k + 1 outcomes.
    """
    kept, z = outside.kept, rows.z
    rest = outside.mass.squeeze(1) * student.inv
    rest_nll = student.lse * rest - student.inv * outside.dot.squeeze(1)
    (power,) = (c for name, c in residual.pool.nonzero.items() if name != "student")
    log_p_rk = student.log_p(z, kept.ids)
    # of the k outcomes and of what is outside
    log_p = torch.cat([log_p_rk, rest.log()[:, None]], 1)
    gap = power * (torch.cat([kept.logprobs, kept.log_tail[:, None]], 1) - log_p)  # log of R/p before normalising
    d = gap - (log_p + gap).logsumexp(-1, keepdim=True)
    p, R = log_p.exp(), (log_p + d).exp()
    if residual.divergence.is_forward_kl:
        pull, value = -(p + R) * torch.tanh(d / 2), torch.where(R > 0, R * d, torch.zeros_like(R)).sum(-1)
        ce = -torch.where(R > 0, R * log_p, torch.zeros_like(R))[:, :-1].sum(-1) + (R[:, -1] / rest) * rest_nll
        padded_pull = weight  # R is 0 there
    else:
        pull, value = _lumped(residual.divergence, p, log_p, d, R)
        ce = student.entropy + (pull * log_p)[:, :-1].sum(-1) - (pull[:, -1] / rest) * rest_nll
        padded_pull = torch.zeros_like(weight)

    pull_rk, pull_tail = pull[:, :-1], pull[:, -1] / rest  # the tail's by p
    is_label = kept.ids == rows.labels[:, None]
    label_pull = torch.where(is_label.any(-1), (pull_rk * is_label).sum(-1), student.p_y * pull_tail)
    base_rk = p[:, :-1] * (start / student.inv[:, None]) if start is not None else g.gather(1, kept.ids)
    # Real tokens outside the k, then padded rows.
    for part, by in ((slice(0, vocab_size), weight * pull_tail), (slice(vocab_size, z.shape[-1]), padded_pull)):
        scaled, factor = student.scaled[:, part], (by * student.inv)[:, None]
        if start is not None:
            torch.mul(scaled, start + factor, out=g[:, part])
        else:
            g[:, part].addcmul_(scaled, factor)
    g_rk = base_rk + weight[:, None] * pull_rk
    g.scatter_(1, kept.ids, g_rk)
    if start is None:  # it comes on top of another term
        return TermValues(ce, value), weight * label_pull
    a = start.squeeze(1) / student.inv
    size = (a + weight * pull_tail).abs() * outside.but_label.squeeze(1) * student.inv
    size = size + (a + padded_pull).abs() * outside.padded.squeeze(1) * student.inv
    size = size + g_rk.masked_fill(is_label, 0.0).abs().sum(-1)
    return TermValues(ce, value, size), weight * label_pull


def _lumped(divergence: Divergence, p: Tensor, log_p: Tensor, d: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    """(p̂ ⊙ (s − E_p̂[s]) [r, k + 1], D [r]) of outcomes, p̂ being p over the real tokens alone; d = log R − log p."""
    covered = p.sum(-1, keepdim=True)
    p, log_p = p / covered, log_p - covered.log()
    scored = divergence.times_p(p, log_p, -d - covered.log())
    # Scores relative to the likeliest outcome's: where p is near 1, the mean would take all its digits.
    top = p.argmax(-1, keepdim=True)
    scored = (scored - p * (scored.gather(1, top) / p.gather(1, top))).scatter(1, top, 0.0)
    value = divergence.value(p, R, -d - covered.log()).sum(-1)
    return scored - p * scored.sum(-1, keepdim=True), value


# -- for two passes over logits ------------------------------------------------------------------------------------


@dataclass
class Entries:
    """The k kept entries of a block's logits, while they are taken out of it.

    Attributes:
        z: [r, k] their logits. z_label: [r]. is_label: [r, k]. label_kept: [r], whether the label is among them.
    """

    kept: TopKRows
    z: Tensor
    z_label: Tensor
    is_label: Tensor
    label_kept: Tensor

    def put_back(self, table: Tensor, plan: RowPlan, padded: bool) -> tuple[Tensor, Shares]:
        """(the table of all columns from that of what was left, the difference on the k and on what is outside).

        What is outside has a maximum of its own, so that it is never lost however sure the student is of the k.

        Args:
            table: [len(TABLE), r]. padded: whether the first pass's pool is the student over real tokens.
        """
        s = dict(zip(TABLE, table.unbind(0), strict=True))
        left, z_y = s["m"], torch.where(self.label_kept, self.z_label, s["z_y"])
        if padded:
            log_outside = left + s["m_u"] + s["log_s_u"]
        else:
            label = (z_y - left).exp().masked_fill(self.label_kept, 0.0)
            log_outside = (left + (s["rest"] + label).log()).clamp(min=NEVER)
        m = torch.maximum(torch.maximum(left, z_y), self.z.amax(1))
        x = self.z - m.unsqueeze(1)
        e = x.exp().masked_fill(self.is_label, 0.0)
        moved = left - m
        s |= {
            "z_y": z_y,
            "m": m,
            "dot": (s["dot"] + moved * s["rest"]) * moved.exp() + (e * x).sum(1),
            "rest": s["rest"] * moved.exp() + e.sum(1),
            "top": torch.maximum(s["top"], self.z.masked_fill(self.is_label, float("-inf")).amax(1)),
        }
        s |= derived(s)
        # Not where every real token is kept, for which a share would be 0/0.
        s["log_s_b"] = torch.where(log_outside > 0.1 * NEVER, log_outside - m, 0.0)
        shares = self._shares(s, log_outside, plan, padded)
        s["tail_pull"] = shares.difference.select(1, self.z.shape[1])
        return torch.stack([s[name] for name in TABLE]), shares

    def _shares(self, s: PerRow, log_outside: Tensor, plan: RowPlan, padded: bool) -> Shares:
        """What is outside is one outcome more: R/p is one number there, and so are the scores of every divergence."""
        divergence = plan.divergence
        log_p = (self.z - s["m"].unsqueeze(1)) - s["log_s"].unsqueeze(1)
        log_p = torch.where(self.is_label, s["log_p_y"].unsqueeze(1), log_p)
        rest = log_outside - s["m"] - s["log_s"]
        log_tail = torch.where(rest > 0.1 * NEVER, self.kept.log_tail, rest)
        log_base = torch.cat([log_p, rest.unsqueeze(1)], 1)
        if padded and not divergence.is_forward_kl:
            log_base = log_base - log_base.logsumexp(1, keepdim=True)
        gap = plan.c_o * (torch.cat([self.kept.logprobs, log_tail.unsqueeze(1)], 1) - log_base)
        d = (log_base + gap).logsumexp(1, keepdim=True) - gap  # log B − log R
        base, R = log_base.exp(), (log_base - d).exp()
        difference = divergence.times_p(base, log_base, d)
        value = divergence.value(base, R, d)
        if divergence.is_forward_kl:
            value = value + difference
        else:
            difference = difference - base * difference.sum(1, keepdim=True)
        return Shares(self, log_p, difference, value.sum(1))


@dataclass
class Shares:
    """A residual's difference on the k entries and, last, on everything outside [r, k + 1]; log p [r, k] of the entries;
    the divergence [r]."""

    entries: Entries
    log_p: Tensor
    difference: Tensor
    value: Tensor

    def gradient(self, a: Tensor, b: Tensor, rest_mass: Tensor, with_kl: bool) -> tuple[PerRow, Tensor]:
        """(what the k, and the divergence, add to what the second pass found, g [r, k])."""
        a, b, rest_mass = a.unsqueeze(1), b.unsqueeze(1), rest_mass.unsqueeze(1)
        p, difference = self.log_p.exp(), self.difference.narrow(1, 0, self.log_p.shape[1])
        g = torch.where(self.entries.is_label, -a * rest_mass, a * p) + b * difference
        found = {
            "size": g.abs().sum(1),
            "lowest": (p - g).amin(1),
            "divergence": self.value,
            "cross": (difference * self.log_p).sum(1),
        }
        if with_kl:
            found["kl_q"] = kl_terms(p, self.log_p, g).sum(1)
        return found, g

    def write(self, g: Tensor, rows: Rows, places: Tensor | None, softcap: float | None, factor: Tensor) -> None:
        """Put g [r, k] where the second pass left nothing."""
        if softcap is not None:
            g = g * (1 - (self.entries.z / softcap) ** 2)
        g = g * factor.unsqueeze(1)
        out, ids = rows.z if rows.g is None else rows.g, self.entries.kept.ids
        if places is None:
            out.narrow(0, 0, g.shape[0]).scatter_(1, ids, g.to(out.dtype))
        else:  # −1 is the last row, which is there for rows without a gradient
            out.index_put_((places.unsqueeze(1), ids), g.to(out.dtype))


def take_out(z: Tensor, y: Tensor, kept: TopKRows) -> Entries:
    """Replace the kept entries of the logits by what is not there."""
    is_label = kept.ids == y.unsqueeze(1)
    z_label = z.gather(1, y.unsqueeze(1)).squeeze(1)
    entries = Entries(kept, z.gather(1, kept.ids), z_label, is_label, is_label.any(1))
    z.scatter_(1, kept.ids, NEVER)
    return entries
