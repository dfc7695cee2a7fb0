"""The timed targets as one writes them by hand on full logits, gradients by autograd: what an engine has to beat.

Logits come in the head's dtype and are cast to float32 for the softmax, as Hugging Face's models do. ``torch.compile``
gets the same functions. Shapes: logits [N, V], labels [N], loss a scalar.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gpu_run.inputs import Inputs


def _student(x: Inputs) -> tuple[Tensor, Tensor]:
    """(log p [N, V], log p_y [N])."""
    log_p = (x.hidden @ x.weight.T).float().log_softmax(-1)
    return log_p, log_p.gather(1, x.labels[:, None]).squeeze(1)


def _teacher(x: Inputs) -> Tensor:
    with torch.no_grad():
        return (x.teacher_hidden @ x.teacher_weight.T).float()


def sft(x: Inputs) -> Tensor:
    return -_student(x)[1].mean()


def dft(x: Inputs) -> Tensor:
    _, log_p_y = _student(x)
    return -(log_p_y.detach().exp() * log_p_y).mean()


def eaft(x: Inputs) -> Tensor:
    log_p, log_p_y = _student(x)
    log_top = log_p.detach().topk(20).values.log_softmax(-1)
    entropy = -(log_top.exp() * log_top).sum(-1)
    return -(entropy / math.log(20) * log_p_y).mean()


def kd(x: Inputs) -> Tensor:
    log_p, _ = _student(x)
    return -(_teacher(x).softmax(-1) * log_p).sum(-1).mean()


def kd_at_2(x: Inputs) -> Tensor:
    log_p = ((x.hidden @ x.weight.T).float() / 2).log_softmax(-1)
    log_t = (_teacher(x) / 2).log_softmax(-1)
    return 4 * (log_t.exp() * (log_t - log_p)).sum(-1).mean()


def _toward(log_p: Tensor, log_p_y: Tensor, log_t: Tensor, labels: Tensor) -> Tensor:
    """CE(Q, p) with Q = p_y δ + (1 − p_y) R and R ∝ √(p t)."""
    with torch.no_grad():
        p_y = log_p_y.exp()
        Q = (0.5 * log_p + 0.5 * log_t).softmax(-1) * (1 - p_y)[:, None]
        Q.scatter_add_(1, labels[:, None], p_y[:, None])
    return -(Q * log_p).sum(-1).mean()


def target_sft(x: Inputs) -> Tensor:
    log_p, log_p_y = _student(x)
    return _toward(log_p, log_p_y, _teacher(x), x.labels)


def target_sft_kept(x: Inputs) -> Tensor:
    log_p, log_p_y = _student(x)
    ids, logprobs = x.kept.ids, x.kept.logprobs
    with torch.no_grad():  # the rest of the teacher's mass in the student's shape
        log_tail = torch.log1p(-logprobs.exp().sum(-1).clamp(max=1))
        outside = log_p.scatter(1, ids, float("-inf")).logsumexp(-1)
        log_t = (log_p + (log_tail - outside)[:, None]).scatter(1, ids, logprobs)
    return _toward(log_p, log_p_y, log_t, x.labels)


BY_NAME: dict[str, Callable[[Inputs], Tensor]] = {
    "sft": sft,
    "dft": dft,
    "eaft": eaft,
    "kd": kd,
    "kd T=2": kd_at_2,
    "target-sft": target_sft,
    "target-sft top-k": target_sft_kept,
}
