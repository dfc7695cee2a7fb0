"""Objectives that weight a label by how likely it is, and leave the rest to the student."""

from __future__ import annotations

import math

from qtarget.errors import check_range
from qtarget.targets import residual, trust
from qtarget.targets.presets import printed
from qtarget.targets.presets.entry import preset
from qtarget.targets.presets.printed import label_log_p, nll, weighted_nll
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
    traps="the loss is about ten times smaller than sft's, so sft's learning rate does not carry over",
    aliases=("p-loss",),
)
def dft() -> Target:
    """Learn least from tokens the student finds unlikely: ignores noise, but also anything new."""
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
    defaults="alpha 1 is this library's; the authors' example for mathematics has 10",
    traps="where the paper writes −p^k, with alpha times this gradient, its code trains (1 − p^k)/k, as here",
)
def beyond_log(alpha: float = 1.0) -> Target:
    """A family: alpha 0 is sft, 1 has dft's gradient, more trusts only the likely, less than 0 leaves the simplex."""
    return Target(trust=trust.probability_power(alpha), residual=residual.student())


def talr_loss(logits, labels, *, tau):
    """−sg(p_y^(1/τ)) log p_y"""
    return weighted_nll(logits, labels, lambda p_y: p_y ** (1 / tau))


@preset(
    "talr",
    group="label",
    formula="L = −sg(p_y^(1/tau)) log p_y;  a = p_y^(1/tau)",
    trusts="p_y^(1/tau)",
    rest="the student",
    source="arXiv:2509.20758",
    printed=talr_loss,
    defaults="tau 1, which is dft, is this library's: the paper takes the median over the batch of a row's mean −log p_y",
    traps="a batch's median depends on how the batch is split; set tau to the median over your rows. Ports keep a ≥ 0.01",
)
def talr(tau: float = 1.0) -> Target:
    """Learn least from hard tokens, and less the smaller tau is; beyond-log at alpha 1/tau has its gradient."""
    check_range("tau", tau, 0, open_low=True)
    return Target(trust=trust.probability_power(1 / tau, held=True), residual=residual.student())


def mixce_loss(logits, labels, *, mixing_ratio):
    """η (−log p_y) + (1 − η) (−sg(p_y) log p_y)"""
    return weighted_nll(logits, labels, lambda p_y: mixing_ratio + (1 - mixing_ratio) * p_y)


@preset(
    "mixce",
    group="label",
    formula="L = −sg(a) log p_y;  a = η + (1 − η) p_y",
    trusts="between every label and p_y",
    rest="the student",
    source="arXiv:2305.16958",
    printed=mixce_loss,
    defaults="half and half is this library's; the paper chooses per dataset",
)
def mixce(mixing_ratio: float = 0.5) -> Target:
    """A mixture of sft and dft: rare labels keep some weight."""
    check_range("mixing_ratio", mixing_ratio, 0, 1)
    return Target(
        trust=trust.affine_probability(mixing_ratio, 1 - mixing_ratio, held=True), residual=residual.student()
    )


def gold_floor_loss(logits, labels, *, floor):
    """−sg(max(p_y, floor)) log p_y"""
    return weighted_nll(logits, labels, lambda p_y: p_y.clamp(min=floor))


@preset(
    "gold-floor",
    group="label",
    formula="L = −sg(a) log p_y;  a = max(p_y, floor)",
    trusts="p_y, but never less than the floor",
    rest="the student",
    source="arXiv:2009.07839",
    printed=gold_floor_loss,
    defaults="the lower of the usual 0.1 to 0.2",
)
def gold_floor(floor: float = 0.1) -> Target:
    """dft with a minimum weight for rare labels, published five years earlier; floor 1 is sft."""
    return Target(trust=trust.clipped_probability(low=floor), residual=residual.student())


def tailr_loss(logits, labels, *, gamma):
    """−sg(p_y / (γ + (1 − γ) p_y)) log p_y"""
    return weighted_nll(logits, labels, lambda p_y: p_y / (gamma + (1 - gamma) * p_y))


@preset(
    "tailr",
    group="label",
    formula="L = −sg(a) log p_y;  a = p_y / (gamma + (1 − gamma) p_y)",
    trusts="nearly every label, except those far below gamma",
    rest="the student",
    source="arXiv:2302.13344",
    printed=tailr_loss,
    defaults="this library's; the paper's are small and differ by task",
)
def tailr(gamma: float = 0.1) -> Target:
    """Between sft (gamma 0) and dft (gamma 1), by total variation: only the unlikely labels lose weight."""
    return Target(trust=trust.mixture_ratio(gamma), residual=residual.student())


def trsft_loss(logits, labels, *, high):
    """−sg(min(1, p_y / α)) log p_y"""
    return weighted_nll(logits, labels, lambda p_y: (p_y / high).clamp(max=1))


@preset(
    "trsft",
    group="label",
    formula="L = −sg(a) log p_y;  a = min(1, p_y / high)",
    trusts="every label from high upwards, less of those below",
    rest="the student",
    source="arXiv:2512.17636",
    printed=trsft_loss,
    defaults="the authors' code (TRAPO)",
    traps="a second mode of their code subtracts 0.5 from the weight, which unlearns rare labels; it is left out here",
)
def trsft(high: float = 0.1) -> Target:
    """sft inside a trust region, dft outside it: only labels below ``high`` lose weight."""
    return Target(trust=trust.clipped_probability(high=high), residual=residual.student())


def luffy_loss(logits, labels, *, gamma):
    """−p_y / (p_y + γ)"""
    p_y = label_log_p(logits, labels).exp()
    return -p_y / (p_y + gamma)


@preset(
    "luffy",
    group="label",
    formula="L = −p_y / (p_y + gamma);  a = gamma p_y / (p_y + gamma)²",
    trusts="at most ¼, at p_y = gamma",
    rest="the student",
    source="arXiv:2504.14945",
    printed=luffy_loss,
    defaults="the authors' code, which also lists 0.3 and 0.5",
    traps="there it is the demonstration part of a reinforcement-learning loss; the rest of that loss is left out",
)
def luffy(gamma: float = 0.1) -> Target:
    """Learn most from labels near gamma: neither the known nor the hopeless."""
    return Target(trust=trust.shaped_probability(gamma), residual=residual.student())


def chord_phi_loss(logits, labels):
    """−sg(p_y (1 − p_y)) log p_y"""
    return weighted_nll(logits, labels, lambda p_y: p_y * (1 - p_y))


@preset(
    "chord-phi",
    group="label",
    formula="L = −sg(p_y (1 − p_y)) log p_y;  a = p_y (1 − p_y)",
    trusts="at most ¼, at p_y = ½",
    rest="the student",
    source="arXiv:2508.11408",
    printed=chord_phi_loss,
    traps="ms-swift divides by the tokens of each micro-batch and adds GRPO with a moving weight; neither is done here",
)
def chord_phi() -> Target:
    """Learn most where the label is a coin toss for the student: neither the known nor the hopeless."""
    return Target(trust=trust.bernoulli_variance(), residual=residual.student())


def infosft_loss(logits, labels, *, confidence):
    """−sg(p_y · relu(1 − logit p_y / logit P)) log p_y"""
    wanted = math.log(confidence / (1 - confidence))
    return weighted_nll(logits, labels, lambda p_y: p_y * (1 - p_y.logit() / wanted).relu())


@preset(
    "infosft",
    group="label",
    formula="L = −sg(a) log p_y;  a = p_y max(0, 1 − logit(p_y) / logit(confidence))",
    trusts="p_y, falling to 0 at the confidence",
    rest="the student",
    source="arXiv:2605.14967",
    printed=infosft_loss,
    defaults="the authors' code",
    traps="a confidence of ½ or less would divide by 0 or flip the sign; it is refused",
)
def infosft(confidence: float = 0.93) -> Target:
    """dft that stops where the student is sure: it trains the tokens between noise and the known."""
    return Target(trust=trust.confidence_gap(confidence), residual=residual.student())
