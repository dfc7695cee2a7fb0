"""Rules that read how sure the student is overall."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qtarget.errors import ConfigError, check_range
from qtarget.targets.parts import named
from qtarget.targets.stats import TokenStats
from qtarget.targets.trust.rule import Rule


@named("entropy")
@dataclass(frozen=True)
class Entropy(Rule):
    """γ = (H_k / normalizer)^power, H_k the entropy of the renormalised top k (EAFT, arXiv:2601.02151).

    normalizer is "log_k" (the paper), a number (LLaMA-Factory uses 3.0) or "none" (axolotl; γ then reaches log k).
    power = 0 is SFT.

    >>> import torch
    >>> undecided = TokenStats({}, top_k=lambda k: torch.full((1, k), -math.log(2 * k)))
    >>> Entropy(top_k=5)(undecided)
    tensor([1.])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"log_p_y", "top_k_entropy"})

    top_k: int = 20
    power: float = 1.0
    normalizer: str | float = "log_k"

    def __post_init__(self):
        if not _is_whole(self.top_k, 2):
            raise ConfigError(
                f"top_k is {self.top_k!r}; use a whole number from 2 (the paper uses 20): one token has no entropy"
            )
        check_range("power", self.power, 0)
        if isinstance(self.normalizer, str):
            if self.normalizer not in ("log_k", "none"):
                raise ConfigError(f"normalizer is {self.normalizer!r}; use 'log_k', 'none' or a number above 0")
        else:
            check_range("normalizer", self.normalizer, 0, open_low=True)

    def __call__(self, stats: TokenStats) -> Tensor:
        if self.normalizer == "log_k":
            divisor = math.log(self.top_k)
        else:
            divisor = 1.0 if self.normalizer == "none" else float(self.normalizer)
        return (stats.top_k_entropy(self.top_k) / divisor) ** self.power


@named("surprise_power")
@dataclass(frozen=True)
class SurprisePower(Rule):
    """γ = p_y^e, e = 1 + strength · (clip(exp((−log p_y − H) / beta), low, high) − 1) (IDFT, arXiv:2602.12222).

    A label that surprises the student more than its entropy H predicts has an exponent above 1, and gets less trust;
    strength 0 is DFT.

    >>> import torch
    >>> SurprisePower()(TokenStats({"log_p_y": torch.tensor([0.5]).log(), "entropy": torch.tensor([0.5]).log().neg()}))
    tensor([0.5000])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"log_p_y", "entropy"})

    strength: float = 1.0
    beta: float = 1.0
    low: float = 0.1
    high: float = 2.0

    def __post_init__(self):
        check_range("strength", self.strength, 0, 1)
        check_range("beta", self.beta, 0, open_low=True)
        check_range("low", self.low, 0)
        check_range("high", self.high, self.low)

    def __call__(self, stats: TokenStats) -> Tensor:
        surprise = ((-stats.log_p_y - stats.entropy) / self.beta).exp().clamp(self.low, self.high)
        return ((1 + self.strength * (surprise - 1)) * stats.log_p_y).exp()


@named("concentration_power")
@dataclass(frozen=True)
class ConcentrationPower(Rule):
    """γ = p_y^C, C = Σ_v p_v² (DEFT, arXiv:2602.11424): near SFT where p is spread out, near DFT where it is not.

    >>> import torch
    >>> ConcentrationPower()(TokenStats({"log_p_y": torch.tensor([0.25]).log(), "sum_sq": torch.tensor([0.5])}))
    tensor([0.5000])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"log_p_y", "sum_sq"})

    def __call__(self, stats: TokenStats) -> Tensor:
        return (stats.sum_sq * stats.log_p_y).exp()


@named("toward_half")
@dataclass(frozen=True)
class TowardHalf(Rule):
    """γ = 1 + weight · m · p_y (1 − 2 p_y), the gradient of −log p_y + weight · m (p_y − ½)² (SED-SFT, arXiv:2602.07464).

    m is held constant: 1 where the student's ``top_k`` likeliest tokens together have less than ``tau``, else 0.

    >>> import torch
    >>> unsure = {"log_p_y": torch.tensor([0.25]).log(), "rest_mass": torch.tensor([0.75])}
    >>> TowardHalf(weight=1.0)(TokenStats(unsure, top_k=lambda k: torch.tensor([[0.3, 0.2]]).log()))
    tensor([1.1250])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"log_p_y", "rest_mass", "top_k_mass"})

    weight: float = 0.2
    top_k: int = 2
    tau: float = 0.9

    def __post_init__(self):
        check_range("weight", self.weight, 0)
        if not _is_whole(self.top_k, 1):
            raise ConfigError(f"top_k is {self.top_k!r}; use a whole number from 1")
        check_range("tau", self.tau, 0, 1)

    def _undecided(self, stats: TokenStats) -> Tensor:
        return self.weight * (stats.top_k_mass(self.top_k) < self.tau)

    def __call__(self, stats: TokenStats) -> Tensor:
        p_y = stats.log_p_y.exp()
        return 1 + self._undecided(stats) * p_y * (stats.rest_mass - p_y)

    def label_loss(self, stats: TokenStats) -> Tensor:
        from_half = (stats.log_p_y.exp() - stats.rest_mass) / 2  # p_y − ½
        return -stats.log_p_y + self._undecided(stats) * from_half**2


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
