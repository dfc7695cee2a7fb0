"""What a trust rule is."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from qtarget.errors import ConfigError
from qtarget.targets.parts import Part
from qtarget.targets.stats import TokenStats


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
        raise ConfigError(f"trust rule {self.label} gives no γ; define __call__(stats), which returns it, [n]")

    def weights(self, stats: TokenStats) -> tuple[Tensor, Tensor]:
        """(a, b): the label's weight and the residual's, [n] each."""
        gamma = self(stats)
        return gamma, 1 - gamma

    def label_loss(self, stats: TokenStats) -> Tensor:
        """The published value of the label's part of the loss, [n]; its gradient is a(p − δ)."""
        return held_constant(self.weights(stats)[0], stats)

    @property
    def fixed_rest(self) -> float | None:
        """The residual's weight where it is the same for every token, else None."""
        return None


def held_constant(a: Tensor, stats: TokenStats) -> Tensor:
    """−sg(a) log p_y: the loss of a label whose weight is held constant."""
    return -a * stats.log_p_y
