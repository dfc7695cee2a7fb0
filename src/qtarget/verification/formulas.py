"""The fifteen objectives as their papers print them, on full logits, for autograd.

Nothing here uses qtarget's weights, residuals or engine. logits [n, V] float64, labels [n] → loss [n]; ``detach`` is a
stop gradient of the objective itself. ``given``: teacher and reference [n, V'] logits; weight, critical, old_logps [n];
and vocab, the real tokens: what comes from elsewhere than the student is a softmax over these and 0 beyond.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from qtarget.targets import Target

Loss = Callable[[Tensor, Tensor, Mapping[str, Any]], Tensor]


def of(target: Target) -> Loss | None:
    """The printed loss of a named target with its hyperparameters; None for a composed one."""
    made = _LOSSES.get(target.name)
    if made is None:
        return None
    numbers, share = target.hyperparameters, target.share

    def loss(logits: Tensor, labels: Tensor, given: Mapping[str, Any]) -> Tensor:
        own = made(logits, labels, given, **numbers)
        return own if share == 1 else share * own + (1 - share) * _nll(logits, labels)

    return loss


def _nll(logits: Tensor, labels: Tensor) -> Tensor:
    return -logits.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)


def _kl(log_t: Tensor, log_p: Tensor) -> Tensor:
    """KL(t ‖ p) over the tokens that t covers; t is held constant."""
    log_t = log_t.detach()
    return (log_t.exp() * (log_t - log_p[:, : log_t.shape[-1]])).where(log_t > -math.inf, 0).sum(-1)


def _kl_from(name: str, logits: Tensor, given: Mapping[str, Any], temperature: float = 1.0) -> Tensor:
    log_t = (given[name][:, : given["vocab"]] / temperature).log_softmax(-1)
    return temperature**2 * _kl(log_t, (logits / temperature).log_softmax(-1))


def _dft(logits, labels, given):
    nll = _nll(logits, labels)
    return (-nll).exp().detach() * nll


def _beyond_log(logits, labels, given, *, alpha):
    nll = _nll(logits, labels)
    return nll if alpha == 0 else -torch.expm1(-alpha * nll) / alpha


def _profit(logits, labels, given, *, tau, direction, tau_low, tau_high):
    nll = _nll(logits, labels)
    p_y = (-nll).exp().detach()
    kept = {
        "higher": lambda: p_y >= tau,
        "lower": lambda: p_y < tau,
        "middle": lambda: (p_y >= tau_low) & (p_y < tau_high),
    }[direction]()
    return kept * nll


def _eaft(logits, labels, given, *, top_k, power, normalizer):
    log_top = logits.topk(top_k).values.log_softmax(-1)
    entropy = -(log_top.exp() * log_top).sum(-1)
    divisor = {"log_k": math.log(top_k), "none": 1.0}.get(normalizer, normalizer)
    return ((entropy / divisor) ** power).detach() * _nll(logits, labels)


def _label_smoothing(logits, labels, given, *, smoothing):
    evenly = -logits.log_softmax(-1)[:, : given["vocab"]].mean(-1)
    return (1 - smoothing) * _nll(logits, labels) + smoothing * evenly


def _anchored(first: Loss):
    def loss(logits, labels, given, *, kl_weight, direction):
        own = first(logits, labels, given)
        return own + kl_weight * _kl_from("reference", logits, given) if kl_weight else own

    return loss


def _psft(logits, labels, given, *, clip, clip_high):
    ratio = (-_nll(logits, labels) - given["old_logps"]).exp()
    return -torch.minimum(ratio, ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high)))


def _gem(logits, labels, given, *, beta, h):
    if beta == 1 and h == "linear":  # CE(q, p) has no gradient where q is p
        return _nll(logits, labels)
    q = (logits / beta).softmax(-1).detach()
    log_p = logits.log_softmax(-1)
    gap = log_p - log_p.gather(-1, labels[:, None])
    weight = 1.0 if h == "linear" else torch.sigmoid(0.01 * (logits - logits.gather(-1, labels[:, None]))).detach()
    return (q * weight * gap).sum(-1)


def _kd(logits, labels, given, *, temperature):
    return _kl_from("teacher", logits, given, temperature)


def _kd_hybrid(logits, labels, given, *, kd_weight, temperature):
    own = (1 - kd_weight) * _nll(logits, labels)
    return own + kd_weight * _kl_from("teacher", logits, given, temperature) if kd_weight else own


def _target_sft(logits, labels, given, *, eta, teacher_temperature):
    """CE(sg Q, p) with Q = p_y δ + (1 − p_y) R; less the part of it without a gradient."""
    own = _dft(logits, labels, given)
    if eta == 0:
        return own
    log_p, real = logits.log_softmax(-1), given["vocab"]
    log_t = (given["teacher"][:, :real] / teacher_temperature).log_softmax(-1)
    # The student's coefficient may be 0, where the teacher alone decides.
    log_r = (eta * log_t + ((1 - eta) * log_p[:, : log_t.shape[-1]] if eta != 1 else 0)).log_softmax(-1)
    p_y = (-_nll(logits, labels)).exp().detach()
    return own + (1 - p_y) * _kl(log_r, log_p)


_LOSSES: dict[str, Callable[..., Tensor]] = {
    "sft": lambda logits, labels, given: _nll(logits, labels),
    "dft": _dft,
    "beyond-log": _beyond_log,
    "profit": _profit,
    "eaft": _eaft,
    "iw-sft": lambda logits, labels, given: given["weight"] * _nll(logits, labels),
    "cft": lambda logits, labels, given: given["critical"] * _nll(logits, labels),
    "label-smoothing": _label_smoothing,
    "sft-kl": _anchored(lambda logits, labels, given: _nll(logits, labels)),
    "asft": _anchored(_dft),
    "psft": _psft,
    "gem": _gem,
    "kd": _kd,
    "kd-hybrid": _kd_hybrid,
    "target-sft": _target_sft,
}
