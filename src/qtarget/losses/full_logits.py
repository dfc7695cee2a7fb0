"""The oracle: the loss from full logits in any dtype; every fast path is compared with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qtarget.errors import ConfigError, NonFiniteLogits
from qtarget.losses.inputs import (
    Tokens,
    check_options,
    check_requirements,
    check_top_k,
    denominator,
    real_vocabulary,
    supervised,
)
from qtarget.losses.output import LossOutput, simplex_tolerance
from qtarget.targets import Target, TokenStats
from qtarget.targets.divergence import Divergence
from qtarget.targets.residual import Residual


def target_loss(
    logits: Tensor,
    labels: Tensor,
    target: Target,
    *,
    teacher_logits: Tensor | None = None,
    reference_logits: Tensor | None = None,
    old_logps: Tensor | None = None,
    weight: Tensor | None = None,
    critical: Tensor | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: Tensor | float | None = None,
    z_loss: float = 0.0,
    stats: str = "basic",
) -> LossOutput:
    """The loss of a target on full logits: g = a (p − δ) + Σ b p ⊙ (s − E_p[s]), with a, b and s held constant.

    Under forward KL a residual's part is b (p − R); ``qtarget.divergence`` has the scores s of the others.

    Args:
        logits: [..., V]; half precision is computed in float32.
        labels: [...] int64; nothing is shifted: position i's label is labels[i].
        target: what to learn; see ``qtarget.preset``.
        teacher_logits, reference_logits: [..., V'] of the same tokens, V' at least the real vocabulary.
        old_logps: [...] log p_y of the old policy. weight: [...] or one per row. critical: [...] booleans.
        vocab_size: real tokens of a padded head; p covers the full width; uniform, teacher, reference and guided
            residuals cover the first ``vocab_size`` entries.
        reduction: "mean" divides by ``num_items`` if given, else by the number of supervised labels; weights do not
            change the divisor.
        z_loss: c of the term c · lse² on each token, lse = log Σ exp z (PaLM, arXiv:2204.02311, section 5: c = 1e-4),
            which keeps lse near 0. Its gradient is 2 c lse p; the statistics do not include it.
        stats: "basic", or "all" to add kl_q.

    Returns:
        LossOutput: the published value of the objective and per-token statistics.

    Raises:
        ConfigError: an input the target needs is missing, a shape or value is wrong, or logits are not finite.
    """
    check_options(reduction, stats, z_loss)
    tokens, z, evaluated = _tokens_and_target(
        logits, labels, target, teacher_logits, reference_logits, old_logps, weight, critical, vocab_size, ignore_index
    )
    log_p = z.log_softmax(-1)
    nll = -log_p.gather(1, tokens.labels[:, None]).squeeze(1)
    # Cross-entropy with everything that shapes the target held constant has the gradient above; the value shown is
    # the published one, to which that gradient is added as a zero.
    with_gradient = evaluated.a * nll
    for term in evaluated.residuals:
        with_gradient = with_gradient + term.b * term.pull(z)
    per_token = _published_value(target, evaluated, z.detach()) + (with_gradient - with_gradient.detach())
    if z_loss:
        per_token = per_token + z_loss * z.logsumexp(-1).square()

    statistics = _statistics(evaluated, z.detach(), tokens.labels, stats == "all")
    stats_out = {name: tokens.scatter(value, float("nan")) for name, value in statistics.items()}
    if reduction == "none":
        return LossOutput(tokens.scatter(per_token, 0.0), stats_out)
    # With nothing supervised this is a zero that still has a graph, so that other ranks are not left waiting.
    return LossOutput(per_token.sum() / denominator(reduction, tokens, num_items), stats_out)


def target_distribution(
    logits: Tensor,
    labels: Tensor,
    target: Target,
    *,
    reading: str = "induced",
    teacher_logits: Tensor | None = None,
    reference_logits: Tensor | None = None,
    old_logps: Tensor | None = None,
    weight: Tensor | None = None,
    critical: Tensor | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """The target Q itself, [..., V]; NaN rows at ignored positions.

    ``reading="induced"``: Q = p − g, what the loss asks for in this step; it may leave the simplex.
    ``reading="normalised"``: (a δ + Σ b R)/(a + Σ b), the fixed point; a row of NaN where a + Σ b = 0, or where a
    residual has another divergence than forward KL.
    The two agree where a + Σ b = 1. A residual equal to the student has no gradient and counts in neither a nor b.
    Inputs as in ``target_loss``.
    """
    if reading not in ("induced", "normalised"):
        raise ConfigError(f"reading is {reading!r}; use 'induced' or 'normalised'")
    tokens, z, evaluated = _tokens_and_target(
        logits, labels, target, teacher_logits, reference_logits, old_logps, weight, critical, vocab_size, ignore_index
    )
    p = z.detach().softmax(-1)
    delta = F.one_hot(tokens.labels, p.shape[-1]).to(p.dtype)
    if reading == "induced":
        Q = p - _logit_gradient(evaluated, z.detach(), delta)
    else:
        strength = evaluated.a + sum(term.b for term in evaluated.residuals)
        Q = evaluated.a[:, None] * delta + sum(
            (term.b[:, None] * term.log_R.exp() for term in evaluated.residuals), torch.zeros_like(p)
        )
        known = (strength != 0) & all(term.divergence.is_forward_kl for term in evaluated.residuals)
        Q = Q / strength.where(known, torch.full_like(strength, float("nan")))[:, None]
    out = Q.new_full((tokens.shape.numel(), Q.shape[-1]), float("nan"))
    out[slice(None) if tokens.index is None else tokens.index] = Q
    return out.view(*tokens.shape, -1)


@dataclass
class EvaluatedTerm:
    """A residual for each token: b [n], log R [n, V], and the columns it covers."""

    b: Tensor
    log_R: Tensor
    support: int
    divergence: Divergence

    def pull(self, z: Tensor) -> Tensor:
        """[n], of which the gradient on the logits is that of D(R, p), with R and the score held constant."""
        if self.divergence.is_forward_kl:
            return _cross_entropy(self.log_R.exp(), z.log_softmax(-1))
        return (self.gradient(z.detach()) * z).sum(-1)

    def gradient(self, z: Tensor) -> Tensor:
        """The gradient itself, [n, V]."""
        if self.divergence.is_forward_kl:
            return z.softmax(-1) - self.log_R.exp()
        pulled, p = self._score_times_p(z), self._covered(z).softmax(-1)
        return F.pad(pulled - p * pulled.sum(-1, keepdim=True), (0, z.shape[-1] - self.support))

    def value(self, z: Tensor) -> Tensor:
        """D(R, p), [n]."""
        log_p = self._log_p(z)
        log_R = self.log_R[:, : log_p.shape[-1]]
        return self.divergence.value(log_p.exp(), log_R.exp(), log_p - log_R).sum(-1)

    def _covered(self, z: Tensor) -> Tensor:
        return z[:, : self.support]

    def _log_p(self, z: Tensor) -> Tensor:
        return z.log_softmax(-1) if self.divergence.is_forward_kl else self._covered(z).log_softmax(-1)

    def _score_times_p(self, z: Tensor) -> Tensor:
        log_p = self._covered(z).log_softmax(-1)
        return self.divergence.times_p(log_p.exp(), log_p, log_p - self.log_R[:, : self.support])


def _logit_gradient(evaluated: EvaluatedTarget, z: Tensor, delta: Tensor) -> Tensor:
    g = evaluated.a[:, None] * (z.softmax(-1) - delta)
    for term in evaluated.residuals:
        g = g + term.b[:, None] * term.gradient(z)
    return g


@dataclass
class EvaluatedTarget:
    """A target's numbers for each token: a [n] of the label, and its residuals."""

    a: Tensor
    residuals: list[EvaluatedTerm]
    label_loss: Tensor


@torch.no_grad()
def _evaluate(z: Tensor, tokens: Tokens, target: Target, others: dict[str, Tensor], vocab_size: int) -> EvaluatedTarget:
    """Evaluate the trust rule and the residuals; nothing here has a gradient."""
    y = tokens.labels[:, None]
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    values = {
        "log_p_y": log_p.gather(1, y).squeeze(1),
        "rest_mass": p.scatter(1, y, 0.0).sum(-1),
        "entropy": _cross_entropy(p, log_p),
        "sum_sq": p.square().sum(-1),
        "rank": 1 + (z > z.gather(1, y)).sum(-1).to(z.dtype),
        "lower_mass": _lower_mass(z, log_p, y),
        **tokens.columns,
    }
    for name, logits in others.items():
        log_other = logits[:, :vocab_size].log_softmax(-1)
        support = log_other.shape[-1]
        log_other = F.pad(log_other, (0, vocab_size - support), value=float("-inf"))
        values[f"{name}_log_p_y"] = log_other.gather(1, y).squeeze(1)
        values[f"{name}_entropy"] = _cross_entropy(log_other.exp(), log_other)
        values[f"{name}_lower_mass"] = _lower_mass(log_other, log_other, y)
        log_covered = z[:, :support].log_softmax(-1)
        values[f"kl_{name}"] = _kl(log_covered, log_other[:, :support])

    def top_k(k: int) -> Tensor:
        check_top_k(k, z.shape[-1])
        return log_p.topk(k, dim=-1).values

    log_R, masses = [], []
    for term in target.residual_terms:
        distribution, mass = _pool_distribution(term.pool, z, y, others, vocab_size)
        log_R.append(distribution)
        masses.append(mass)
    if masses:
        values["offset_mass"] = masses[0]
    token_stats = TokenStats(values, top_k, target.needs)
    a, b = target.weights(token_stats)
    residuals = [
        EvaluatedTerm(
            weight, F.pad(R, (0, z.shape[-1] - R.shape[-1]), value=float("-inf")), R.shape[-1], term.divergence
        )
        for weight, R, term in zip(b, log_R, target.residual_terms, strict=True)
    ]
    return EvaluatedTarget(a, residuals, target.label_loss(token_stats))


def _pool_distribution(
    pool: Residual, z: Tensor, y: Tensor, others: dict[str, Tensor], vocab_size: int
) -> tuple[Tensor, Tensor]:
    """(log R on the columns it covers, mass [n] that an elementwise offset leaves of it)."""
    support = z.shape[-1] if pool.is_student_only else min([vocab_size, *(others[m].shape[-1] for m in pool.requires)])
    logits = {"student": z, **others}
    pooled = torch.zeros_like(z[:, :support])
    for name, coefficient in pool.nonzero.items():
        pooled = pooled + coefficient * logits[name][:, :support]
    mass = torch.ones_like(pooled[:, 0])
    if pool.offset_slope is not None:
        offset = F.logsigmoid(pool.offset_slope * (z - z.gather(1, y)))[:, :support]
        mass = (pooled.softmax(-1) * offset.exp()).sum(-1)
        pooled = pooled + offset
    return pooled.log_softmax(-1), mass


def _lower_mass(z: Tensor, log_p: Tensor, y: Tensor) -> Tensor:
    return torch.where(z < z.gather(1, y), log_p.exp(), torch.zeros_like(z)).sum(-1)


def _cross_entropy(R: Tensor, log_p: Tensor) -> Tensor:
    # An entry that R leaves out takes no part, however unlikely it is: 0 · (−inf) is 0 here.
    return -torch.where(R > 0, R * log_p, torch.zeros_like(R)).sum(-1)


def _kl(log_R: Tensor, log_p: Tensor) -> Tensor:
    R = log_R.exp()
    return torch.where(R > 0, R * (log_R - log_p), torch.zeros_like(R)).sum(-1)


def _published_value(target: Target, evaluated: EvaluatedTarget, z: Tensor) -> Tensor:
    """The objective's value as its paper writes it, terms without a gradient left out."""
    if not evaluated.residuals:
        return evaluated.label_loss
    if target.value == "tempered_kl":  # b₁ = T·b, so b·T²·KL(R₁ ‖ R₂) = b₁·T·KL
        teacher, student = evaluated.residuals
        temperature = target.residual_terms[0].factor
        return evaluated.label_loss + teacher.b * temperature * _kl(teacher.log_R, student.log_R)
    loss = evaluated.label_loss
    for term in evaluated.residuals:
        as_ce = target.value == "ce" and term.divergence.is_forward_kl
        loss = loss + term.b * (_cross_entropy(term.log_R.exp(), z.log_softmax(-1)) if as_ce else term.value(z))
    return loss


@torch.no_grad()
def _statistics(evaluated: EvaluatedTarget, z: Tensor, labels: Tensor, with_kl: bool) -> dict[str, Tensor]:
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    g = _logit_gradient(evaluated, z, F.one_hot(labels, p.shape[-1]).to(p.dtype))
    Q = p - g
    log_p_y = log_p.gather(1, labels[:, None]).squeeze(1)
    mass = sum((term.b for term in evaluated.residuals), torch.zeros_like(evaluated.a))
    off_simplex = (-simplex_tolerance(p.dtype) > Q).any(-1)
    statistics = {
        "nll": -log_p_y,
        "ce_q": -(Q * log_p).sum(-1),
        "trust": evaluated.a,
        "residual_mass": mass,
        "strength": evaluated.a + mass,
        "update": g.abs().sum(-1) / 2,
        "entropy": -(p * log_p).sum(-1),
        "accuracy": (log_p_y >= log_p.amax(-1)).to(p.dtype),
        "off_simplex_fraction": off_simplex.to(p.dtype),
    }
    if with_kl:
        Q = Q.clamp(min=0)
        kl_q = torch.special.xlogy(Q, Q).sum(-1) - (Q * log_p).sum(-1)
        statistics["kl_q"] = kl_q.masked_fill(off_simplex, float("nan"))
    return statistics


def _tokens_and_target(
    logits, labels, target, teacher_logits, reference_logits, old_logps, weight, critical, vocab_size, ignore_index
) -> tuple[Tokens, Tensor, EvaluatedTarget]:
    """Supervised rows of everything, checked, and the target's numbers for them."""
    vocab_size = real_vocabulary(vocab_size, logits.shape[-1])
    given = {"teacher": teacher_logits, "reference": reference_logits}
    columns = {"old_logps": old_logps, "weight": weight, "critical": critical}
    check_requirements(target, given, columns, "{}_logits=")
    dtype = logits.dtype if logits.dtype == torch.float64 else torch.float32
    tokens = supervised(labels, logits.shape[:-1], "logits", vocab_size, ignore_index, dtype, columns, [target])
    z = tokens.select(logits).to(dtype)
    _check_finite(z, "logits", tokens, z.shape[-1])
    others = {}
    for name, other in given.items():
        if other is None or name not in target.requires:
            continue
        if other.shape[:-1] != logits.shape[:-1]:
            raise ConfigError(f"{name}_logits has shape {list(other.shape)}; labels require {list(labels.shape)} + [V]")
        others[name] = tokens.select(other.detach()).to(dtype)
        required = vocab_size if name in target.needs_full_support else 0
        _check_finite(others[name], f"{name}_logits", tokens, required, target.on_ruled_out)
    return tokens, z, _evaluate(z.detach(), tokens, target, others, vocab_size)


def _check_finite(z: Tensor, what: str, tokens: Tokens, required: int, mend: str = "") -> None:
    """``required``: how many columns must be finite. Beyond, −inf may stand, a probability of 0, but not everywhere."""
    bad = ~torch.isfinite(z)
    ruled_out = z == -float("inf")
    bad[:, required:] &= (~ruled_out | ruled_out.all(-1, keepdim=True))[:, required:]
    if bad.any():
        raise NonFiniteLogits(what, int(bad.any(-1).nonzero()[0]), tokens, mend)
