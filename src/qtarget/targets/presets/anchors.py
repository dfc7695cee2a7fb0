"""Objectives that hold the student to more than the label: a reference, its old self."""

from __future__ import annotations

import math

import torch

from qtarget.errors import check_range, unknown
from qtarget.targets import residual, trust
from qtarget.targets.divergence import ReverseKL, as_divergence
from qtarget.targets.presets import printed
from qtarget.targets.presets.entry import preset
from qtarget.targets.presets.printed import covered_log_p, divergence_from, label_log_p, nll
from qtarget.targets.target import Target


def label_smoothing_loss(logits, labels, *, smoothing, vocab_size=None):
    """(1 − ε)(−log p_y) + ε mean_v(−log p_v), the mean over the real vocabulary."""
    log_p = logits.log_softmax(-1)
    return (1 - smoothing) * nll(logits, labels) - smoothing * log_p[:, :vocab_size].mean(-1)


@preset(
    "label-smoothing",
    group="anchor",
    formula="L = (1 − ε)(−log p_y) + ε CE(U, p);  a = 1 − ε, b = ε, R = U",
    trusts="1 − ε",
    rest="every token equally",
    source="arXiv:1512.00567",
    printed=label_smoothing_loss,
    defaults="the paper's",
    traps="Transformers also averages over a head's padded rows; here they are left out",
)
def label_smoothing(smoothing: float = 0.1) -> Target:
    """Spread a share ε evenly over all tokens."""
    check_range("smoothing", smoothing, 0, 1)
    return Target(trust=trust.constant(1 - smoothing), residual=residual.uniform(), value="ce")


def _beside_reference(label_loss, logits, kl_weight, direction, reference, real):
    if kl_weight == 0:
        return label_loss
    return label_loss + kl_weight * divergence_from(reference, logits, f"{direction}_kl", real)


def _anchored(rule: trust.Rule, kl_weight: float, direction: str) -> Target:
    """The rule's weight on the label beside λ KL(ref ‖ p), or λ KL(p ‖ ref)."""
    check_range("kl_weight", kl_weight, 0)
    if direction not in ("forward", "reverse"):
        raise unknown("direction", direction, ("forward", "reverse"))
    return Target(
        trust=trust.anchored(rule, kl_weight), residual=[(1, residual.reference(), as_divergence(f"{direction}_kl"))]
    )


def sft_kl_loss(logits, labels, *, kl_weight, direction, reference_logits=None, vocab_size=None):
    """−log p_y + λ KL(π_ref ‖ π_θ), or λ KL(π_θ ‖ π_ref) in reverse"""
    return _beside_reference(nll(logits, labels), logits, kl_weight, direction, reference_logits, vocab_size)


@preset(
    "sft-kl",
    group="anchor",
    formula="L = −log p_y + λ KL(ref ‖ p), in reverse λ KL(p ‖ ref);  a = 1, b = λ, R = ref",
    trusts="every label fully",
    rest="the reference, λ in addition",
    source="arXiv:2509.23753 (baseline)",
    printed=sft_kl_loss,
    defaults="ASFT's code; EAFT's baseline has 0.5",
    traps="kl_weight does not carry over from estimates on the label alone (SkyRL, NeMo-RL): here it is the full KL",
)
def sft_kl(kl_weight: float = 0.1, direction: str = "forward") -> Target:
    """Plain SFT with a pull back to the reference, over the full vocabulary; in reverse KL(student ‖ reference)."""
    return _anchored(trust.constant(1.0), kl_weight, direction)


def asft_loss(logits, labels, *, kl_weight, direction, reference_logits=None, vocab_size=None):
    """−sg(p_y) log p_y + λ KL(π_base ‖ π_θ), or λ KL(π_θ ‖ π_base) in reverse"""
    return _beside_reference(printed.dft(logits, labels), logits, kl_weight, direction, reference_logits, vocab_size)


@preset(
    "asft",
    group="anchor",
    formula="L = −sg(p_y) log p_y + λ KL(ref ‖ p), in reverse λ KL(p ‖ ref);  a = p_y, b = λ, R = ref",
    trusts="p_y",
    rest="the reference, λ in addition",
    source="arXiv:2509.23753",
    printed=asft_loss,
    defaults="the README's command; the authors' code and LLaMA-Factory have 0.1",
    traps="both codes compute KL(ref ‖ p), while the paper describes a reverse anchor: use direction: reverse for that",
)
def asft(kl_weight: float = 0.05, direction: str = "forward") -> Target:
    """DFT with a pull back to the initial model."""
    return _anchored(trust.probability(), kl_weight, direction)


def psft_loss(logits, labels, *, clip, clip_high, old_logps):
    """−min(r, clip(r, 1 − ε, 1 + ε_high)), r = p_y / p_old(y)"""
    ratio = (label_log_p(logits, labels) - old_logps).exp()
    return -torch.minimum(ratio, ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high)))


@preset(
    "psft",
    group="anchor",
    formula="L = −min(r, clip(r, 1 − clip, 1 + clip_high));  a = r·1[r < 1 + clip_high], r = p_y / p_old",
    trusts="p_y / p_old, until clipped",
    rest="the student",
    source="arXiv:2508.17784",
    printed=psft_loss,
    defaults="the authors' yaml, where the upper clip equals the lower; their only run script has clip_high 0.28",
    traps="the lower clip changes only the reported loss; it never stops a gradient",
)
def psft(clip: float = 0.2, clip_high: float | None = None) -> Target:
    """PPO's clip on demonstrations (column old_logps); with r = 1 it is sft."""
    return Target(trust=trust.clipped_ratio(clip, clip_high), residual=residual.student())


def gem_loss(logits, labels, *, beta, h):
    """Σ_v sg(q_v) w_v (log p_v − log p_y), q = softmax(z / β)

    w = 1 (linear) or sg σ(0.01 (z_v − z_y)) (logsigmoid, the slope of the authors' code). At β = 1 the linear form's
    CE(sg q, p) has q = p and a gradient of zero; such terms are left out of the reported value.
    """
    if beta == 1 and h == "linear":
        return nll(logits, labels)
    q = (logits / beta).softmax(-1).detach()
    log_ratio = logits.log_softmax(-1) - label_log_p(logits, labels)[:, None]
    w = 1.0 if h == "linear" else torch.sigmoid(0.01 * (logits - logits.gather(-1, labels[:, None]))).detach()
    return (q * w * log_ratio).sum(-1)


@preset(
    "gem",
    group="anchor",
    formula="L = CE(δ, p) − CE(q, p);  a = 1, b = −1, R = q = softmax(z/beta)",
    trusts="every label fully",
    rest="away from the sharpened student",
    source="arXiv:2408.16673",
    printed=gem_loss,
    defaults="the authors' train.py; their scripts pass h: logsigmoid, which halves the gradient",
)
def gem(beta: float = 0.7, h: str = "linear") -> Target:
    """Take mass from what the sharpened student favours and keep the rest diverse; signed, so Q leaves the simplex."""
    rule = trust.anchored(trust.constant(1.0), -1.0)
    scale = trust.offset_mass() if h == "logsigmoid" else None
    return Target(trust=rule, residual=residual.sharpened(beta, h), scale=scale, value="ce")


def gift_loss(logits, labels, *, beta, toward, reference_logits=None, teacher_logits=None, vocab_size=None):
    """CE(Q, p), Q = softmax(log prior + β 1[y])"""
    prior = covered_log_p(reference_logits if toward == "reference" else teacher_logits, vocab_size)
    raised = torch.zeros_like(prior).scatter(-1, labels[:, None], beta)
    Q = (prior + raised).softmax(-1)
    return -(Q * logits.log_softmax(-1)[:, : Q.shape[-1]]).sum(-1)


@preset(
    "gift",
    group="anchor",
    formula="L = CE(Q, p), Q = softmax(log ref + β 1[y]);  a = G/(1 + G), G = ref_y (e^β − 1), b = 1 − a, R = ref",
    trusts="the label where the reference gives it more than e^(−β)",
    rest="the reference",
    source="arXiv:2601.09233",
    printed=gift_loss,
    defaults="the authors' code: at 20 it is sft, except for labels to which the reference gives less than about 1e-8",
    traps="their code adds 1e-10 to ref before the logarithm: at ref_y = e^(−30) that gives the label 0.046, not 5e-5",
)
def gift(beta: float = 20.0, toward: str = "reference") -> Target:
    """Raise the label's logit in the reference by beta and learn the result (toward: teacher uses the teacher)."""
    if toward not in ("reference", "teacher"):
        raise unknown("toward", toward, ("reference", "teacher"))
    prior = residual.reference() if toward == "reference" else residual.teacher()
    return Target(trust=trust.gibbs(beta, toward), residual=prior, value="ce")


def sft_entropy_loss(logits, labels, *, entropy_weight, vocab_size=None):
    """−log p_y + λ (ln V − H): −log p_y − λ H, moved to 0 at the uniform distribution."""
    H = printed.entropy(logits[:, :vocab_size])
    return nll(logits, labels) + entropy_weight * (math.log(logits[:, :vocab_size].shape[-1]) - H)


@preset(
    "sft-entropy",
    group="anchor",
    formula="L = −log p_y − λ H + λ ln V;  a = 1, b = λ, R = U by reverse KL",
    trusts="every label fully",
    rest="away from certainty: toward every token equally, by reverse KL",
    source="arXiv:1701.06548",
    printed=sft_entropy_loss,
    defaults="0.1 is this library's; the paper tunes it by task",
    traps="the reported loss is λ ln V above the paper's, so that its second part is a divergence with minimum 0",
)
def sft_entropy(entropy_weight: float = 0.1) -> Target:
    """sft with a bonus for the student's entropy over the real vocabulary: less certain, more diverse."""
    check_range("entropy_weight", entropy_weight, 0)
    rule = trust.anchored(trust.constant(1.0), entropy_weight)
    return Target(trust=rule, residual=[(1, residual.uniform(), ReverseKL())])
