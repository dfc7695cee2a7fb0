"""Objectives that use a teacher."""

from __future__ import annotations

from qtarget.errors import ConfigError, check_range
from qtarget.targets import residual, trust
from qtarget.targets.divergence import FORWARD_KL, as_divergence
from qtarget.targets.presets import printed
from qtarget.targets.presets.entry import preset
from qtarget.targets.presets.printed import divergence_from, kl_from, label_log_p, nll
from qtarget.targets.target import Target


def _distilled(kd_weight: float, temperature: float, value: str, divergence: object) -> Target:
    """The label at 1 − kd_weight beside a divergence from the teacher: T²·KL(teacher ‖ student) at temperature T."""
    check_range("temperature", temperature, 0, open_low=True)
    rule, chosen = trust.constant(1 - kd_weight), as_divergence(divergence)
    if temperature == 1:
        return Target(trust=rule, residual=[(1, residual.teacher(), chosen)], value=value)
    if not chosen.is_forward_kl:
        raise ConfigError(
            f"temperature is {temperature:g} with divergence {chosen.label}; it works only with forward_kl, so leave "
            "it at 1"
        )
    pair = [(temperature, residual.teacher(temperature)), (-temperature, residual.tempered(temperature))]
    return Target(trust=rule, residual=pair, value="tempered_kl")


def kd_loss(logits, labels, *, temperature, divergence=FORWARD_KL, teacher_logits, vocab_size=None):
    """CE(t, p) at T = 1; T² KL(t^T ‖ p^T) elsewhere; D(t, p) for another divergence."""
    if not as_divergence(divergence).is_forward_kl:
        return divergence_from(teacher_logits, logits, divergence, vocab_size)
    if temperature == 1:
        t = teacher_logits[:, :vocab_size].softmax(-1).detach()
        return -(t * logits.log_softmax(-1)[:, :vocab_size]).sum(-1)
    return temperature**2 * kl_from(teacher_logits, logits, vocab_size, temperature)


@preset(
    "kd",
    group="distillation",
    formula="L = CE(t, p), or D(t, p);  a = 0, b = 1, R = t.  At T ≠ 1: T² KL(t^T ‖ p^T)",
    trusts="0",
    rest="the teacher",
    source="arXiv:1503.02531",
    printed=kd_loss,
    defaults="temperature 1 and forward KL; other libraries differ, so set your own",
    traps="libraries that cut a teacher to its top k drop or renormalise the rest; here the tail keeps its mass",
)
def kd(temperature: float = 1.0, divergence: object = "forward_kl") -> Target:
    """Forget the labels and match the teacher on the demonstrations' contexts."""
    return _distilled(1.0, temperature, "ce", divergence)


def kd_hybrid_loss(
    logits, labels, *, kd_weight, temperature, divergence=FORWARD_KL, teacher_logits=None, vocab_size=None
):
    """(1 − λ)(−log p_y) + λ T² KL(t^T ‖ p^T), or λ D(t, p)"""
    loss = (1 - kd_weight) * nll(logits, labels)
    if kd_weight == 0:
        return loss
    if temperature == 1:
        return loss + kd_weight * divergence_from(teacher_logits, logits, divergence, vocab_size)
    return loss + kd_weight * temperature**2 * kl_from(teacher_logits, logits, vocab_size, temperature)


@preset(
    "kd-hybrid",
    group="distillation",
    formula="L = (1 − λ)(−log p_y) + λ KL(t ‖ p);  a = 1 − λ, b = λ, R = t",
    trusts="1 − λ",
    rest="the teacher",
    source="arXiv:1503.02531",
    printed=kd_hybrid_loss,
    defaults="half and half, as in DistillKit",
)
def kd_hybrid(kd_weight: float = 0.5, temperature: float = 1.0, divergence: object = "forward_kl") -> Target:
    """A fixed mixture of label and teacher."""
    check_range("kd_weight", kd_weight, 0, 1)
    return _distilled(kd_weight, temperature, "kl", divergence)


def target_sft_loss(
    logits, labels, *, eta, teacher_temperature, divergence=FORWARD_KL, teacher_logits=None, vocab_size=None
):
    """−sg(p_y) log p_y + sg(1 − p_y) KL(sg π̃ ‖ p): CE(sg Q, p) less a part that has no gradient; or D in place of KL.

    Q = p_y δ + (1 − p_y) π̃, π̃ ∝ π_θ^(1−η) π_T^η with π_T at the teacher's temperature.
    """
    loss = printed.dft(logits, labels)
    # At η = 0 the second part is KL(sg p ‖ p): no value and no gradient, but autograd leaves rounding.
    if eta == 0:
        return loss
    log_p = logits.log_softmax(-1)
    log_teacher = (teacher_logits[:, :vocab_size] / teacher_temperature).log_softmax(-1)
    # At η = 1 the teacher alone decides: 0 · (−inf) is no part of it.
    log_student = (1 - eta) * log_p[:, : log_teacher.shape[-1]] if eta != 1 else 0
    p_y = label_log_p(logits, labels).exp().detach()
    return loss + (1 - p_y) * divergence_from(log_student + eta * log_teacher, logits, divergence)


@preset(
    "target-sft",
    group="distillation",
    formula="Q = p_y δ + (1 − p_y) R,  R = softmax((1 − η) z + η z_T / T);  a = p_y, b = 1 − p_y",
    trusts="p_y",
    rest="student^(1 − η) · teacher^η",
    source="arXiv:2606.11189",
    printed=target_sft_loss,
    defaults="this library's: the part of the paper with its values could not be read",
)
def target_sft(eta: float = 0.5, teacher_temperature: float = 1.0, divergence: object = "forward_kl") -> Target:
    """Trust the label as far as the student does, and let the teacher steer the rest; η = 0 is dft."""
    check_range("teacher_temperature", teacher_temperature, 0, open_low=True)
    guide = (1, residual.guided(eta, teacher_temperature), as_divergence(divergence))
    return Target(trust=trust.probability(), residual=[guide])


def todi_loss(logits, labels, *, slope, teacher_logits, vocab_size=None):
    """Σ_v w t log(t/p) + (1 − w) p log(p/t), w = sg σ(slope · log(t/p))"""
    return divergence_from(teacher_logits, logits, {"todi": {"slope": slope}}, vocab_size)


@preset(
    "todi",
    group="distillation",
    formula="L = Σ w t log(t/p) + (1 − w) p log(p/t), w = sg σ(slope log(t/p));  a = 0, b = 1, R = t by ToDi",
    trusts="0",
    rest="the teacher, pulled up by forward KL and down by reverse KL",
    source="arXiv:2505.16297",
    printed=todi_loss,
    defaults="the authors' code",
)
def todi(slope: float = 1.0) -> Target:
    """kd with a divergence chosen per token: forward KL where the student is too low, reverse KL where it is too high."""
    return _distilled(1.0, 1.0, "kl", {"todi": {"slope": slope}})


def taid_loss(logits, labels, *, t, teacher_logits=None, vocab_size=None):
    """KL(sg softmax((1 − t) z + t z_T) ‖ p)"""
    if t == 0:  # the student itself: no value and no gradient
        return 0 * nll(logits, labels)
    teacher = teacher_logits[:, :vocab_size]
    return kl_from((1 - t) * logits[:, : teacher.shape[-1]] + t * teacher, logits, vocab_size)


@preset(
    "taid",
    group="distillation",
    formula="L = KL(sg R ‖ p), R = softmax((1 − t) z + t z_T);  a = 0, b = 1",
    trusts="0",
    rest="student^(1 − t) · teacher^t",
    source="arXiv:2501.16937",
    printed=taid_loss,
    defaults="the authors' initial t; in their runs it rises to 1",
    traps="their t also advances as the loss falls, which depends on the run's state; this is their disable_adaptive",
    schedule={"t": {"schedule": "linear", "from": 0.4, "to": 1.0}},
)
def taid(t: float = 0.4) -> Target:
    """A teacher that starts close to the student and moves away from it as t rises to 1, where it is kd."""
    return Target(trust=trust.constant(0.0), residual=residual.guided(eta=t))
