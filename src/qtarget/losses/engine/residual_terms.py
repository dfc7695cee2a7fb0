"""A residual given by dense logits: its term of the gradient, in place over a block of rows.

Shape suffixes: r rows of the block, v vocabulary, s columns that the residual covers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qtarget.losses.engine.buffers import RowCode, Rows, Student, TermValues
from qtarget.losses.engine.scores import Compared, write_score
from qtarget.targets.residual import Residual, Term

# A probability from which a logarithm is read off: below it, the rounding of its exponent shows.
READABLE = 1e-12


@dataclass(frozen=True, kw_only=True)
class DenseTerms(RowCode):
    """Adds the terms of residuals given by dense logits to a gradient."""

    def _add_forward_kl(
        self,
        support: int,
        residual: Term,
        rows: Rows,
        student: Student,
        weight: Tensor,
        g: Tensor,
        start: Tensor | None,
    ) -> tuple[TermValues, Tensor]:
        """Add b (p − R) to g. Returns what is reported of the term, and its gradient at the label.

        Args:
            support: the columns that R covers, s. weight: b [r]. g: [r, v], which may lie over the logits.
            start: [r, 1], by which ``student.scaled`` is what g begins as; None: it comes on top of another term.

        p − R = −(p + R) tanh(d/2) with d = log R − log p: no cancellation where R is near p, no overflow where the two
        are hundreds of nats apart.
        """
        z = rows.z
        width = z.shape[1]
        inside = z[:, :support]
        R, shift, factor, lse_shift = self._beside_student(support, residual.pool, rows, student)
        # A float32 softmax over 49,152 entries sums to 1 within some 1e-5, which counts times the size of the logits.
        total = R.sum(-1)
        ce = total * student.lse - self.scratch.dot(R, inside)
        kl = factor * self.scratch.dot(R, shift) - total * lse_shift.squeeze(1)
        torch.add(-lse_shift, shift, alpha=factor, out=shift)  # d
        if bool(torch.isnan(kl).any()):  # an entry the pool rules out: 0 · (−inf)
            kl = torch.where(R > 0, R * shift, torch.zeros_like(R)).sum(-1)
        p = student.scaled[:, :support]
        R.addcmul_(p, student.inv[:, None])  # p + R
        self.scratch.tanh_half_(shift).mul_(R)  # R − p
        # softmax and lse_shift are off by some 1e-7, which moves every entry alike: Σ (R − p) tells by how much.
        drift = shift.sum(-1)
        if support < width:
            drift = drift - student.scaled[:, support:].sum(-1) * student.inv
        undo = (weight * drift * student.inv)[:, None]
        if start is not None:
            torch.mul(student.scaled, start + undo, out=g)
        else:
            g.addcmul_(student.scaled, undo)
        g[:, :support].addcmul_(shift, -weight[:, None])
        if support < width:
            g[:, support:].addcmul_(student.scaled[:, support:], (weight * student.inv)[:, None])
        known = rows.labels.clamp(max=support - 1)  # R is 0 at a label that the other model does not have
        difference_y = shift.gather(1, known[:, None]).squeeze(1) - drift * student.p_y  # R − p
        at_label = -weight * torch.where(known == rows.labels, difference_y, -student.p_y)
        return TermValues(ce, kl - drift), at_label

    def _add_divergence(
        self,
        support: int,
        residual: Term,
        rows: Rows,
        student: Student,
        weight: Tensor,
        g: Tensor,
        start: Tensor | None,
    ) -> tuple[TermValues, Tensor]:
        """b p̂ ⊙ (s − E_p̂[s]), where p̂ is p renormalised over the columns that R covers, and nothing beyond."""
        z, scaled, inv, rest_mass = rows.z[:, :support], student.scaled[:, :support], student.inv, student.rest_mass
        known = rows.labels.clamp(max=support - 1)[:, None]
        mean_log_p = -student.entropy
        log_covered = torch.zeros_like(inv)
        if support < rows.z.shape[1]:
            rest_mass, covered = _without(scaled, known)
            log_covered, inv, rest_mass = (covered * inv).log(), 1 / covered, rest_mass / covered
            mean_log_p = self.scratch.dot(scaled, z) * inv - student.lse
        R, shift, factor, lse_shift = self._beside_student(support, residual.pool, rows, student)
        lse_shift += R.sum(-1, keepdim=True).log_()  # of a float32 softmax over 49,152 entries: 1 within some 1e-5
        torch.add(log_covered[:, None] - lse_shift, shift, alpha=factor, out=shift)
        compared = Compared(scaled, inv, R, shift, z, student.lse + log_covered)
        value, factor = write_score(residual.divergence, compared, self.scratch)
        unit = inv * factor  # times which `shift` is p̂ ⊙ s
        # Where p_y is near 1, the label's score less the mean has the digits of the other tokens only.
        others, mean = (unit * x for x in _without(shift, known))
        log_p = torch.sub(z, student.lse[:, None], out=R)
        ce = student.entropy + unit * self.scratch.dot(shift, log_p) - mean * mean_log_p
        pulled_y, p_y = unit * shift.gather(1, known).squeeze(1), inv * scaled.gather(1, known).squeeze(1)
        at_label = pulled_y * rest_mass - p_y * others
        # At a label that R does not cover, p̂ has nothing.
        at_label = torch.where(known.squeeze(1) == rows.labels, at_label, 0.0)
        less_mean = (-weight * mean * inv)[:, None]
        if start is not None:
            torch.mul(student.scaled[:, support:], start, out=g[:, support:])
            torch.mul(scaled, start + less_mean, out=g[:, :support])
        else:
            g[:, :support].addcmul_(scaled, less_mean)
        g[:, :support].addcmul_(shift, (weight * unit)[:, None])
        return TermValues(ce, value), weight * at_label

    def _beside_student(
        self, support: int, pool: Residual, rows: Rows, student: Student
    ) -> tuple[Tensor, Tensor, float, Tensor]:
        """(R [r, s], shift [r, s], factor, lse_shift [r, 1]), by which log R = log p + factor · shift − lse_shift."""
        shift = self.scratch.get("shift", rows.z.shape[0], support)  # pooled logits minus the student's
        R = self.scratch.get("work", *shift.shape)
        factor = self._pool_shift(pool, rows, shift)
        if pool.coefficient("student") == 0:
            # The other models' logits themselves, not their difference to the student added back.
            self._pooled(pool, rows, R)
        else:
            torch.add(rows.z[:, :support], shift, alpha=factor, out=R)
        torch.softmax(R, -1, out=R)
        return R, shift, factor, self._lse_shift(R, shift, factor, rows, student)

    def _lse_shift(self, R: Tensor, shift: Tensor, factor: float, rows: Rows, student: Student) -> Tensor:
        """Normaliser of the pooled logits minus the student's, [r, 1], read off one entry: log R = log p + shift − it.

        At the label where both see it, else at the likeliest entry of R (whose index costs a slow pass).
        """
        y = rows.labels.clamp(max=R.shape[1] - 1)[:, None]
        R_y = R.gather(1, y)
        lse_shift = factor * shift.gather(1, y) + (student.log_p_y[:, None] - R_y.log())
        unreadable = (R_y < READABLE) | (student.p_y[:, None] < READABLE) | (y != rows.labels[:, None])
        if bool(unreadable.any()):
            (at,) = unreadable.squeeze(1).nonzero(as_tuple=True)
            top, at_top = R[at].max(-1, keepdim=True)
            z_top = rows.z[at].gather(1, at_top) - student.lse[at, None]
            lse_shift[at] = factor * shift[at].gather(1, at_top) + (z_top - top.log())
        return lse_shift

    def _pool_shift(self, pool: Residual, rows: Rows, out: Tensor) -> float:
        """Pooled logits minus the student's, up to the factor returned.

        Formed from differences, so that a teacher near the student loses no digits.
        """
        z = rows.z[:, : out.shape[1]]
        others = {name: c for name, c in pool.nonzero.items() if name != "student"}
        excess = pool.coefficient("student") + sum(others.values()) - 1
        if len(others) == 1 and abs(excess) < 1e-12 and pool.offset_slope is None:
            ((name, coefficient),) = others.items()
            torch.sub(self._dense(rows, name)[:, : out.shape[1]], z, out=out)
            return coefficient
        for number, (name, coefficient) in enumerate(others.items()):
            logits = self._dense(rows, name)[:, : out.shape[1]]
            if number == 0:
                torch.sub(logits, z, out=out).mul_(coefficient)
            else:
                out.add_(logits, alpha=coefficient).sub_(z, alpha=coefficient)
        if not others:
            torch.mul(z, excess, out=out)
        elif abs(excess) > 1e-12:
            out.add_(z, alpha=excess)
        if pool.offset_slope is not None:
            out.add_(self._offset(pool, rows))
        return 1.0

    def _pooled(self, pool: Residual, rows: Rows, out: Tensor) -> None:
        """Pooled logits of a pool without the student, exactly as its models give them."""
        out.zero_()
        for name, coefficient in pool.nonzero.items():
            out.add_(self._dense(rows, name)[:, : out.shape[1]], alpha=coefficient)

    def _offset(self, pool: Residual, rows: Rows) -> Tensor:
        assert pool.offset_slope is not None
        z_y = rows.z.gather(1, rows.labels[:, None])
        return F.logsigmoid(pool.offset_slope * (rows.z - z_y))


def _without(x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(Σ x [r] without the entry at ids [r, 1], Σ x); x is as it was afterwards."""
    here = x.gather(1, ids)
    rest = x.scatter_(1, ids, 0.0).sum(-1)
    x.scatter_(1, ids, here)
    return rest, rest + here.squeeze(1)
