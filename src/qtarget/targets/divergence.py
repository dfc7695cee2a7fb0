"""Divergences: how the student is pulled toward a residual.

A residual R with weight b adds b D(R, p) to the loss. With d = log p − log R, and everything but p held constant, its
gradient on the logits is

    g = b · p ⊙ (s − E_p[s]),    s = score(d),    the derivative of D with respect to p, up to a constant

The constant has no gradient and is chosen so that score(0) = 0: where R is near p every score is small, and s − E_p[s]
keeps its digits. Forward KL, s = 1 − e^(−d), gives b (p − R). Your own is a function of d or a class like these.

Forward KL compares R with p over the head's full width. The others compare the two over the tokens that R covers: p is
renormalised there, so that the padded rows of a head get no gradient.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from qtarget.errors import ConfigError, check_range
from qtarget.targets.parts import KINDS, Kind, Part, named, part_from_config


class Divergence(Part, ABC):
    """Base of the divergences.

    Attributes:
        equation: D in one line.
        reach: the largest value of s_v − E_p[s] over all pairs (p, R); None: unbounded. Q = p (1 − b (s − E_p[s]))
            stays non-negative as long as b · reach ≤ 1.
        needs_full_support: whether D is infinite where R rules out what p does not.
    """

    known: ClassVar[dict[str, type[Divergence]]] = {}
    equation: ClassVar[str] = ""
    reach: ClassVar[float | None] = None
    needs_full_support: ClassVar[bool] = False

    @abstractmethod
    def score(self, d: Tensor) -> Tensor:
        """s of d = log p − log R, elementwise, with score(0) = 0."""

    @abstractmethod
    def value(self, p: Tensor, R: Tensor, d: Tensor) -> Tensor:
        """The terms of D(R, p) [n, V], whose sum over the vocabulary is reported. R may hold zeros, where d is +∞.

        Both sum to one, so any multiple of p − R may be in them: here the one that leaves each term of second order in a
        small d, so that the sum keeps its digits.
        """

    def times_p(self, p: Tensor, log_p: Tensor, d: Tensor) -> Tensor:
        """p · score(d), finite also where p vanishes and the score of its d does not stay finite."""
        return p * self.score(d)

    @property
    def is_forward_kl(self) -> bool:
        return isinstance(self, ForwardKL)

    def __str__(self) -> str:
        numbers = ", ".join(f"{key}={value}" for key, value in vars(self).items() if self.name)
        return f"{self.label}({numbers})" if numbers else self.label


def _where(R: Tensor, x: Tensor) -> Tensor:
    """R · x, and 0 where R is 0, however x ends there."""
    return torch.where(R > 0, R * x, torch.zeros_like(x))


def _difference(p: Tensor, R: Tensor, d: Tensor) -> Tensor:
    """p − R, with the digits of a small d."""
    return torch.where(d.abs() < 1, -p * torch.expm1(-d), p - R)


def _log_mixture(d: Tensor, share: float) -> Tensor:
    """log(p / m) of the mixture m = (1 − share) p + share · R."""
    near = -torch.log1p(share * torch.expm1(-d.clamp(min=-1)))  # keeps the digits of a small d
    far = -torch.logaddexp(torch.full_like(d, math.log1p(-share)), math.log(share) - d)  # finite however small p is
    return torch.where(d > -1, near, far)


@named("forward_kl")
@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(R ‖ p), distillation's (arXiv:1503.02531): p must cover all of R.

    >>> ForwardKL().score(torch.tensor([0.0, math.inf]))
    tensor([0., 1.])
    """

    equation: ClassVar[str] = "Σ R log(R/p)"
    reach: ClassVar[float | None] = 1.0

    def score(self, d: Tensor) -> Tensor:
        return -torch.expm1(-d)

    def value(self, p: Tensor, R: Tensor, d: Tensor) -> Tensor:
        return _where(R, -d)

    def times_p(self, p: Tensor, log_p: Tensor, d: Tensor) -> Tensor:
        return torch.where(d.abs() < 1, p * self.score(d), p - (log_p - d).exp())


@named("reverse_kl")
@dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(p ‖ R) (MiniLLM, arXiv:2306.08543): p avoids what R finds unlikely. R uniform: log V − H, an entropy bonus.

    >>> ReverseKL().score(torch.tensor([0.0, 2.0]))
    tensor([0., 2.])
    """

    equation: ClassVar[str] = "Σ p log(p/R)"
    needs_full_support: ClassVar[bool] = True

    def score(self, d: Tensor) -> Tensor:
        return d

    def value(self, p: Tensor, R: Tensor, d: Tensor) -> Tensor:
        return _where(p, d) - _difference(p, R, d)

    def times_p(self, p: Tensor, log_p: Tensor, d: Tensor) -> Tensor:
        return _where(p, d)


@named("jsd")
@dataclass(frozen=True)
class JSD(Divergence):
    """β KL(R ‖ m) + (1 − β) KL(p ‖ m), m = (1 − β) p + β R (GKD, arXiv:2306.13649): β as in TRL, Liger and ms-swift.

    The gradient vanishes as β → 0, while TRL treats β = 0 as full forward KL.

    >>> JSD(beta=0.5).score(torch.tensor([0.0, math.inf]))  # at most (1 − β)(−log(1 − β))
    tensor([0.0000, 0.3466])
    """

    equation: ClassVar[str] = "β KL(R ‖ m) + (1 − β) KL(p ‖ m), m = (1 − β) p + β R"

    beta: float = 0.5

    def __post_init__(self):
        check_range("beta", self.beta, 0, 1, open_low=True, open_high=True)

    def score(self, d: Tensor) -> Tensor:
        return (1 - self.beta) * _log_mixture(d, self.beta)

    def value(self, p: Tensor, R: Tensor, d: Tensor) -> Tensor:
        log_p_over_m = _log_mixture(d, self.beta)
        return (1 - self.beta) * _where(p, log_p_over_m) + self.beta * _where(R, log_p_over_m - d)

    @property
    def reach(self) -> float:  # type: ignore[override]
        return -(1 - self.beta) * math.log1p(-self.beta)


@named("skew_kl")
@dataclass(frozen=True)
class SkewKL(Divergence):
    """KL(R ‖ α R + (1 − α) p) (DistiLLM, arXiv:2402.03898).

    >>> SkewKL(alpha=0.5).score(torch.tensor([0.0, math.inf]))  # at most 1 − α
    tensor([0.0000, 0.5000])
    """

    equation: ClassVar[str] = "KL(R ‖ α R + (1 − α) p)"

    alpha: float = 0.1

    def __post_init__(self):
        check_range("alpha", self.alpha, 0, 1, open_low=True, open_high=True)

    def score(self, d: Tensor) -> Tensor:
        # (1 − α)² (e^d − 1)/(α + (1 − α) e^d), by e^(−|d|)
        e = torch.expm1(-d.abs())
        above, below = -e / (1 + self.alpha * e), e / (1 + (1 - self.alpha) * e)
        return (1 - self.alpha) ** 2 * torch.where(d >= 0, above, below)

    def value(self, p: Tensor, R: Tensor, d: Tensor) -> Tensor:
        return _where(R, _log_mixture(-d, 1 - self.alpha)) + (1 - self.alpha) * _difference(p, R, d)

    @property
    def reach(self) -> float:  # type: ignore[override]
        return 1 - self.alpha


@named("skew_reverse_kl")
@dataclass(frozen=True)
class SkewReverseKL(Divergence):
    """KL(p ‖ α p + (1 − α) R), the mixture differentiated as in the paper (DistiLLM, arXiv:2402.03898).

    >>> SkewReverseKL(alpha=0.5).score(torch.tensor([0.0, math.inf]))  # at most −log α − 1 + α
    tensor([0.0000, 0.1931])
    """

    equation: ClassVar[str] = "KL(p ‖ α p + (1 − α) R)"

    alpha: float = 0.1

    def __post_init__(self):
        check_range("alpha", self.alpha, 0, 1, open_low=True, open_high=True)

    def score(self, d: Tensor) -> Tensor:
        log_p_over_m = _log_mixture(d, 1 - self.alpha)
        return log_p_over_m - self.alpha * torch.expm1(log_p_over_m)

    def value(self, p: Tensor, R: Tensor, d: Tensor) -> Tensor:
        return _where(p, _log_mixture(d, 1 - self.alpha)) - (1 - self.alpha) * _difference(p, R, d)

    @property
    def reach(self) -> float:  # type: ignore[override]
        return -math.log(self.alpha)


@named("total_variation")
@dataclass(frozen=True)
class TotalVariation(Divergence):
    """½ Σ |p − R| (f-DISTILL, arXiv:2307.15190): a token's score depends on the sign of p − R only.

    >>> TotalVariation().score(torch.tensor([-3.0, 0.0, 0.1]))
    tensor([-0.5000,  0.0000,  0.5000])
    """

    equation: ClassVar[str] = "½ Σ |p − R|"
    reach: ClassVar[float | None] = 1.0

    def score(self, d: Tensor) -> Tensor:
        return 0.5 * d.sign()

    def value(self, p: Tensor, R: Tensor, d: Tensor) -> Tensor:
        return 0.5 * _difference(p, R, d).abs()


@named("alpha")
@dataclass(frozen=True)
class Alpha(Divergence):
    """(1 − Σ R^α p^(1 − α)) / (α (1 − α)) (ABKD with β = 1 − α, arXiv:2505.04560).

    α = 0 is reverse KL, 1 forward KL, ½ is 4 (1 − Σ √(R p)).

    >>> Alpha(alpha=0.5).score(torch.tensor([0.0, math.inf]))  # at most 1/α
    tensor([0., 2.])
    """

    equation: ClassVar[str] = "(1 − Σ R^α p^(1 − α)) / (α (1 − α))"

    alpha: float = 0.5

    def __post_init__(self):
        check_range("alpha", self.alpha, 0, 1)

    def score(self, d: Tensor) -> Tensor:
        return d if self.alpha == 0 else -torch.expm1(-self.alpha * d) / self.alpha

    def times_p(self, p: Tensor, log_p: Tensor, d: Tensor) -> Tensor:
        if self.alpha == 0:
            return _where(p, d)
        far = (p - (log_p - self.alpha * d).exp()) / self.alpha
        return torch.where(d.abs() < 1, p * self.score(d), far)

    def value(self, p: Tensor, R: Tensor, d: Tensor) -> Tensor:
        if self.alpha == 0:
            return _where(p, d) - _difference(p, R, d)
        if self.alpha == 1:
            return _where(R, -d) + _difference(p, R, d)
        near = p * (self.alpha * torch.expm1(-d) - torch.expm1(-self.alpha * d))
        far = (1 - self.alpha) * p + self.alpha * R - _where(R, ((1 - self.alpha) * d).exp())
        return torch.where(d.abs() < 1, near, far) / (self.alpha * (1 - self.alpha))

    @property
    def reach(self) -> float | None:  # type: ignore[override]
        return 1 / self.alpha if self.alpha > 0 else None

    @property
    def needs_full_support(self) -> bool:  # type: ignore[override]
        return self.alpha == 0


@named("todi")
@dataclass(frozen=True)
class ToDi(Divergence):
    """w R log(R/p) + (1 − w) p log(p/R) per token, w = σ(slope · log(R/p)) held constant (ToDi, arXiv:2505.16297).

    This is closer to forward KL where p is below R, and closer to reverse KL where it is above.

    >>> ToDi().score(torch.tensor([0.0, 1.0]))
    tensor([0.0000, 1.3632])
    """

    equation: ClassVar[str] = "Σ w R log(R/p) + (1 − w) p log(p/R), w = σ(slope log(R/p))"
    needs_full_support: ClassVar[bool] = True

    slope: float = 1.0

    def __post_init__(self):
        check_range("slope", self.slope, 0)

    def score(self, d: Tensor) -> Tensor:
        w = torch.sigmoid(-self.slope * d)
        return -w * torch.expm1(-d) + (1 - w) * d + torch.tanh(0.5 * self.slope * d)  # 1 − 2w

    def times_p(self, p: Tensor, log_p: Tensor, d: Tensor) -> Tensor:
        w = torch.sigmoid(-self.slope * d)
        far = w * (p - (log_p - d).exp()) + (1 - w) * _where(p, d) + torch.tanh(self.slope * d / 2) * p
        return torch.where(d.abs() < 1, p * self.score(d), far)

    def value(self, p: Tensor, R: Tensor, d: Tensor) -> Tensor:
        w = torch.sigmoid(-self.slope * d)
        return _where(R, -w * d) + _where(p, (1 - w) * d)


@dataclass(frozen=True)
class FunctionDivergence(Divergence):
    """Your own function of d, as a divergence.

    The function may have an attribute ``value``, a function of (p, R, d) like those here. Without one, the mean score
    E_p[s] is reported, which is 0 at R = p.
    """

    function: Callable[[Tensor], Tensor]
    path: str | None = field(default=None, compare=False)

    def __post_init__(self):
        at = self.function(torch.tensor([0.0, 1.0], dtype=torch.float64))
        if not isinstance(at, Tensor) or at.shape != (2,) or not bool(torch.isfinite(at).all()):
            raise ConfigError(f"divergence {self.label} gave {at!r} for d = [0, 1]; return one finite number per d")
        if abs(float(at[0])) > 1e-12:
            raise ConfigError(
                f"divergence {self.label} gives {float(at[0]):g} at d = 0, where student and residual agree; "
                "subtract that number, so that it gives 0"
            )

    @property
    def label(self) -> str:
        return self.path or str(getattr(self.function, "__name__", "function"))

    def score(self, d: Tensor) -> Tensor:
        return self.function(d)

    def value(self, p: Tensor, R: Tensor, d: Tensor) -> Tensor:
        own = getattr(self.function, "value", None)
        return self.times_p(p, p.log(), d) if own is None else own(p, R, d)

    @property
    def needs_full_support(self) -> bool:  # type: ignore[override]
        return not bool(torch.isfinite(self.function(torch.tensor([math.inf], dtype=torch.float64))).all())


FORWARD_KL = ForwardKL()


def as_divergence(value: object) -> Divergence:
    """A divergence from what a user may write: one, its class, its name, ``{name: {parameter: value}}``, a function of d.

    Raises:
        ConfigError: it is none of these, or a parameter is out of its range.

    >>> as_divergence({"jsd": {"beta": 0.1}})
    JSD(beta=0.1)
    """
    if isinstance(value, (str, Mapping)):
        return part_from_config(value, Divergence, "divergence")
    made: Any = value() if isinstance(value, type) and issubclass(value, Divergence) else value
    if callable(made) and not isinstance(made, Divergence):
        made = FunctionDivergence(made)
    if not isinstance(made, Divergence):
        raise ConfigError(
            f"divergence is {value!r}; use one of {', '.join(sorted(Divergence.known))}, or a function of log p − log R"
        )
    return made


KINDS[Divergence] = Kind(as_divergence, FunctionDivergence)

forward_kl = ForwardKL
reverse_kl = ReverseKL
jsd = JSD
skew_kl = SkewKL
skew_reverse_kl = SkewReverseKL
total_variation = TotalVariation
alpha = Alpha
todi = ToDi
