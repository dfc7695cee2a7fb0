"""Losses from classification, as weights of the label."""

from __future__ import annotations

from qtarget.errors import check_range
from qtarget.targets import residual, trust
from qtarget.targets.presets.entry import preset
from qtarget.targets.presets.printed import label_log_p, nll
from qtarget.targets.target import Target


def focal_loss(logits, labels, *, gamma, held):
    """−(1 − p_y)^γ log p_y, the factor differentiated or held constant."""
    log_p_y = label_log_p(logits, labels)
    factor = (-log_p_y.expm1()) ** gamma
    return -(factor.detach() if held else factor) * log_p_y


@preset(
    "focal",
    group="label",
    formula="L = −(1 − p_y)^γ log p_y;  a = (1 − p_y)^γ − γ p_y (1 − p_y)^(γ − 1) log p_y, held: a = (1 − p_y)^γ",
    trusts="the unlikely labels most",
    rest="the student",
    source="arXiv:1708.02002",
    printed=focal_loss,
    defaults="the paper's, for detection",
    traps="held: true keeps the factor out of the gradient; without it rare labels get more than sft gives them",
)
def focal(gamma: float = 2.0, held: bool = False) -> Target:
    """The opposite of dft: learn most from what the student finds unlikely, noise included; gamma 0 is sft."""
    return Target(trust=trust.focal(gamma, held), residual=residual.student())


def poly_loss(logits, labels, *, epsilon):
    """−log p_y + ε (1 − p_y)"""
    log_p_y = label_log_p(logits, labels)
    return -log_p_y + epsilon * (1 - log_p_y.exp())


@preset(
    "poly",
    group="label",
    formula="L = −log p_y + ε (1 − p_y);  a = 1 + ε p_y",
    trusts="every label, plus ε p_y",
    rest="the student",
    source="arXiv:2204.12511",
    printed=poly_loss,
    defaults="1 is this library's; the paper tunes it by task",
)
def poly(epsilon: float = 1.0) -> Target:
    """sft with more weight on what the student knows (Poly-1); Q leaves the simplex, by as much as ε p_y."""
    return Target(trust=trust.affine_probability(1.0, epsilon), residual=residual.student())


def symmetric_ce_loss(logits, labels, *, alpha, beta, log_zero):
    """α (−log p_y) + β (−Σ_v p_v log δ_v) with log 0 = A: the second part is −β A (1 − p_y)."""
    return alpha * nll(logits, labels) - beta * log_zero * (1 - label_log_p(logits, labels).exp())


@preset(
    "symmetric-ce",
    group="label",
    formula="L = α (−log p_y) + β |A| (1 − p_y), A = log_zero;  a = α + β |A| p_y",
    trusts="α, plus β |A| p_y",
    rest="the student",
    source="arXiv:1908.06112",
    printed=symmetric_ce_loss,
    defaults="the paper's for ten classes",
    traps="the weights do not sum to 1: at p_y near 1 a label weighs 4.1, so sft's learning rate does not carry over",
)
def symmetric_ce(alpha: float = 0.1, beta: float = 1.0, log_zero: float = -4.0) -> Target:
    """A little cross-entropy plus reverse cross-entropy, which has dft's gradient: robust to noise."""
    check_range("alpha", alpha, 0)
    check_range("beta", beta, 0)
    check_range("log_zero", log_zero, None, 0)
    return Target(trust=trust.affine_probability(alpha, -beta * log_zero), residual=residual.student())
