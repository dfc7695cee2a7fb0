"""Trust rules: how much of the target goes to the observed token.

A rule is a small frozen value. It reads per-token statistics (``TokenStats``, one tensor [n] each) and returns γ [n]; the
caller treats it as a constant, so nothing here detaches. A rule of your own is a class like these, or a plain function of
the statistics decorated with ``needs``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from qtarget.errors import ConfigError, check_range, unknown
from qtarget.targets.parts import Part, named
from qtarget.targets.stats import STATISTICS, TokenStats


class Rule(Part):
    """Base of the trust rules.

    ``weights`` gives the two numbers the loss works with: a, the weight of the label, and the weight of the residual.
    For most rules they are γ and 1 − γ.
    """

    known: ClassVar[dict[str, type[Rule]]] = {}
    needs: ClassVar[frozenset[str]] = frozenset({"log_p_y"})
    can_be_zero: ClassVar[bool] = False  # some tokens may get a weight of exactly 0

    def __call__(self, stats: TokenStats) -> Tensor:
        """γ, the trust in the observed token: [n]."""
        raise NotImplementedError

    def weights(self, stats: TokenStats) -> tuple[Tensor, Tensor]:
        """(a, b): the label's weight and the residual's, [n] each."""
        gamma = self(stats)
        return gamma, 1 - gamma

    def label_loss(self, stats: TokenStats) -> Tensor:
        """The published value of the label's part of the loss, [n]; its gradient is a(p − δ)."""
        return -self.weights(stats)[0] * stats.log_p_y

    @property
    def fixed_rest(self) -> float | None:
        """The residual's weight where it is the same for every token, else None."""
        return None


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

    alpha = 0 is SFT, alpha = 1 has DFT's gradient, a negative alpha trusts rare labels above 1.

    >>> ProbabilityPower(alpha=2.0)(TokenStats({"log_p_y": torch.tensor([0.5, 0.1]).log()}))
    tensor([0.2500, 0.0100])
    """

    alpha: float = 1.0

    def __post_init__(self):
        check_range("alpha", self.alpha)

    def __call__(self, stats: TokenStats) -> Tensor:
        return (self.alpha * stats.log_p_y).exp()

    def label_loss(self, stats: TokenStats) -> Tensor:
        if self.alpha == 0:
            return -stats.log_p_y
        return -torch.expm1(self.alpha * stats.log_p_y) / self.alpha


@named("probability_threshold")
@dataclass(frozen=True)
class ProbabilityThreshold(Rule):
    """Train or drop by the label's probability: γ = 1[p_y ≥ tau] (ProFiT, arXiv:2601.09195).

    direction "higher" keeps p_y >= tau, "lower" keeps p_y < tau, "middle" keeps tau_low <= p_y < tau_high.

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
            keep = p_y < self.tau
        else:
            assert self.tau_low is not None and self.tau_high is not None  # checked when built
            keep = (p_y >= self.tau_low) & (p_y < self.tau_high)
        return keep.to(p_y.dtype)


@named("entropy")
@dataclass(frozen=True)
class Entropy(Rule):
    """γ = (H_k / normalizer)^power, H_k the entropy of the renormalised top k (EAFT, arXiv:2601.02151).

    normalizer is "log_k" (the paper), a number (LLaMA-Factory uses 3.0) or "none" (axolotl; γ then reaches log k).

    >>> undecided = TokenStats({}, top_k=lambda k: torch.full((1, k), -math.log(2 * k)))
    >>> Entropy(top_k=5)(undecided)
    tensor([1.])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"log_p_y", "top_k_entropy"})

    top_k: int = 20
    power: float = 1.0
    normalizer: str | float = "log_k"

    def __post_init__(self):
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 2:
            raise ConfigError(
                f"top_k is {self.top_k!r}; use a whole number from 2 (the paper uses 20): one token has no entropy"
            )
        check_range("power", self.power, 0, open_low=True)
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


@named("anchored")
@dataclass(frozen=True)
class Anchored(Rule):
    """The label keeps the weight of ``trust`` and the residual gets a fixed weight beside it.

    a = trust, b = kl_weight, so γ = trust / (trust + kl_weight): SFT + KL (trust 1) and ASFT (trust p_y,
    arXiv:2509.23753). A negative weight pushes away from the residual: GEM (arXiv:2408.16673) is 1 and −1.

    >>> Anchored(Constant(1.0), kl_weight=0.1).weights(TokenStats({"log_p_y": torch.zeros(2)}))
    (tensor([1., 1.]), tensor([0.1000, 0.1000]))
    """

    trust: Rule = Constant()
    kl_weight: float = 0.05

    def __post_init__(self):
        check_range("kl_weight", self.kl_weight)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return self.trust.needs

    def __call__(self, stats: TokenStats) -> Tensor:
        a = self.trust(stats)
        return a / (a + self.kl_weight)

    def weights(self, stats: TokenStats) -> tuple[Tensor, Tensor]:
        a = self.trust.weights(stats)[0]
        return a, torch.full_like(a, self.kl_weight)

    def label_loss(self, stats: TokenStats) -> Tensor:
        return self.trust.label_loss(stats)

    @property
    def fixed_rest(self) -> float | None:
        return self.kl_weight


@named("offset_mass")
@dataclass(frozen=True)
class OffsetMass(Rule):
    """A scale, not a trust: the mass Σ_v q_v w_v of a residual with an elementwise offset (GEM's logsigmoid form).

    >>> OffsetMass()(TokenStats({"offset_mass": torch.tensor([0.5])}))
    tensor([0.5000])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"log_p_y", "offset_mass"})

    def __call__(self, stats: TokenStats) -> Tensor:
        return stats.offset_mass


@dataclass(frozen=True)
class FunctionRule(Rule):
    """A user's function of the statistics, as a rule."""

    can_be_zero: ClassVar[bool] = True

    function: Callable[[TokenStats], Tensor]
    path: str | None = field(default=None, compare=False)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset(getattr(self.function, "needs", frozenset())) | {"log_p_y"}

    @property
    def label(self) -> str:
        return self.path or str(getattr(self.function, "__name__", "function"))

    def __call__(self, stats: TokenStats) -> Tensor:
        gamma = self.function(stats)
        return gamma.to(stats.log_p_y.dtype) if isinstance(gamma, Tensor) else gamma  # a mask is a rule, too


def needs(*statistics: str):
    """Declare what a trust function of your own reads.

    >>> @needs("entropy")
    ... def doubt(stats):
    ...     return (-stats.entropy).exp()
    """
    for name in statistics:
        if name not in STATISTICS:
            raise unknown("needs", name, STATISTICS)

    def mark(function):
        function.needs = frozenset(statistics)
        return function

    return mark


def as_rule(value: object, field: str = "trust") -> Rule:
    """A rule from what a user may write: a rule, a number, or a function of the statistics."""
    if isinstance(value, Rule):
        return value
    if isinstance(value, type) and issubclass(value, Rule):
        return value()
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return Constant(check_range(field, value))
    if callable(value):
        return FunctionRule(value)
    raise ConfigError(f"{field} is {value!r}; use one of {', '.join(sorted(Rule.known))}, a number or a function")


constant = Constant
probability = Probability
probability_power = ProbabilityPower
probability_threshold = ProbabilityThreshold
entropy = Entropy
trajectory_weight = TrajectoryWeight
token_mask = TokenMask
clipped_ratio = ClippedRatio
anchored = Anchored
offset_mass = OffsetMass
