"""Rules made from another rule, and your own rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from qtarget.errors import ConfigError, check_range, unknown
from qtarget.targets.parts import KINDS, Kind, named
from qtarget.targets.stats import STATISTICS, TokenStats
from qtarget.targets.trust.label import Constant
from qtarget.targets.trust.rule import Rule


@named("anchored")
@dataclass(frozen=True)
class Anchored(Rule):
    """The label keeps the weight of ``trust``, and the residual gets a fixed weight in addition.

    a = trust, b = kl_weight, so γ = trust / (trust + kl_weight): SFT + KL (trust 1) and ASFT (trust p_y,
    arXiv:2509.23753). A negative weight pushes away from the residual: GEM (arXiv:2408.16673) is 1 and −1.

    >>> Anchored(Constant(1.0), kl_weight=0.1).weights(TokenStats({"log_p_y": torch.zeros(2)}))
    (tensor([1., 1.]), tensor([0.1000, 0.1000]))
    """

    trust: Rule = Constant()  # noqa: RUF009
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
    """Declare which statistics your own trust function reads.

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


KINDS[Rule] = Kind(as_rule, FunctionRule)
