"""``LossOutput``, which every loss returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Per-token statistics, in the order they are shown.
BASIC_STATISTICS = (
    "nll",  # −log p_y
    "ce_q",  # CE(Q, p), Q the induced target
    "trust",  # a, the weight of the label
    "residual_mass",  # Σ b
    "strength",  # a + Σ b
    "update",  # ½‖g‖₁, the share of probability the token is asked to move
    "entropy",  # of the student, nats
    "accuracy",  # 1 where the label is the most likely token
    "off_simplex_fraction",  # 1 where some Q_v is below −1e-6 (float64: −1e-12)
)
ALL_STATISTICS = (*BASIC_STATISTICS, "kl_q")  # kl_q = KL(Q ‖ p): a logarithm per vocabulary entry


@dataclass
class LossOutput:
    """A loss and what it did to each token.

    Attributes:
        loss: the published value of the objective; a scalar, or with reduction "none" the labels' shape (0 at ignored
            positions). Differentiable.
        stats: per-token tensors in the labels' shape, NaN at ignored positions, without a graph.
    """

    loss: Tensor
    stats: dict[str, Tensor]


def simplex_tolerance(dtype: torch.dtype) -> float:
    """How far below zero an entry of Q may fall by rounding alone."""
    return 1e-12 if dtype == torch.float64 else 1e-6
