"""Which learning rate an arm gets: the best on the dev seeds, tried further where the best one is at an edge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

LADDER = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


def best(scores: Mapping[float, Sequence[float]]) -> float:
    """The rate with the highest mean score over dev seeds; of equal ones the lowest.

    Args:
        scores: {rate: avg@n on dev problems, one a dev seed}.

    >>> best({1e-3: [0.5, 0.7], 3e-4: [0.6, 0.6]})
    0.0003
    """
    return max(scores, key=lambda rate: (sum(scores[rate]) / len(scores[rate]), -rate))


def next_of(scores: Mapping[float, Sequence[float]]) -> float | None:
    """The rate to try next, beside the best one where that is at an edge of those tried; None where there is none.

    >>> next_of({1e-3: [0.1], 3e-3: [0.3], 1e-2: [0.4]})
    0.03
    >>> next_of({1e-3: [0.1], 3e-3: [0.3], 1e-2: [0.2]}) is None
    True
    """
    found, tried = best(scores), sorted(scores)
    at = LADDER.index(found)
    if found == tried[-1] and at + 1 < len(LADDER):
        return LADDER[at + 1]
    if found == tried[0] and at > 0:
        return LADDER[at - 1]
    return None
