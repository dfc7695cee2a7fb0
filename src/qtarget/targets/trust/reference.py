"""Rules that ask another model about the label."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qtarget.errors import check_range, unknown
from qtarget.targets.parts import named
from qtarget.targets.stats import TokenStats
from qtarget.targets.trust.rule import Rule


@named("reference_probability")
@dataclass(frozen=True)
class ReferenceProbability(Rule):
    """The reference's probability of the label: γ = ref_y (PriFT, arXiv:2606.09396).

    >>> import torch
    >>> ReferenceProbability()(TokenStats({"reference_log_p_y": torch.tensor([0.5, 0.1]).log()}))
    tensor([0.5000, 0.1000])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"log_p_y", "reference_log_p_y"})

    def __call__(self, stats: TokenStats) -> Tensor:
        return stats.reference_log_p_y.exp()


@named("reference_lower_mass")
@dataclass(frozen=True)
class ReferenceLowerMass(Rule):
    """γ = 1[u ≥ threshold], u the reference's mass on the label and all less likely tokens (PriFT, arXiv:2606.09396).

    >>> import torch
    >>> ref = {"reference_log_p_y": torch.tensor([0.3, 0.1]).log(), "reference_lower_mass": torch.tensor([0.3, 0.1])}
    >>> ReferenceLowerMass()(TokenStats(ref))
    tensor([1., 0.])
    """

    can_be_zero: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"log_p_y", "reference_log_p_y", "reference_lower_mass"})

    threshold: float = 0.5

    def __post_init__(self):
        check_range("threshold", self.threshold, 0, 1)

    def __call__(self, stats: TokenStats) -> Tensor:
        mass = stats.reference_log_p_y.exp() + stats.reference_lower_mass
        return (mass >= self.threshold).to(mass.dtype)


@named("reference_threshold")
@dataclass(frozen=True)
class ReferenceThreshold(Rule):
    """γ = 1[1 / ref_y ≤ perplexity]: the tokens that the reference finds easy (STM, arXiv:2501.14315).

    >>> import torch
    >>> ReferenceThreshold(2.5)(TokenStats({"reference_log_p_y": torch.tensor([0.5, 0.1]).log()}))
    tensor([1., 0.])
    """

    can_be_zero: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"log_p_y", "reference_log_p_y"})

    perplexity: float = 2.5

    def __post_init__(self):
        check_range("perplexity", self.perplexity, 1)

    def __call__(self, stats: TokenStats) -> Tensor:
        return (-stats.reference_log_p_y <= math.log(self.perplexity)).to(stats.reference_log_p_y.dtype)


@named("gibbs")
@dataclass(frozen=True)
class Gibbs(Rule):
    """γ = G / (1 + G), G = prior_y (e^beta − 1) (GIFT, arXiv:2601.09233).

    With the prior as residual Q = softmax(log prior + beta · 1[y]), the prior with the label's logit raised by beta.
    ``prior`` is "reference" or "teacher"; beta → 0 gives the prior, a large beta SFT.

    >>> import torch
    >>> Gibbs(beta=math.log(3))(TokenStats({"reference_log_p_y": torch.tensor([0.5, 0.1]).log()}))
    tensor([0.5000, 0.1667])
    """

    beta: float = 20.0
    prior: str = "reference"

    def __post_init__(self):
        check_range("beta", self.beta, 0, open_low=True)
        if self.prior not in ("reference", "teacher"):
            raise unknown("prior", self.prior, ("reference", "teacher"))

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"log_p_y", f"{self.prior}_log_p_y"})

    def _log_odds(self, stats: TokenStats) -> Tensor:
        prior = stats.reference_log_p_y if self.prior == "reference" else stats.teacher_log_p_y
        return prior + self.beta + math.log(-math.expm1(-self.beta))

    def __call__(self, stats: TokenStats) -> Tensor:
        return self._log_odds(stats).sigmoid()

    def weights(self, stats: TokenStats) -> tuple[Tensor, Tensor]:
        odds = self._log_odds(stats)
        return odds.sigmoid(), (-odds).sigmoid()
