"""What a trust rule can see of a token: statistics, never the whole vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

# Statistic → the input a user has to supply for it (None: the student's logits are enough).
STATISTICS: dict[str, str | None] = {
    "log_p_y": None,  # log-probability of the label
    "rest_mass": None,  # 1 − p_y, without cancellation where p_y is near 1
    "entropy": None,  # of the student, in nats
    "top_k_entropy": None,  # of the renormalised top k; a method: stats.top_k_entropy(k)
    "top_k_mass": None,  # probability of the k likeliest tokens together; a method: stats.top_k_mass(k)
    "sum_sq": None,  # Σ_v p_v²
    "rank": None,  # 1 + the number of tokens likelier than the label; ties do not count
    "lower_mass": None,  # Σ p_v over the tokens less likely than the label; ties do not count
    "offset_mass": None,  # Σ_v q_v w_v of a residual with an elementwise offset (GEM's logsigmoid form)
    "teacher_log_p_y": "teacher",
    "teacher_entropy": "teacher",  # in nats
    "reference_log_p_y": "reference",
    "reference_lower_mass": "reference",  # lower_mass of the reference's own probabilities
    "kl_reference": "reference",  # KL(p ‖ reference) in nats, p renormalised over the tokens it covers; may be +∞
    "old_logps": "old_policy",
    "weight": "weight",
    "critical": "critical",
}
# Statistics that take a number, stats.name(k).
OF_TOP_K = ("top_k_entropy", "top_k_mass")


class TokenStats:
    """Statistics of n supervised tokens, one tensor [n] each, float32 or float64, without a graph.

    A rule reads them as attributes (``stats.log_p_y``; ``stats.top_k_entropy(20)``) and may read only those it
    declares in ``needs``; nothing else is computed.

    Args:
        values: the statistics by name, [n] each.
        top_k: gives the log-probabilities of the k likeliest tokens, [n, k], the likeliest first.
        needs: what the rule declares; None: everything.

    >>> stats = TokenStats({}, top_k=lambda k: torch.tensor([[0.5, 0.25, 0.125]]).log()[:, :k])
    >>> stats.top_k_mass(2), stats.top_k_entropy(2)
    (tensor([0.7500]), tensor([0.6365]))
    """

    def __init__(
        self,
        values: Mapping[str, Tensor],
        top_k: Callable[[int], Tensor] | None = None,
        needs: Iterable[str] | None = None,
    ):
        self._values = values
        self._top_k = top_k
        self._needs = None if needs is None else frozenset(needs)

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("_"):
            raise AttributeError(name)
        declared = self._needs is None or name in self._needs or name == "log_p_y"
        if declared and name in self._values:
            return self._values[name]
        if name in STATISTICS:
            raise _undeclared(name)
        raise AttributeError(f"stats has no {name!r}; it has {', '.join(STATISTICS)}")

    def top_k_entropy(self, k: int) -> Tensor:
        """Entropy in nats of the k largest probabilities, renormalised to sum to 1: [n]."""
        log_p = self._largest("top_k_entropy", k)
        gap = log_p.narrow(1, 1, log_p.shape[1] - 1) - log_p.narrow(1, 0, 1)
        # Σ exp(gap) is 1 for the likeliest and the rest: log1p keeps the digits of an entropy near 0.
        share = gap.exp()
        rest = share.sum(1)
        return torch.addcdiv(rest.log1p(), (gap * share).sum(1), 1 + rest, value=-1)

    def top_k_mass(self, k: int) -> Tensor:
        """The probability of the k likeliest tokens together: [n]."""
        return self._largest("top_k_mass", k).exp().sum(1)

    def _largest(self, name: str, k: int) -> Tensor:
        if self._top_k is None or not (self._needs is None or name in self._needs):
            raise _undeclared(name)
        return self._top_k(k)


def _undeclared(name: str) -> AttributeError:
    return AttributeError(f"the rule reads stats.{name} without declaring it; add {name!r} to the rule's needs")
