"""Objectives that choose which tokens are trained, by student, reference or data."""

from __future__ import annotations

import math

from qtarget.errors import unknown
from qtarget.targets import residual, trust
from qtarget.targets.presets.entry import preset
from qtarget.targets.presets.printed import covered_log_p, nll, weighted_nll
from qtarget.targets.target import Target


def profit_loss(logits, labels, *, tau, direction, tau_low, tau_high):
    """−1[p_y ≥ τ] log p_y; lower keeps p_y ≤ τ, middle τ_low ≤ p_y ≤ τ_high."""
    keep = {
        "higher": lambda p_y: p_y >= tau,
        "lower": lambda p_y: p_y <= tau,
        "middle": lambda p_y: (p_y >= tau_low) & (p_y <= tau_high),
    }[direction]
    return weighted_nll(logits, labels, keep)


@preset(
    "profit",
    group="selection",
    formula="L = −m log p_y;  a = m = 1[p_y ≥ tau]",
    trusts="1 where p_y ≥ tau, else 0",
    rest="the student",
    source="arXiv:2601.09195",
    printed=profit_loss,
    defaults="the authors' script",
    traps="in evaluation their code divides by the kept tokens only; here every supervised token always counts",
)
def profit(
    tau: float = 0.1, direction: str = "higher", tau_low: float | None = None, tau_high: float | None = None
) -> Target:
    """Drop tokens below a probability; "lower" drops those above, "middle" keeps tau_low to tau_high."""
    return Target(trust=trust.probability_threshold(tau, direction, tau_low, tau_high), residual=residual.student())


def eaft_loss(logits, labels, *, top_k, power, normalizer):
    """−sg((H_k / ln k)^power) log p_y with H_k the entropy of the renormalised top k."""
    log_top = logits.topk(top_k).values.log_softmax(-1)
    entropy = -(log_top.exp() * log_top).sum(-1)
    divisor = math.log(top_k) if normalizer == "log_k" else 1.0 if normalizer == "none" else float(normalizer)
    return ((entropy / divisor) ** power).detach() * nll(logits, labels)


@preset(
    "eaft",
    group="selection",
    formula="L = −sg(a) log p_y;  a = (H_k / ln k)^power",
    trusts="the student's uncertainty, H_k / ln k",
    rest="the student",
    source="arXiv:2601.02151",
    printed=eaft_loss,
    defaults="the paper's; LLaMA-Factory divides by 3.0 in place of ln k (normalizer 3.0), axolotl by nothing (none)",
    traps="axolotl takes k = min(top_k, V); here a top_k beyond the vocabulary is refused. power 0 is sft",
)
def eaft(top_k: int = 20, power: float = 1.0, normalizer: str | float = "log_k") -> Target:
    """Learn most where the student is undecided. Blind to the label: noise keeps its weight there."""
    return Target(trust=trust.entropy(top_k, power, normalizer), residual=residual.student())


def iw_sft_loss(logits, labels, *, weight):
    """−w log p_y with w given."""
    return weight * nll(logits, labels)


@preset(
    "iw-sft",
    group="selection",
    formula="L = −w log p_y;  a = w",
    trusts="w, the weight of the row",
    rest="the student",
    source="arXiv:2507.12856",
    printed=iw_sft_loss,
    traps="their code computes w during training: exp of the row's mean log(p / ref), at most 16; here it is a column",
)
def iw_sft() -> Target:
    """Importance-weighted rows, weights given as data; w > 1 leaves the simplex."""
    return Target(trust=trust.trajectory_weight(), residual=residual.student())


def cft_loss(logits, labels, *, critical):
    """−c log p_y with c ∈ {0, 1} given."""
    return critical.to(logits.dtype) * nll(logits, labels)


@preset(
    "cft",
    group="selection",
    formula="L = −c log p_y;  a = c ∈ {0, 1}",
    trusts="1 on critical tokens, else 0",
    rest="the student",
    source="arXiv:2510.10974",
    printed=cft_loss,
    traps="no official code; the paper does not say whether it divides by all tokens or the critical ones",
)
def cft() -> Target:
    """Train only the tokens marked as critical; the denominator counts all supervised tokens."""
    return Target(trust=trust.token_mask(), residual=residual.student())


def prift_loss(logits, labels, *, by, threshold, reference_logits, vocab_size=None):
    """−sg(a) log p_y: a = ref_y, or 1[u ≥ τ] with u = ref_y + Σ ref_v over the ref_v < ref_y."""
    ref = covered_log_p(reference_logits, vocab_size).exp()
    ref_y = ref.gather(-1, labels[:, None])
    if by == "prob":
        return ref_y.squeeze(-1) * nll(logits, labels)
    u = ref_y.squeeze(-1) + ref.where(ref < ref_y, 0).sum(-1)
    return (u >= threshold) * nll(logits, labels)


@preset(
    "prift",
    group="selection",
    formula="L = −sg(a) log p_y;  a = ref_y, by mass a = 1[ref_y + Σ_{ref_v < ref_y} ref_v ≥ threshold]",
    trusts="the reference's p of the label",
    rest="the student",
    source="arXiv:2606.09396",
    printed=prift_loss,
    defaults="the authors' code; threshold is for by: mass",
)
def prift(by: str = "prob", threshold: float = 0.5) -> Target:
    """Learn what the initial model found likely, or, with by: mass, only what lies above its unlikely half."""
    if by not in ("prob", "mass"):
        raise unknown("by", by, ("prob", "mass"))
    rule = trust.reference_probability() if by == "prob" else trust.reference_lower_mass(threshold)
    return Target(trust=rule, residual=residual.student())


def stm_loss(logits, labels, *, perplexity, reference_logits, vocab_size=None):
    """−1[1/ref_y ≤ τ] log p_y"""
    ref_y = covered_log_p(reference_logits, vocab_size).gather(-1, labels[:, None]).squeeze(-1).exp()
    return (1 / ref_y <= perplexity) * nll(logits, labels)


@preset(
    "stm",
    group="selection",
    formula="L = −m log p_y;  a = m = 1[1/ref_y ≤ perplexity]",
    trusts="1 where the reference finds the label easy, else 0",
    rest="the student",
    source="arXiv:2501.14315",
    printed=stm_loss,
    defaults="the authors' code",
    traps="their code divides by the kept tokens only; here every supervised token counts",
)
def stm(perplexity: float = 2.5) -> Target:
    """Drop what surprises the initial model, so that it forgets little of what it could do."""
    return Target(trust=trust.reference_threshold(perplexity), residual=residual.student())
