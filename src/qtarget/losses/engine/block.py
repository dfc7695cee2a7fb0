"""Row mathematics in place, for a CPU's cache: weights, statistics, gradient.

Written for memory traffic: a block of rows stays in cache while some twenty elementwise passes run over it. The
formulas are those of ``losses/full_logits.py``, against which every line here is tested.

Shape suffixes: r rows of the block, v vocabulary, k kept ids of a top-k distribution.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qtarget.losses.engine import token_statistics
from qtarget.losses.engine.buffers import PerRow, RowResult, Rows, Scratch, Student, TermValues, TopKRows
from qtarget.losses.engine.residual_terms import READABLE, DenseTerms
from qtarget.losses.engine.top_k import Outside, add_top_k, cheap_rows, sums
from qtarget.losses.inputs import check_top_k
from qtarget.losses.output import simplex_tolerance
from qtarget.targets import TokenStats
from qtarget.targets.residual import Residual


@dataclass(frozen=True, kw_only=True)
class RowMath(DenseTerms):
    """Plain PyTorch; the gradient goes over the logits.

    Args:
        support: for each residual term, the columns it covers. z_loss: weight of lse² in the loss.
    """

    support: tuple[int, ...]
    z_loss: float = 0.0

    def run(self, rows: Rows) -> RowResult:
        """The block's loss, statistics and which rows have a gradient; z holds the gradient afterwards."""
        z, labels = rows.z, rows.labels
        capped = None
        if self.softcap is not None and self.gradient:
            capped = self.scratch.get("capped", *z.shape)
            torch.mul(z, 1 / self.softcap, out=capped).square_().neg_().add_(1)
        kept = cheap_rows([term.pool for term in self.target.residual_terms], rows)
        student, outside = self._student(z, labels, kept)
        a, b, label_loss = self._weights(rows, student)
        statistics = label_statistics(student.log_p_y, student.entropy, student.is_top1, a, b)
        if not b:
            loss = label_loss
            self._student_gradient(z, labels, student, a, statistics)
        elif (c := self.target.tempered) is not None:  # b is T times a weight, and the value T² KL times it
            kl = self._tempered(rows, student, a, b[0], c, statistics)
            loss = label_loss + self.target.residual_terms[0].factor * b[0] * kl
        else:
            terms = self._add_residuals(rows, student, outside, a, b, statistics)
            loss = label_loss
            for weight, term, found in zip(b, self.target.residual_terms, terms, strict=True):
                as_ce = self.target.value == "ce" and term.divergence.is_forward_kl
                loss = loss + weight * (found.ce if as_ce else found.value)
        if self.with_kl:
            statistics["kl_q"] = self._kl_q(z, student, statistics)
        active = torch.stack([a, *b]).ne(0).any(0)
        if self.z_loss:
            loss, active = loss + self.z_loss * student.lse.square(), torch.ones_like(active)
            if self.gradient:
                z.addcmul_(student.scaled, (2 * self.z_loss * student.lse * student.inv)[:, None])
        if capped is not None:
            z.mul_(capped)
        return RowResult(loss, statistics, active)

    # -- the student ---------------------------------------------------------------------------------------------

    def _student(self, z: Tensor, labels: Tensor, kept: TopKRows | None) -> tuple[Student, Outside | None]:
        y = labels[:, None]
        p = torch.softmax(z, -1, out=self.scratch.get("p", *z.shape))
        top = p.amax(-1, keepdim=True)
        p_y = p.gather(1, y)
        rest, dot, outside = sums(p, z, y, p_y, kept, self.vocab_size, self.scratch)
        total = rest + p_y
        z_y = z.gather(1, y)
        log_p_y = (p_y / total).log()
        lse = z_y - log_p_y
        hopeless = p_y < READABLE
        if bool(hopeless.any()):
            lse = torch.where(hopeless, z.amax(-1, keepdim=True) - (top / total).log(), lse)
            log_p_y = torch.where(hopeless, z_y - lse, log_p_y)
        rest_mass = rest / total
        log_p_y = torch.where(rest_mass < 0.5, torch.log1p(-rest_mass.clamp(max=0.5)), log_p_y)
        inv = 1 / total
        student = Student(
            scaled=p,
            inv=inv.squeeze(1),
            lse=lse.squeeze(1),
            p_y=(p_y / total).squeeze(1),
            rest_mass=rest_mass.squeeze(1),
            log_p_y=log_p_y.squeeze(1),
            entropy=(lse - inv * dot).squeeze(1),
            is_top1=(p_y >= top).squeeze(1),
        )
        return student, outside

    def _weights(self, rows: Rows, student: Student) -> tuple[Tensor, list[Tensor], Tensor]:
        needs = self.target.needs
        values = {"log_p_y": student.log_p_y, "rest_mass": student.rest_mass, "entropy": student.entropy}
        values |= rows.columns
        if "offset_mass" in needs and self.target.residual_terms:
            values["offset_mass"] = self._offset_mass(self.target.residual_terms[0].pool, rows)
        values |= token_statistics.of_rows(rows, needs, self.vocab_size, self._dense)

        def top_k(k: int) -> Tensor:
            check_top_k(k, rows.z.shape[-1])
            return student.log_p(rows.z, rows.z.topk(k, dim=-1).indices)

        stats = TokenStats(values, top_k, needs)
        a, b = self.target.weights(stats)
        return a, b, self.target.label_loss(stats)

    # -- gradient where every residual is the student ------------------------------------------------------------

    def _student_gradient(self, z: Tensor, labels: Tensor, student: Student, a: Tensor, statistics: PerRow) -> None:
        """g = a (p − δ): nothing but one product, its update and its simplex check come for free."""
        lowest = student.p_y + a * student.rest_mass  # Q at the label
        if bool((a > 1).any()):  # then Q_v = (1 − a) p_v elsewhere, lowest at the likeliest other token
            others = student.scaled.scatter_(1, labels[:, None], 0.0).amax(-1) * student.inv
            student.scaled.scatter_(1, labels[:, None], (student.p_y / student.inv)[:, None])
            lowest = torch.minimum(lowest, (1 - a) * others)
        statistics["off_simplex_fraction"] = (lowest < -simplex_tolerance(z.dtype)).to(z.dtype)
        statistics["update"] = a.abs() * student.rest_mass
        statistics["ce_q"] = a * -student.log_p_y + (1 - a) * student.entropy
        if self.gradient or self.with_kl:
            torch.mul(student.scaled, (a * student.inv)[:, None], out=z)
            z.scatter_(1, labels[:, None], (-a * student.rest_mass)[:, None])

    # -- gradient with residuals of their own --------------------------------------------------------------------

    def _add_residuals(
        self, rows: Rows, student: Student, outside: Outside | None, a: Tensor, b: list[Tensor], statistics: PerRow
    ) -> list[TermValues]:
        """Write g = a (p − δ) + Σ b p ⊙ (s − E_p[s]) over the logits, term by term."""
        z, y = rows.z, rows.labels[:, None]
        residuals = self.target.residual_terms
        g = z if len(residuals) == 1 else self.scratch.get("g", *z.shape)
        at_label = -a * student.rest_mass
        terms: list[TermValues] = []
        for support, residual, weight in zip(self.support, residuals, b, strict=True):
            start = None if terms else (a * student.inv)[:, None]
            if outside is None or outside.kept is not cheap_rows([residual.pool], rows):
                add = self._add_forward_kl if residual.divergence.is_forward_kl else self._add_divergence
                term, label_pull = add(support, residual, rows, student, weight, g, start)
            else:
                term, label_pull = add_top_k(outside, residual, rows, student, weight, g, start, self.vocab_size)
            at_label = at_label + label_pull
            terms.append(term)
        if g is not z:
            z.copy_(g)
        z.scatter_(1, y, at_label[:, None])
        size = terms[0].size if len(terms) == 1 else None
        self._gradient_statistics(z, student, a, b, None if size is None else size + at_label.abs(), statistics)
        left, cross = 1 - a - sum(b[1:], b[0]), sum(w * t.ce for w, t in zip(b, terms, strict=True))
        statistics["ce_q"] = a * -student.log_p_y + left * student.entropy + cross
        return terms

    def _gradient_statistics(
        self, g: Tensor, student: Student, a: Tensor, b: list[Tensor], size: Tensor | None, statistics: PerRow
    ) -> None:
        """``size``: Σ |g|, where it is known."""
        work = self.scratch.get("work", *g.shape)
        statistics["update"] = (torch.abs(g, out=work).sum(-1) if size is None else size) / 2
        if self._stays_on_simplex(a, b, g.shape[1]):  # no need to look
            statistics["off_simplex_fraction"] = torch.zeros_like(a)
            return
        torch.mul(student.scaled, student.inv[:, None], out=work).sub_(g)
        statistics["off_simplex_fraction"] = (work.amin(-1) < -simplex_tolerance(g.dtype)).to(g.dtype)

    def _stays_on_simplex(self, a: Tensor, b: list[Tensor], width: int) -> bool:
        """Whether the weights alone tell that no Q is negative: none is, and p keeps a share 1 − a − Σ b · reach."""
        most = a
        for weight, term, support in zip(b, self.target.residual_terms, self.support, strict=True):
            # Renormalised over a part of the vocabulary, p̂ is more than p, and its pull may be more than p has.
            whole = term.divergence.is_forward_kl or support == width
            if term.divergence.reach is None or not whole:
                return False
            most = most + weight * term.divergence.reach
        rounding = 1e-14 if a.dtype == torch.float64 else 1e-7
        return bool(((torch.stack([a, *b]) >= 0).all(0) & (most <= 1 + rounding)).all())

    def _tempered(self, rows: Rows, student: Student, a: Tensor, b: Tensor, c: float, statistics: PerRow) -> Tensor:
        """Write g of distillation at a temperature over the logits. Returns KL(R ‖ B) of the tempered two."""
        z = rows.z
        pooled = self.scratch.get("work", z.shape[0], min(self.support))
        self._pooled(self.target.residual_terms[0].pool, rows, pooled)
        kl, cross, at_label = _add_difference(z, pooled, c, rows.labels, student, a, b, self.scratch)
        z.scatter_(1, rows.labels[:, None], (-a * student.rest_mass + b * at_label)[:, None])
        self._gradient_statistics(z, student, a, [b, -b], None, statistics)
        statistics["ce_q"] = a * -student.log_p_y + (1 - a) * student.entropy + b * cross
        return kl

    # -- values --------------------------------------------------------------------------------------------------

    def _offset_mass(self, pool: Residual, rows: Rows) -> Tensor:
        if pool.offset_slope is None:
            return torch.ones_like(rows.z[:, 0])
        pooled = rows.z * pool.coefficient("student")
        return ((pooled + self._offset(pool, rows)).logsumexp(-1) - pooled.logsumexp(-1)).exp()

    def _kl_q(self, g: Tensor, student: Student, statistics: PerRow) -> Tensor:
        """KL(Q ‖ p) = Σ Q log(Q/p) with Q/p = 1 − g/p, so that a target near the student keeps its digits."""
        p = torch.mul(student.scaled, student.inv[:, None], out=self.scratch.get("product", *g.shape))
        Q = torch.sub(p, g, out=self.scratch.get("work", *g.shape)).clamp_(min=0)
        tiny = torch.finfo(p.dtype).tiny
        # Where p has underflowed, log p is in ce_q only; such rows are far from the student and have digits to spare.
        vanished = ((p < tiny) & (Q > 0)).any(-1)
        log_ratio = torch.log1p(-g / p.clamp_(min=tiny))
        near = torch.where(Q > 0, Q * log_ratio, torch.zeros_like(Q)).sum(-1)
        kl_q = torch.where(vanished, torch.special.xlogy(Q, Q).sum(-1) + statistics["ce_q"], near)
        return kl_q.masked_fill(statistics["off_simplex_fraction"] > 0, float("nan"))


def _add_difference(
    z: Tensor, pooled: Tensor, c: float, labels: Tensor, student: Student, a: Tensor, b: Tensor, work: Scratch
) -> tuple[Tensor, Tensor, Tensor]:
    """Distillation at a temperature: write a p + b (B − R) over the logits, the label's column still to be put right.

    Its two residuals are b (p − R) and −b (p − B), B the student and R the teacher at the temperature. In float32 the
    two terms lose the digits of p that are not in their sum: where the teacher is 5e-3 nats away a gradient is off by
    1.8e-3, and by 2e-7 as one difference.

    B − R is (B + R) tanh(−d/2) with d = log R − log B: no cancellation where the two are near, no overflow where they
    are hundreds of nats apart. Both sum to one, so Σ (R − B) tells by how much the normalisers are off.

    Args:
        z: [r, v] the student's logits, where it goes; c: their coefficient in B.
        pooled: [r, s] logits of R on the columns it covers, overwritten.

    Returns:
        KL(R ‖ B), Σ (B − R) log p, and B − R at the label, [r] each.
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
    if bool((B_top < READABLE).any()):  # then through the logits
        exact = (d + c * inside).logsumexp(-1, keepdim=True) - (c * z).logsumexp(-1, keepdim=True)
        shift = torch.where(B_top < READABLE, exact, shift)
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
    torch.mul(student.scaled, (a * student.inv)[:, None], out=z)
    z[:, :support].addcmul_(difference, -b[:, None])
    z[:, support:].addcmul_(B[:, support:], b[:, None])
    z.addcmul_(B, (b * drift)[:, None])
    return kl - drift, cross, -R_less_B


def label_statistics(log_p_y: Tensor, entropy: Tensor, is_top1: Tensor, a: Tensor, b: list[Tensor]) -> PerRow:
    """The statistics that need nothing but the student and the weights."""
    mass = sum(b, torch.zeros_like(a))
    return {
        "nll": -log_p_y,
        "trust": a,
        "residual_mass": mass,
        "strength": a + mass,
        "entropy": entropy,
        "accuracy": is_top1.to(a.dtype),
    }
