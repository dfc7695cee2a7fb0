"""Objectives that weight the label by how sure the student is at that token."""

from __future__ import annotations

from qtarget.targets import residual, trust
from qtarget.targets.presets.entry import preset
from qtarget.targets.presets.printed import entropy, label_log_p, nll
from qtarget.targets.target import Target


def idft_loss(logits, labels, *, strength, beta, low, high):
    """−sg(p_y^e) log p_y, e = 1 + λ (clip(exp(−(log p_y + H) / β), low, high) − 1)"""
    log_p_y = label_log_p(logits, labels)
    surprise = (-(log_p_y + entropy(logits)) / beta).exp().clamp(low, high)
    return -((1 + strength * (surprise - 1)) * log_p_y).exp().detach() * log_p_y


@preset(
    "idft",
    group="label",
    formula="L = −sg(a) log p_y;  a = p_y^e, e = 1 + λ (clip(exp((−log p_y − H)/beta), low, high) − 1)",
    trusts="p_y, reduced where the label surprises more than H",
    rest="the student",
    source="arXiv:2602.12222",
    printed=idft_loss,
    defaults="the authors' code; there strength (λ) is 0 for 20 % of the run, which is dft, and rises over the next 10 %",
    traps="their code computes p in bfloat16 and keeps it above 1e-10 inside the logarithm; here it is exact",
    schedule={"strength": {"schedule": "linear", "from": 0.0, "to": 1.0, "start": 0.2, "steps": 0.1}},
)
def idft(strength: float = 1.0, beta: float = 1.0, low: float = 0.1, high: float = 2.0) -> Target:
    """dft that tells a surprising label where the student is sure (probably wrong) from one where many are right."""
    return Target(trust=trust.surprise_power(strength, beta, low, high), residual=residual.student())


def deft_loss(logits, labels):
    """−sg(p_y^C) log p_y, C = Σ_v p_v²"""
    log_p_y = label_log_p(logits, labels)
    concentration = logits.softmax(-1).square().sum(-1)
    return -(concentration * log_p_y).exp().detach() * log_p_y


@preset(
    "deft",
    group="label",
    formula="L = −sg(p_y^C) log p_y;  a = p_y^C, C = Σ_v p_v²",
    trusts="every label where the student is unsure, p_y where it is sure",
    rest="the student",
    source="arXiv:2602.11424",
    printed=deft_loss,
    traps="their code multiplies by C / (C + 1e-6), which is 1 for every C that occurs; it is left out",
)
def deft() -> Target:
    """sft where the student has no opinion, dft where it has one; nothing to tune."""
    return Target(trust=trust.concentration_power(), residual=residual.student())


def sed_sft_loss(logits, labels, *, weight, top_k, tau):
    """−log p_y + λ m (p_y − ½)², m = 1[top-k mass < τ]"""
    p = logits.softmax(-1)
    p_y = p.gather(-1, labels[:, None]).squeeze(-1)
    undecided = p.detach().topk(top_k).values.sum(-1) < tau
    return nll(logits, labels) + weight * undecided * (p_y - 0.5) ** 2


@preset(
    "sed-sft",
    group="label",
    formula="L = −log p_y + λ m (p_y − ½)², m = 1[top-k mass < tau];  a = 1 + λ m p_y (1 − 2 p_y)",
    trusts="every label; where the student is undecided, more below ½ and less above",
    rest="the student",
    source="arXiv:2602.07464",
    printed=sed_sft_loss,
    defaults="weight (λ) and top_k of the authors' class (train.py has weight 1); tau is this library's: theirs is a "
    "quantile of the validation set's masses, 0.3 in the class and 0.7 in the script",
    traps="the paper describes the entropy; its code uses (p_y − ½)², as here",
)
def sed_sft(weight: float = 0.2, top_k: int = 2, tau: float = 0.9) -> Target:
    """sft that does not push a label to certainty where the student has several candidates."""
    return Target(trust=trust.toward_half(weight, top_k, tau), residual=residual.student())
