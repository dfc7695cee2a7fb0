"""What the printed losses share, in plain PyTorch on full logits.

No rule, residual or engine of qtarget is used, so that agreement with one means something.

logits [n, V] of any float dtype, labels [n] → [n]. ``detach`` is a stop-gradient of the objective itself.
``vocab_size``: a padded head has more rows than real tokens. The student's p runs over the full width; what comes from
elsewhere (uniform, teacher, reference, guided) is a softmax over the real tokens and 0 beyond.
"""

from __future__ import annotations

import math

from torch import Tensor


def label_log_p(logits: Tensor, labels: Tensor) -> Tensor:
    """log p_y"""
    return logits.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    """−log p_y"""
    return -label_log_p(logits, labels)


def dft(logits: Tensor, labels: Tensor) -> Tensor:
    """−sg(p_y) log p_y"""
    log_p_y = label_log_p(logits, labels)
    return -log_p_y.exp().detach() * log_p_y


def kl(log_t: Tensor, log_p: Tensor) -> Tensor:
    """KL(sg t ‖ p) = Σ_v t_v (log t_v − log p_v) over the tokens that t covers."""
    log_t = log_t.detach()
    gap = log_t.exp() * (log_t - log_p[:, : log_t.shape[-1]])
    return gap.where(log_t > -math.inf, 0).sum(-1)  # 0 log 0 = 0


def kl_from(other: Tensor, logits: Tensor, vocab_size: int | None, temperature: float = 1.0) -> Tensor:
    """KL(other ‖ student), both at one temperature, of other's logits [n, V']."""
    log_t = (other[:, :vocab_size] / temperature).log_softmax(-1)
    return kl(log_t, (logits / temperature).log_softmax(-1))
