"""Objectives that weigh the label and leave the rest to the student."""

from __future__ import annotations

import math

from qtarget.targets import residual, trust
from qtarget.targets.presets import printed
from qtarget.targets.presets.entry import preset
from qtarget.targets.presets.printed import label_log_p, nll
from qtarget.targets.target import Target


@preset(
    "sft",
    group="label",
    formula="L = −log p_y;  a = 1",
    trusts="every label fully",
    rest="nowhere: Q = δ",
    source="cross-entropy",
    printed=nll,
    aliases=("nll",),
)
def sft() -> Target:
    """Fit every observed token as if it were the only right one."""
    return Target(trust=trust.constant(1.0), residual=residual.student())


@preset(
    "dft",
    group="label",
    formula="L = −sg(p_y) log p_y;  a = p_y",
    trusts="p_y",
    rest="the student",
    source="arXiv:2508.05629",
    printed=printed.dft,
    aliases=("p-loss",),
)
def dft() -> Target:
    """Learn least from tokens the student finds unlikely: noise is ignored, and so is news."""
    return Target(trust=trust.probability(), residual=residual.student())


def beyond_log_loss(logits, labels, *, alpha):
    """(1 − p_y^α)/α without any stop-gradient; α → 0 is −log p_y."""
    if alpha == 0:
        return nll(logits, labels)
    p_y = logits.softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    return (1 - p_y**alpha) / alpha


@preset(
    "beyond-log",
    group="label",
    formula="L = (1 − p_y^alpha)/alpha;  a = p_y^alpha",
    trusts="p_y^alpha",
    rest="the student",
    source="arXiv:2510.00526",
    printed=beyond_log_loss,
)
def beyond_log(alpha: float = 1.0) -> Target:
    """A family: alpha 0 is sft, 1 has dft's gradient, more trusts only the likely, less than 0 leaves the simplex."""
    return Target(trust=trust.probability_power(alpha), residual=residual.student())


def profit_loss(logits, labels, *, tau, direction, tau_low, tau_high):
    """−1[p_y ≥ τ] log p_y; lower is p_y < τ, middle is τ_low ≤ p_y < τ_high."""
    log_p_y = label_log_p(logits, labels)
    p_y = log_p_y.exp().detach()
    if direction == "middle":
        return -((p_y >= tau_low) & (p_y < tau_high)).to(p_y.dtype) * log_p_y
    return -(p_y >= tau if direction == "higher" else p_y < tau).to(p_y.dtype) * log_p_y


@preset(
    "profit",
    group="selection",
    formula="L = −m log p_y;  a = m = 1[p_y ≥ tau]",
    trusts="1 where p_y ≥ tau, else 0",
    rest="the student",
    source="arXiv:2601.09195",
    printed=profit_loss,
)
def profit(
    tau: float = 0.1, direction: str = "higher", tau_low: float | None = None, tau_high: float | None = None
) -> Target:
    """Drop tokens below a probability; "lower" drops those above, "middle" keeps tau_low ≤ p_y < tau_high."""
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
    trusts="the student's doubt, H_k / ln k",
    rest="the student",
    source="arXiv:2601.02151",
    printed=eaft_loss,
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
)
def cft() -> Target:
    """Train only the tokens marked as critical; the denominator counts all supervised tokens."""
    return Target(trust=trust.token_mask(), residual=residual.student())
