"""The fifteen objectives as their papers print them: plain PyTorch on full logits, gradient by autograd.

Nothing here imports qtarget or uses its weights and residuals, so agreement between the two means something.

logits [n, v], labels [n]  →  loss [n].  Every `.detach()` is a stop-gradient of the objective itself.
vocab_size: a padded head has more rows than real tokens. The student's p runs over the full width; whatever
comes from elsewhere (uniform, teacher, reference, guided) is a softmax over the real tokens and 0 beyond.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor


def label_log_p(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)


def kl(log_t: Tensor, log_p: Tensor) -> Tensor:
    """KL(sg t ‖ p) = Σ_v t_v (log t_v − log p_v) over the tokens that t covers."""
    log_t = log_t.detach()
    terms = log_t.exp() * (log_t - log_p[:, : log_t.shape[-1]])
    return terms.where(log_t > -math.inf, 0).sum(-1)  # 0 log 0 = 0


def kl_from(other_logits: Tensor, logits: Tensor, vocab_size: int | None, temperature: float = 1.0) -> Tensor:
    """KL(other ‖ student), both at one temperature."""
    log_t = (other_logits[:, :vocab_size] / temperature).log_softmax(-1)
    return kl(log_t, (logits / temperature).log_softmax(-1))


def sft(logits, labels):
    """−log p_y"""
    return -label_log_p(logits, labels)


def dft(logits, labels):
    """−sg(p_y) log p_y, arXiv:2508.05629"""
    log_p_y = label_log_p(logits, labels)
    return -log_p_y.exp().detach() * log_p_y


def beyond_log(logits, labels, *, alpha):
    """(1 − p_y^α) / α without any stop-gradient, arXiv:2510.00526; α → 0 is −log p_y."""
    if alpha == 0:
        return sft(logits, labels)
    p_y = logits.softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    return (1 - p_y**alpha) / alpha


def profit(logits, labels, *, direction="higher", tau=None, tau_low=None, tau_high=None):
    """−1[p_y ≥ τ] log p_y, arXiv:2601.09195; lower is p_y < τ, middle is τ_low ≤ p_y < τ_high."""
    log_p_y = label_log_p(logits, labels)
    p_y = log_p_y.exp().detach()
    if direction == "higher":
        kept = p_y >= tau
    elif direction == "lower":
        kept = p_y < tau
    else:
        kept = (p_y >= tau_low) & (p_y < tau_high)
    return -(kept * log_p_y)


def eaft(logits, labels, *, top_k, power, normalizer):
    """−sg((H_k / ln k)^power) log p_y with H_k the entropy of the renormalised top k, arXiv:2601.02151."""
    log_top = logits.topk(top_k).values.log_softmax(-1)
    entropy = -(log_top.exp() * log_top).sum(-1)
    divisor = {"log_k": math.log(top_k), "none": 1.0}.get(normalizer, normalizer)
    return -((entropy / divisor) ** power).detach() * label_log_p(logits, labels)


def iw_sft(logits, labels, *, weight):
    """−w log p_y with w given, arXiv:2507.12856"""
    return -weight * label_log_p(logits, labels)


def cft(logits, labels, *, critical):
    """−c log p_y with c ∈ {0, 1} given, arXiv:2510.10974"""
    return -critical.to(logits.dtype) * label_log_p(logits, labels)


def label_smoothing(logits, labels, *, smoothing, vocab_size=None):
    """(1 − ε) (−log p_y) + ε mean_v(−log p_v), the mean over the real vocabulary."""
    log_p = logits.log_softmax(-1)
    return (1 - smoothing) * sft(logits, labels) - smoothing * log_p[:, :vocab_size].mean(-1)


def sft_kl(logits, labels, *, kl_weight, reference_logits=None, vocab_size=None):
    """−log p_y + λ KL(π_ref ‖ π_θ)"""
    loss = sft(logits, labels)
    if kl_weight:
        loss = loss + kl_weight * kl_from(reference_logits, logits, vocab_size)
    return loss


def asft(logits, labels, *, kl_weight, reference_logits=None, vocab_size=None):
    """−sg(p_y) log p_y + λ KL(π_base ‖ π_θ), arXiv:2509.23753"""
    loss = dft(logits, labels)
    if kl_weight:
        loss = loss + kl_weight * kl_from(reference_logits, logits, vocab_size)
    return loss


def psft(logits, labels, *, clip, clip_high, old_logps):
    """−min(r, clip(r, 1 − ε, 1 + ε_high)), r = p_y / p_old(y), arXiv:2508.17784"""
    ratio = (label_log_p(logits, labels) - old_logps).exp()
    return -torch.minimum(ratio, ratio.clamp(1 - clip, 1 + clip_high))


def gem(logits, labels, *, beta, h):
    """Σ_v sg(q_v) w_v (log p_v − log p_y), q = softmax(z / β), arXiv:2408.16673

    w = 1 (linear) or sg σ(0.01 (z_v − z_y)) (logsigmoid, the slope of the authors' code). At β = 1 the linear form's
    CE(sg q, p) has q = p and a gradient of zero; such terms are left out of the reported value.
    """
    if beta == 1 and h == "linear":
        return -label_log_p(logits, labels)
    q = (logits / beta).softmax(-1).detach()
    log_ratio = logits.log_softmax(-1) - label_log_p(logits, labels)[:, None]
    w = 1.0 if h == "linear" else torch.sigmoid(0.01 * (logits - logits.gather(-1, labels[:, None]))).detach()
    return (q * w * log_ratio).sum(-1)


def kd(logits, labels, *, temperature, teacher_logits, vocab_size=None):
    """CE(t, p) at T = 1; T² KL(t^T ‖ p^T) elsewhere, arXiv:1503.02531"""
    if temperature == 1:
        t = teacher_logits[:, :vocab_size].softmax(-1).detach()
        return -(t * logits.log_softmax(-1)[:, :vocab_size]).sum(-1)
    return temperature**2 * kl_from(teacher_logits, logits, vocab_size, temperature)


def kd_hybrid(logits, labels, *, kd_weight, temperature, teacher_logits=None, vocab_size=None):
    """(1 − λ) (−log p_y) + λ T² KL(t^T ‖ p^T)"""
    loss = (1 - kd_weight) * sft(logits, labels)
    if kd_weight:
        loss = loss + kd_weight * temperature**2 * kl_from(teacher_logits, logits, vocab_size, temperature)
    return loss


def guided_log_r(logits, *, eta, teacher_temperature, teacher_logits=None, vocab_size=None):
    """log π̃, π̃ ∝ π_θ^(1−η) π_T^η with π_T at the teacher's temperature; η = 0 has no teacher in it."""
    if eta == 0:
        return logits.log_softmax(-1)
    log_student = logits.log_softmax(-1)[:, :vocab_size]
    log_teacher = (teacher_logits[:, :vocab_size] / teacher_temperature).log_softmax(-1)
    return ((1 - eta) * log_student + eta * log_teacher).log_softmax(-1)


def target_sft_cross_entropy(logits, labels, **guide):
    """CE(sg Q, p) with Q = p_y δ + (1 − p_y) π̃, arXiv:2606.11189: the loss as printed."""
    log_p = logits.log_softmax(-1)
    p_y = label_log_p(logits, labels).exp()
    r = guided_log_r(logits, **guide).exp()
    q = torch.zeros_like(log_p)
    q[:, : r.shape[-1]] = (1 - p_y)[:, None] * r
    q = q.scatter_add(-1, labels[:, None], p_y[:, None])
    return -(q.detach() * log_p).sum(-1)


def target_sft(logits, labels, **guide):
    """−sg(p_y) log p_y + sg(1 − p_y) KL(sg π̃ ‖ p): CE(sg Q, p) less a part that has no gradient."""
    loss = dft(logits, labels)
    # At η = 0 the second part is KL(sg p ‖ p): no value and no gradient, but autograd leaves rounding.
    if guide["eta"]:
        p_y = label_log_p(logits, labels).exp().detach()
        loss = loss + (1 - p_y) * kl(guided_log_r(logits, **guide), logits.log_softmax(-1))
    return loss


@dataclass(frozen=True)
class Case:
    """A preset with hyperparameters, and the published loss with the same ones written out."""

    id: str
    preset: str
    hyperparameters: dict[str, Any]
    published: Callable[..., Tensor]
    needs: tuple[str, ...] = field(default=())

    def loss(self, logits: Tensor, labels: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Per-token loss [n]; of `inputs` only what this objective takes is used."""
        return self.published(logits, labels, **{name: inputs.get(name) for name in self.needs})


REFERENCE = ("reference_logits", "vocab_size")
TEACHER = ("teacher_logits", "vocab_size")

CASES = [
    Case("sft", "sft", {}, sft),
    Case("dft", "dft", {}, dft),
    Case("beyond-log", "beyond-log", {}, partial(beyond_log, alpha=1.0)),
    *[
        Case(f"beyond-log:alpha={alpha}", "beyond-log", {"alpha": alpha}, partial(beyond_log, alpha=alpha))
        for alpha in (0.0, 0.5, 1.0, 8.0, -0.5)
    ],
    Case("profit", "profit", {}, partial(profit, tau=0.1)),
    *[
        Case(f"profit:{','.join(f'{k}={v}' for k, v in hp.items())}", "profit", hp, partial(profit, **hp))
        for hp in (
            {"tau": 0.01},
            {"tau": 0.02, "direction": "higher"},
            {"tau": 0.1, "direction": "lower"},
            {"tau_low": 0.01, "tau_high": 0.5, "direction": "middle"},
        )
    ],
    Case("eaft", "eaft", {}, partial(eaft, top_k=20, power=1.0, normalizer="log_k")),
    *[
        Case(
            f"eaft:{','.join(f'{k}={v}' for k, v in hp.items())}",
            "eaft",
            hp,
            partial(eaft, **({"top_k": 20, "power": 1.0, "normalizer": "log_k"} | hp)),
        )
        for hp in (
            {"top_k": 5},
            {"top_k": 2},
            {"power": 2.0},
            {"power": 0.5},
            {"normalizer": "log_k", "top_k": 8, "power": 3.0},
            {"normalizer": 3.0},
            {"normalizer": 3.0, "power": 2.0},
            {"normalizer": "none"},
            {"normalizer": "none", "top_k": 10, "power": 2.0},
        )
    ],
    Case("iw-sft", "iw-sft", {}, iw_sft, ("weight",)),
    Case("cft", "cft", {}, cft, ("critical",)),
    Case("label-smoothing", "label-smoothing", {}, partial(label_smoothing, smoothing=0.1), ("vocab_size",)),
    *[
        Case(
            f"label-smoothing:smoothing={eps}",
            "label-smoothing",
            {"smoothing": eps},
            partial(label_smoothing, smoothing=eps),
            ("vocab_size",),
        )
        for eps in (0.0, 0.3, 0.9)
    ],
    Case("sft-kl", "sft-kl", {}, partial(sft_kl, kl_weight=0.1), REFERENCE),
    Case("sft-kl:kl_weight=0.5", "sft-kl", {"kl_weight": 0.5}, partial(sft_kl, kl_weight=0.5), REFERENCE),
    Case("sft-kl:kl_weight=3.0", "sft-kl", {"kl_weight": 3.0}, partial(sft_kl, kl_weight=3.0), REFERENCE),
    Case("sft-kl:kl_weight=0.0", "sft-kl", {"kl_weight": 0.0}, partial(sft_kl, kl_weight=0.0)),
    Case("asft", "asft", {}, partial(asft, kl_weight=0.05), REFERENCE),
    Case("asft:kl_weight=0.1", "asft", {"kl_weight": 0.1}, partial(asft, kl_weight=0.1), REFERENCE),
    Case("asft:kl_weight=0.8", "asft", {"kl_weight": 0.8}, partial(asft, kl_weight=0.8), REFERENCE),
    Case("asft:kl_weight=0.0", "asft", {"kl_weight": 0.0}, partial(asft, kl_weight=0.0)),
    Case("psft", "psft", {}, partial(psft, clip=0.2, clip_high=0.2), ("old_logps",)),
    Case("psft:clip=0.5", "psft", {"clip": 0.5}, partial(psft, clip=0.5, clip_high=0.5), ("old_logps",)),
    Case(
        "psft:clip=0.2,clip_high=0.28",
        "psft",
        {"clip": 0.2, "clip_high": 0.28},
        partial(psft, clip=0.2, clip_high=0.28),
        ("old_logps",),
    ),
    Case("gem", "gem", {}, partial(gem, beta=0.7, h="linear")),
    *[
        Case(f"gem:beta={beta},h={h}", "gem", {"beta": beta, "h": h}, partial(gem, beta=beta, h=h))
        for beta, h in (
            (0.7, "linear"),
            (0.3, "linear"),
            (1.0, "linear"),
            (0.7, "logsigmoid"),
            (0.3, "logsigmoid"),
            (1.0, "logsigmoid"),
        )
    ],
    Case("kd", "kd", {}, partial(kd, temperature=1.0), TEACHER),
    *[
        Case(f"kd:temperature={t}", "kd", {"temperature": t}, partial(kd, temperature=t), TEACHER)
        for t in (1.0, 2.0, 0.5)
    ],
    Case("kd-hybrid", "kd-hybrid", {}, partial(kd_hybrid, kd_weight=0.5, temperature=1.0), TEACHER),
    *[
        Case(
            f"kd-hybrid:kd_weight={weight},temperature={t}",
            "kd-hybrid",
            {"kd_weight": weight, "temperature": t},
            partial(kd_hybrid, kd_weight=weight, temperature=t),
            TEACHER if weight else (),
        )
        for weight, t in ((0.2, 1.0), (0.5, 2.0), (0.9, 2.0), (1.0, 1.0), (0.0, 1.0))
    ],
    Case("target-sft", "target-sft", {}, partial(target_sft, eta=0.5, teacher_temperature=1.0), TEACHER),
    *[
        Case(
            f"target-sft:eta={eta},teacher_temperature={t}",
            "target-sft",
            {"eta": eta, "teacher_temperature": t},
            partial(target_sft, eta=eta, teacher_temperature=t),
            TEACHER if eta else (),
        )
        for eta in (0.0, 0.3, 0.5, 1.0)
        for t in (1.0, 2.0)
    ],
]
