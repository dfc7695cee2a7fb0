"""What the printed losses share, in plain PyTorch on full logits.

No rule, residual or engine of qtarget is used, so that agreement with one means something.

logits [n, V] of any float dtype, labels [n] → [n]. ``detach`` is a stop-gradient of the objective itself.
``vocab_size``: a padded head has more rows than real tokens. The student's p runs over the full width; what comes from
elsewhere (uniform, teacher, reference, guided) is a softmax over the real tokens and 0 beyond.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from qtarget.targets.divergence import Divergence, as_divergence


def label_log_p(logits: Tensor, labels: Tensor) -> Tensor:
    """log p_y"""
    return logits.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    """−log p_y"""
    return -label_log_p(logits, labels)


def covered_log_p(logits: Tensor, vocab_size: int | None) -> Tensor:
    """log p of another model over the real tokens, held constant."""
    return logits[:, :vocab_size].log_softmax(-1).detach()


def entropy(logits: Tensor) -> Tensor:
    """H = −Σ_v p_v log p_v"""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def weighted_nll(logits: Tensor, labels: Tensor, weight: Callable[[Tensor], Tensor]) -> Tensor:
    """−sg(a) log p_y with the weight a = weight(p_y)"""
    log_p_y = label_log_p(logits, labels)
    return weight(log_p_y.exp()).detach() * -log_p_y


def dft(logits: Tensor, labels: Tensor) -> Tensor:
    """−sg(p_y) log p_y"""
    return weighted_nll(logits, labels, lambda p_y: p_y)


def kl(log_t: Tensor, log_p: Tensor) -> Tensor:
    """KL(sg t ‖ p) = Σ_v t_v (log t_v − log p_v) over the tokens that t covers."""
    log_t = log_t.detach()
    gap = log_t.exp() * (log_t - log_p[:, : log_t.shape[-1]])
    return gap.where(log_t > -math.inf, 0).sum(-1)  # 0 log 0 = 0


def kl_from(other: Tensor, logits: Tensor, vocab_size: int | None, temperature: float = 1.0) -> Tensor:
    """KL(other ‖ student), both at one temperature, of other's logits [n, V']."""
    log_t = (other[:, :vocab_size] / temperature).log_softmax(-1)
    return kl(log_t, (logits / temperature).log_softmax(-1))


def _kl_terms(q: Tensor, m: Tensor) -> Tensor:
    """Σ q log(q/m), 0 log 0 = 0"""
    return (torch.special.xlogy(q, q) - torch.special.xlogy(q, m)).sum(-1)


def _todi(p: Tensor, R: Tensor, slope: float) -> Tensor:
    w = torch.sigmoid(slope * (R / p).log()).detach()
    return (w * R * (R / p).log() + (1 - w) * p * (p / R).log()).sum(-1)


def _alpha(p: Tensor, R: Tensor, alpha: float) -> Tensor:
    if alpha in (0, 1):
        return _kl_terms(R, p) if alpha == 1 else _kl_terms(p, R)
    return (1 - (R**alpha * p ** (1 - alpha)).sum(-1)) / (alpha * (1 - alpha))


_DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "reverse_kl": lambda p, R: _kl_terms(p, R),
    "jsd": lambda p, R, beta: (
        beta * _kl_terms(R, (1 - beta) * p + beta * R) + (1 - beta) * _kl_terms(p, (1 - beta) * p + beta * R)
    ),
    "skew_kl": lambda p, R, alpha: _kl_terms(R, alpha * R + (1 - alpha) * p),
    "skew_reverse_kl": lambda p, R, alpha: _kl_terms(p, alpha * p + (1 - alpha) * R),
    "total_variation": lambda p, R: (p - R).abs().sum(-1) / 2,
    "alpha": _alpha,
    "todi": _todi,
}


def has_formula(divergence: Divergence) -> bool:
    """Whether its formula stands here, as that of one of somebody's own does not."""
    return divergence.is_forward_kl or (
        divergence.name in _DIVERGENCES and divergence.known[divergence.name] is type(divergence)
    )


def divergence_from(other: Tensor, logits: Tensor, divergence: object, vocab_size: int | None = None) -> Tensor:
    """D(other, student) of other's logits [n, V']: KL(other ‖ student), or another divergence by its printed formula.

    That is over the tokens that the other covers, with the student renormalised there.
    """
    chosen = as_divergence(divergence)
    if chosen.is_forward_kl:
        return kl_from(other, logits, vocab_size)
    R = other[:, :vocab_size].softmax(-1).detach()
    numbers = {field.name: getattr(chosen, field.name) for field in dataclasses.fields(chosen)}  # type: ignore[arg-type]
    return _DIVERGENCES[chosen.name](logits[:, : R.shape[-1]].softmax(-1), R, **numbers)
