"""The scores of ``targets/divergence.py``, in place over a block of rows.

A divergence without a function of its own here goes through its class's, which allocates some blocks.
Shape suffixes: r rows of the block, s columns that the residual covers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch

import torch
from torch import Tensor

from qtarget.losses.engine.buffers import Scratch
from qtarget.targets.divergence import JSD, Divergence, ReverseKL, SkewKL, SkewReverseKL, TotalVariation

# Of a ratio beyond e^80 the scores below have seen the end, and p ≤ e^(−80) R has no weight.
_FAR = 80.0


@dataclass
class Compared:
    """Student and residual over the columns that the residual covers.

    Attributes:
        scaled, inv: [r, s] and [r], p = scaled · inv. R: [r, s], its sum off by rounding, overwritten.
        log_ratio: [r, s], log R − log p; overwritten by p ⊙ s.
        z, lse: [r, s] and [r], log p = z − lse.
    """

    scaled: Tensor
    inv: Tensor
    R: Tensor
    log_ratio: Tensor
    z: Tensor
    lse: Tensor

    def expm1_(self) -> Tensor:
        """R/p − 1 over ``log_ratio``."""
        return self.log_ratio.clamp_(-_FAR, _FAR).expm1_()


@singledispatch
def write_score(divergence: Divergence, of: Compared, scratch: Scratch) -> tuple[Tensor, float]:
    """Write ``scaled`` ⊙ s over ``log_ratio``, up to the factor returned beside the value D(R, p) [r]."""
    p, log_p, d = of.scaled * of.inv[:, None], of.z - of.lse[:, None], of.log_ratio.neg()
    value = divergence.value(p, of.R / of.R.sum(-1, keepdim=True), d).sum(-1)
    of.log_ratio.copy_(divergence.times_p(p, log_p, d)).div_(of.inv[:, None])
    return value, 1.0


@write_score.register
def _reverse_kl(divergence: ReverseKL, of: Compared, scratch: Scratch) -> tuple[Tensor, float]:
    return -of.log_ratio.mul_(of.scaled).sum(-1) * of.inv, -1.0


@write_score.register
def _jsd(divergence: JSD, of: Compared, scratch: Scratch) -> tuple[Tensor, float]:
    beta, log_ratio = divergence.beta, of.log_ratio.clamp_(-_FAR, _FAR)
    log_m_over_p = torch.expm1(log_ratio, out=scratch.get("product", *log_ratio.shape)).mul_(beta).log1p_()
    from_R = of.R.mul_(log_ratio.sub_(log_m_over_p)).sum(-1)
    torch.mul(log_m_over_p, of.scaled, out=log_ratio)
    return beta * from_R - (1 - beta) * log_ratio.sum(-1) * of.inv, beta - 1


@write_score.register
def _skew_kl(divergence: SkewKL, of: Compared, scratch: Scratch) -> tuple[Tensor, float]:
    alpha, log_ratio = divergence.alpha, of.log_ratio.clamp_(-_FAR, _FAR)
    excess = torch.expm1(log_ratio, out=scratch.get("product", *log_ratio.shape))  # R/p − 1
    log_m_over_p = torch.mul(excess, alpha, out=scratch.get("difference", *log_ratio.shape)).log1p_()
    value = of.R.mul_(log_ratio.sub_(log_m_over_p)).sum(-1)
    m_over_p = torch.mul(excess, alpha, out=log_ratio).add_(1)
    torch.div(excess, m_over_p, out=log_ratio).mul_(of.scaled)
    return value, -((1 - alpha) ** 2)


@write_score.register
def _skew_reverse_kl(divergence: SkewReverseKL, of: Compared, scratch: Scratch) -> tuple[Tensor, float]:
    alpha = divergence.alpha
    excess = of.expm1_().mul_(1 - alpha)  # m/p − 1
    log_m_over_p = torch.log1p(excess, out=of.R)
    value = -scratch.dot(of.scaled, log_m_over_p) * of.inv
    less_m = excess.div_(torch.add(excess, 1, out=scratch.get("product", *excess.shape)))  # 1 − p/m
    less_m.sub_(log_m_over_p, alpha=1 / alpha).mul_(of.scaled)
    return value, alpha


@write_score.register
def _total_variation(divergence: TotalVariation, of: Compared, scratch: Scratch) -> tuple[Tensor, float]:
    # R − p as for forward KL. It sums to 0 but for the rounding of the ratio's normaliser, which for a residual near
    # the student would decide on which side of p a token is.
    difference = scratch.get("difference", *of.log_ratio.shape).copy_(of.log_ratio)
    scratch.tanh_half_(difference).mul_(of.R.addcmul_(of.scaled, of.inv[:, None]))
    of.log_ratio.sub_(difference.sum(-1, keepdim=True)).sign_().mul_(of.scaled)
    return difference.abs_().sum(-1) / 2, -0.5
