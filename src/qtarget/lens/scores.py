"""Scores of divergences on a record's entries, and bounds on what they sum to in a tail.

Σ p score(log p − log R) over a tail of the masses P and T lies between −c T and P score(d), with d the most that
log p − log R can be there and c the most of −x score(log x) over x ≤ 1: the score has the sign of d, and rises with it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from qtarget.targets.divergence import Divergence

_WIDEST = 64.0  # nats: a probability of e^−64 counts for nothing
_STEPS = 64  # of the table, in a nat


def times_p(divergence: Divergence, log_p: np.ndarray, log_R: np.ndarray) -> np.ndarray:
    """p · score(log p − log R), float64; 0 where p and R are."""
    there = log_p > -np.inf
    log_student = torch.from_numpy(np.where(there, log_p, 0.0))
    d = log_student - torch.from_numpy(np.where(there, log_R, 0.0))
    p = log_student.exp() * torch.from_numpy(there)
    pulled = divergence.times_p(p, log_student, d)
    return torch.where(p > 0, pulled, pulled.nan_to_num()).numpy() * there


def highest(divergence: Divergence, most_d: np.ndarray | float = math.inf) -> np.ndarray:
    """The most that the score can be where log p − log R is at most ``most_d``; ∞ without a bound."""
    score = divergence.score(torch.as_tensor(most_d, dtype=torch.float64)).numpy()
    return np.maximum(np.nan_to_num(score, nan=np.inf, posinf=np.inf), 0.0)


def deepest(divergence: Divergence) -> float:
    """c: Σ p score is at least −c times the tail's mass of R."""
    between = math.exp(1 / _STEPS)  # by which x may exceed that of the last step
    return max(0.0, -between * float(_table(divergence)[: int(_WIDEST * _STEPS)].min()))


def tabulated(divergence: Divergence) -> dict[str, Any]:
    """What a page needs of a divergence that it does not know: p · score over max(p, R), for log p − log R from −reach to
    reach in even steps, and the score's bound, or None.
    """
    bound = float(highest(divergence))
    return {"table": _table(divergence), "reach": _WIDEST, "highest": bound if math.isfinite(bound) else None}


def _table(divergence: Divergence) -> np.ndarray:
    d = np.linspace(-_WIDEST, _WIDEST, int(2 * _WIDEST * _STEPS) + 1)
    return times_p(divergence, np.minimum(d, 0.0), np.minimum(-d, 0.0))
