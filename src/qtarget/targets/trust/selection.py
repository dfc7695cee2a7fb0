"""Rules that keep some tokens and drop others, or weight them by a column of the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qtarget.errors import ConfigError, check_range, unknown
from qtarget.targets.parts import named
from qtarget.targets.stats import TokenStats
from qtarget.targets.trust.rule import Rule


@named("probability_threshold")
@dataclass(frozen=True)
class ProbabilityThreshold(Rule):
    """Train or drop by the label's probability: γ = 1[p_y ≥ tau] (ProFiT, arXiv:2601.09195).

    direction "higher" keeps p_y >= tau, "lower" keeps p_y <= tau, "middle" keeps tau_low <= p_y <= tau_high: tokens
    exactly at a threshold are kept, as in the authors' code.

    >>> ProbabilityThreshold(tau=0.3)(TokenStats({"log_p_y": torch.tensor([0.5, 0.1]).log()}))
    tensor([1., 0.])
    """

    can_be_zero: ClassVar[bool] = True

    tau: float = 0.1
    direction: str = "higher"
    tau_low: float | None = None
    tau_high: float | None = None

    def __post_init__(self):
        if self.direction not in ("higher", "lower", "middle"):
            raise unknown("direction", self.direction, ("higher", "lower", "middle"))
        if self.direction == "middle":
            if self.tau_low is None or self.tau_high is None:
                raise ConfigError("direction is 'middle'; give both tau_low and tau_high")
            check_range("tau_low", self.tau_low, 0, 1)
            check_range("tau_high", self.tau_high, self.tau_low, 1, open_low=True)
        elif self.tau_low is not None or self.tau_high is not None:
            raise ConfigError(
                f"tau_low and tau_high are for direction 'middle'; direction is {self.direction!r}, use tau"
            )
        check_range("tau", self.tau, 0, 1)

    def __call__(self, stats: TokenStats) -> Tensor:
        p_y = stats.log_p_y.exp()
        if self.direction == "higher":
            keep = p_y >= self.tau
        elif self.direction == "lower":
            keep = p_y <= self.tau
        else:
            assert self.tau_low is not None and self.tau_high is not None  # checked when built
            keep = (p_y >= self.tau_low) & (p_y <= self.tau_high)
        return keep.to(p_y.dtype)


@named("trajectory_weight")
@dataclass(frozen=True)
class TrajectoryWeight(Rule):
    """γ = w, the importance weight of the row (iw-SFT, arXiv:2507.12856), given as data; w > 1 leaves the simplex.

    >>> TrajectoryWeight()(TokenStats({"weight": torch.tensor([2.0, 0.5])}))
    tensor([2.0000, 0.5000])
    """

    can_be_zero: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"log_p_y", "weight"})

    def __call__(self, stats: TokenStats) -> Tensor:
        return stats.weight


@named("token_mask")
@dataclass(frozen=True)
class TokenMask(Rule):
    """γ = c, 1 where the token is critical and 0 where it is not (CFT, arXiv:2510.10974), given as data.

    >>> TokenMask()(TokenStats({"critical": torch.tensor([1.0, 0.0])}))
    tensor([1., 0.])
    """

    can_be_zero: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"log_p_y", "critical"})

    def __call__(self, stats: TokenStats) -> Tensor:
        return stats.critical


@named("clipped_ratio")
@dataclass(frozen=True)
class ClippedRatio(Rule):
    """γ = r where r < 1 + clip_high, else 0; r = p_y / p_old (PSFT, arXiv:2508.17784).

    The lower clip only shapes the reported value: with a positive advantage it never stops the gradient.

    >>> now, before = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.5, 0.1]).log()
    >>> ClippedRatio(clip=0.2)(TokenStats({"log_p_y": now, "old_logps": before}))
    tensor([1., 0.])
    """

    can_be_zero: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"log_p_y", "old_logps"})

    clip: float = 0.2
    clip_high: float | None = None

    def __post_init__(self):
        check_range("clip", self.clip, 0, 1, open_low=True)
        if self.clip_high is not None:
            check_range("clip_high", self.clip_high, 0, open_low=True)

    @property
    def high(self) -> float:
        return 1 + (self.clip if self.clip_high is None else self.clip_high)

    def _ratio(self, stats: TokenStats) -> Tensor:
        return (stats.log_p_y - stats.old_logps).clamp(max=20).exp()  # e^20 is far past any clip, and finite

    def __call__(self, stats: TokenStats) -> Tensor:
        ratio = self._ratio(stats)
        return torch.where(ratio < self.high, ratio, torch.zeros_like(ratio))

    def label_loss(self, stats: TokenStats) -> Tensor:
        ratio = self._ratio(stats)
        return -torch.minimum(ratio, ratio.clamp(1 - self.clip, self.high))
