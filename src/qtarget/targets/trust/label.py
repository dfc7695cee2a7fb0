"""Rules that read how likely the label is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qtarget.errors import check_bool, check_range
from qtarget.targets.parts import named
from qtarget.targets.stats import TokenStats
from qtarget.targets.trust.rule import Rule, held_constant


@named("constant")
@dataclass(frozen=True)
class Constant(Rule):
    """The same trust for every token: γ = value. 1 is plain SFT; 1 − ε with a uniform residual is label smoothing.

    >>> Constant(0.9)(TokenStats({"log_p_y": torch.tensor([0.5, 0.1]).log()}))
    tensor([0.9000, 0.9000])
    """

    value: float = 1.0

    def __post_init__(self):
        check_range("constant.value", self.value)

    def __call__(self, stats: TokenStats) -> Tensor:
        return torch.full_like(stats.log_p_y, self.value)

    @property
    def fixed_rest(self) -> float | None:
        return 1 - self.value


@named("probability")
@dataclass(frozen=True)
class Probability(Rule):
    """The student's own probability of the label: γ = p_y (DFT arXiv:2508.05629, Target-SFT arXiv:2606.11189).

    >>> Probability()(TokenStats({"log_p_y": torch.tensor([0.5, 0.1]).log()}))
    tensor([0.5000, 0.1000])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"log_p_y", "rest_mass"})

    def __call__(self, stats: TokenStats) -> Tensor:
        return stats.log_p_y.exp()

    def weights(self, stats: TokenStats) -> tuple[Tensor, Tensor]:
        return stats.log_p_y.exp(), stats.rest_mass


@named("probability_power")
@dataclass(frozen=True)
class ProbabilityPower(Rule):
    """γ = p_y^alpha, the gradient of (1 − p_y^alpha)/alpha (Beyond-log family, arXiv:2510.00526).

    alpha = 0 is SFT, alpha = 1 has DFT's gradient, a negative alpha trusts rare labels above 1. With ``held`` the
    reported loss is −sg(γ) log p_y (TALR, arXiv:2509.20758); the gradient is the same.

    >>> ProbabilityPower(alpha=2.0)(TokenStats({"log_p_y": torch.tensor([0.5, 0.1]).log()}))
    tensor([0.2500, 0.0100])
    """

    alpha: float = 1.0
    held: bool = False

    def __post_init__(self):
        check_range("alpha", self.alpha)
        check_bool("held", self.held)

    def __call__(self, stats: TokenStats) -> Tensor:
        return (self.alpha * stats.log_p_y).exp()

    def label_loss(self, stats: TokenStats) -> Tensor:
        if self.held or self.alpha == 0:
            return held_constant(self(stats), stats)
        return -torch.expm1(self.alpha * stats.log_p_y) / self.alpha


@named("affine_probability")
@dataclass(frozen=True)
class AffineProbability(Rule):
    """γ = constant + slope · p_y, the gradient of −constant · log p_y + slope · (1 − p_y).

    Poly-1 (arXiv:2204.12511) and symmetric cross-entropy (arXiv:1908.06112). With ``held`` the reported loss is
    −sg(γ) log p_y (MixCE, arXiv:2305.16958); the gradient is the same.

    >>> AffineProbability(constant=0.5, slope=0.5)(TokenStats({"log_p_y": torch.tensor([0.5, 0.1]).log()}))
    tensor([0.7500, 0.5500])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"log_p_y", "rest_mass"})

    constant: float = 1.0
    slope: float = 1.0
    held: bool = False

    def __post_init__(self):
        check_range("constant", self.constant)
        check_range("slope", self.slope)
        check_bool("held", self.held)

    def __call__(self, stats: TokenStats) -> Tensor:
        return self.constant + self.slope * stats.log_p_y.exp()

    def weights(self, stats: TokenStats) -> tuple[Tensor, Tensor]:
        return self(stats), (1 - self.constant - self.slope) + self.slope * stats.rest_mass

    def label_loss(self, stats: TokenStats) -> Tensor:
        if self.held:
            return held_constant(self(stats), stats)
        return -self.constant * stats.log_p_y + self.slope * stats.rest_mass


@named("clipped_probability")
@dataclass(frozen=True)
class ClippedProbability(Rule):
    """γ = p_y clipped to [low, high], as a share of ``high``.

    low 0.2 keeps a floor under rare labels (GOLD, arXiv:2009.07839); high 0.1 is min(1, p_y / 0.1), full trust from
    0.1 on (TrSFT, arXiv:2512.17636).

    >>> ClippedProbability(low=0.2)(TokenStats({"log_p_y": torch.tensor([0.5, 0.1]).log()}))
    tensor([0.5000, 0.2000])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"log_p_y", "rest_mass"})

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self):
        check_range("high", self.high, 0, 1, open_low=True)
        check_range("low", self.low, 0, self.high)

    def __call__(self, stats: TokenStats) -> Tensor:
        return stats.log_p_y.exp().clamp(self.low, self.high) / self.high

    def weights(self, stats: TokenStats) -> tuple[Tensor, Tensor]:
        missing = stats.rest_mass.clamp(1 - self.high, 1 - self.low) - (1 - self.high)
        return self(stats), missing / self.high


@named("mixture_ratio")
@dataclass(frozen=True)
class MixtureRatio(Rule):
    """γ = p_y / (gamma + (1 − gamma) p_y): p_y divided by its mixture with the label (TaiLr, arXiv:2302.13344).

    gamma = 0 is SFT, gamma = 1 is DFT.

    >>> MixtureRatio(gamma=0.5)(TokenStats({"log_p_y": torch.tensor([0.5, 0.1]).log()}))
    tensor([0.6667, 0.1818])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"log_p_y", "rest_mass"})

    gamma: float = 0.1

    def __post_init__(self):
        check_range("gamma", self.gamma, 0, 1)

    def __call__(self, stats: TokenStats) -> Tensor:
        if self.gamma == 0:  # not 0 · ∞ where p_y is 0
            return torch.ones_like(stats.log_p_y)
        return 1 / (1 - self.gamma + self.gamma * (-stats.log_p_y).exp())

    def weights(self, stats: TokenStats) -> tuple[Tensor, Tensor]:
        mixture = self.gamma + (1 - self.gamma) * stats.log_p_y.exp()
        return self(stats), self.gamma * stats.rest_mass / mixture.clamp(min=torch.finfo(mixture.dtype).tiny)


@named("shaped_probability")
@dataclass(frozen=True)
class ShapedProbability(Rule):
    """γ = gamma · p_y / (p_y + gamma)², the gradient of −p_y / (p_y + gamma) (LUFFY, arXiv:2504.14945).

    Largest, ¼, at p_y = gamma: less for labels that the student knows, and for those it rules out.

    >>> ShapedProbability(gamma=0.1)(TokenStats({"log_p_y": torch.tensor([0.4, 0.1]).log()}))
    tensor([0.1600, 0.2500])
    """

    gamma: float = 0.1

    def __post_init__(self):
        check_range("gamma", self.gamma, 0, open_low=True)

    def __call__(self, stats: TokenStats) -> Tensor:
        p_y = stats.log_p_y.exp()
        return self.gamma * p_y / (p_y + self.gamma) ** 2

    def label_loss(self, stats: TokenStats) -> Tensor:
        p_y = stats.log_p_y.exp()
        return -p_y / (p_y + self.gamma)


@named("bernoulli_variance")
@dataclass(frozen=True)
class BernoulliVariance(Rule):
    """γ = p_y (1 − p_y): most for labels with p_y = ½ (CHORD-φ, arXiv:2508.11408).

    >>> BernoulliVariance()(TokenStats({"log_p_y": torch.tensor([0.5]).log(), "rest_mass": torch.tensor([0.5])}))
    tensor([0.2500])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"log_p_y", "rest_mass"})

    def __call__(self, stats: TokenStats) -> Tensor:
        return stats.log_p_y.exp() * stats.rest_mass


@named("confidence_gap")
@dataclass(frozen=True)
class ConfidenceGap(Rule):
    """γ = p_y · max(0, 1 − logit(p_y) / logit(confidence)) (InfoSFT, arXiv:2605.14967).

    γ = 0 from p_y = confidence on: the student need not learn what it is already that sure of.

    >>> sure = torch.tensor([0.5, 0.95])
    >>> ConfidenceGap(0.93)(TokenStats({"log_p_y": sure.log(), "rest_mass": 1 - sure}))
    tensor([0.5000, 0.0000])
    """

    can_be_zero: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"log_p_y", "rest_mass"})

    confidence: float = 0.93

    def __post_init__(self):
        check_range("confidence", self.confidence, 0.5, 1, open_low=True, open_high=True)

    def __call__(self, stats: TokenStats) -> Tensor:
        wanted = math.log(self.confidence) - math.log1p(-self.confidence)
        logit = stats.log_p_y - stats.rest_mass.log()
        return stats.log_p_y.exp() * (1 - logit / wanted).clamp(min=0)


@named("focal")
@dataclass(frozen=True)
class Focal(Rule):
    """The gradient of −(1 − p_y)^gamma · log p_y (focal loss, arXiv:1708.02002): less for what the student knows.

    γ = (1 − p_y)^gamma + gamma · p_y (1 − p_y)^(gamma − 1) · (−log p_y), above 1 for unlikely labels. With ``held`` the
    factor is held constant and γ is that factor.

    >>> half = TokenStats({"log_p_y": torch.tensor([0.5]).log(), "rest_mass": torch.tensor([0.5])})
    >>> Focal(gamma=2.0, held=True)(half), Focal(gamma=2.0)(half)
    (tensor([0.2500]), tensor([0.5966]))
    """

    needs: ClassVar[frozenset[str]] = frozenset({"log_p_y", "rest_mass"})

    gamma: float = 2.0
    held: bool = False

    def __post_init__(self):
        check_range("gamma", self.gamma, 0)
        check_bool("held", self.held)

    def __call__(self, stats: TokenStats) -> Tensor:
        factor = stats.rest_mass**self.gamma
        if self.held:
            return factor
        rest = stats.rest_mass.clamp(min=torch.finfo(factor.dtype).tiny)
        return factor * (1 + self.gamma * stats.log_p_y.exp() * self._nll(stats) / rest)

    def label_loss(self, stats: TokenStats) -> Tensor:
        return stats.rest_mass**self.gamma * self._nll(stats)

    def _nll(self, stats: TokenStats) -> Tensor:
        """−log p_y, from 1 − p_y where that has more digits."""
        return torch.where(stats.rest_mass < 0.5, -torch.log1p(-stats.rest_mass), -stats.log_p_y)
