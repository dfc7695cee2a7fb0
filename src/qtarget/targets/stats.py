"""What a trust rule may see of a token: statistics, never the vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

# Statistic → the input a user has to supply for it (None: the student's logits are enough).
STATISTICS: dict[str, str | None] = {
    "log_p_y": None,  # log-probability of the label
    "rest_mass": None,  # 1 − p_y, without cancellation where p_y is near 1
    "entropy": None,  # of the student, in nats
    "top_k_entropy": None,  # of the renormalised top k; a method: stats.top_k_entropy(k)
    "offset_mass": None,  # Σ_v q_v w_v of a residual with an elementwise offset (GEM's logsigmoid form)
    "teacher_log_p_y": "teacher",
    "reference_log_p_y": "reference",
    "old_logps": "old_policy",
    "weight": "weight",
    "critical": "critical",
}


class TokenStats:
    """Statistics of n supervised tokens, one tensor [n] each, float32 or float64, without a graph.

    A rule reads them as attributes (``stats.log_p_y``; ``stats.top_k_entropy(20)``) and may read only those it
    declares in ``needs``; nothing else is computed.
    """

    def __init__(
        self,
        values: Mapping[str, Tensor],
        top_k_entropy: Callable[[int], Tensor] | None = None,
        needs: Iterable[str] | None = None,
    ):
        self._values = values
        self._top_k_entropy = top_k_entropy
        self._needs = None if needs is None else frozenset(needs)

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("_"):
            raise AttributeError(name)
        declared = self._needs is None or name in self._needs or name == "log_p_y"
        if declared and name in self._values:
            return self._values[name]
        if name in STATISTICS:
            raise AttributeError(f"the rule reads stats.{name} without declaring it; add {name!r} to the rule's needs")
        raise AttributeError(f"stats has no {name!r}; it has {', '.join(STATISTICS)}")

    def top_k_entropy(self, k: int) -> Tensor:
        """Entropy in nats of the k largest probabilities, renormalised to sum to 1: [n]."""
        declared = self._needs is None or "top_k_entropy" in self._needs
        if self._top_k_entropy is None or not declared:
            raise AttributeError(
                "the rule reads stats.top_k_entropy without declaring it; add 'top_k_entropy' to the rule's needs"
            )
        return self._top_k_entropy(k)
