"""Statistics over the whole vocabulary, from a record that keeps only the likeliest tokens.

Where tails take part, the middle of what is possible is shown, and a note says how far off it may be: a rule may make
anything of a statistic, so that its error cannot be told.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from qtarget.lens.replay import Replay

# A mean error from which a statistic is noted: a probability, or nats.
_NOTED = 0.01

# The value, and at most how far off it is: [tokens] each.
Bounded = tuple[np.ndarray, np.ndarray]


def of_tokens(replay: Replay, needs: Collection[str], notes: list[str]) -> dict[str, np.ndarray]:
    """Those among ``needs`` that the record can tell of, [tokens] each; what is not known goes into ``notes``."""
    values = {}
    if "rank" in needs:
        values["rank"] = replay.record.numbers("rank") + 1
    for name, (function, model) in _BOUNDED.items():
        if name in needs and model in replay.logps:
            values[name], error = function(replay, model)
            if error.mean() > _NOTED:
                notes.append(
                    f"{name} may be off by {error.mean():.2g} on average, because the tails are not known exactly; "
                    "capture with a larger --top_k"
                )
    if "kl_reference" in needs and "reference" in replay.logps:
        values["kl_reference"] = _kl(replay, "reference")
        notes.append("kl_reference is at least what is shown: each tail counts as one token")
    return values


def _sum_sq(replay: Replay, model: str) -> Bounded:
    tail, cap = replay.tail[model], np.exp(replay.floor[model])
    low, high = tail**2 / np.maximum(replay.outside, 1), tail * np.minimum(cap, tail)
    return np.exp(2 * replay.logps[model]).sum(1) + (low + high) / 2, np.maximum(high - low, 0) / 2


def _lower_mass(replay: Replay, model: str) -> Bounded:
    """Of the tokens outside, all are less likely than a label that is among the likeliest."""
    label = replay.log_p_y if model == "student" else replay.record.numbers(f"{model}_log_p_y")
    logps, tail = replay.logps[model], replay.tail[model]
    below = np.where((logps < label[:, None]) & ~replay.is_label, np.exp(logps), 0.0).sum(1)
    known = label >= replay.floor[model]
    return below + np.where(known, tail, tail / 2), np.where(known, 0.0, tail / 2)


def _entropy(replay: Replay, model: str) -> Bounded:
    """A tail has most of it spread evenly, and least where as few tokens as may be hold it."""
    logps, tail = replay.logps[model], replay.tail[model]
    inside = -np.where(replay.there, np.exp(logps) * np.where(replay.there, logps, 0.0), 0.0).sum(1)
    some = np.where(tail > 0, tail, 1.0)
    high = tail * (np.log(np.maximum(replay.outside, 1)) - np.log(some))
    low = np.minimum(tail * -np.minimum(replay.floor[model], np.log(some)), high)
    return inside + (low + high) / 2, (high - low) / 2


def _kl(replay: Replay, model: str) -> np.ndarray:
    """KL(p ‖ model), a lower bound by the log-sum inequality."""
    p = np.column_stack([np.where(replay.there, replay.p, 0.0), replay.tail["student"]])
    other = np.column_stack([np.exp(np.where(replay.there, replay.logps[model], 0.0)), replay.tail[model]])
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(p > 0, p * np.log(p / other), 0.0).sum(1)


_BOUNDED = {
    "sum_sq": (_sum_sq, "student"),
    "lower_mass": (_lower_mass, "student"),
    "reference_lower_mass": (_lower_mass, "reference"),
    "teacher_entropy": (_entropy, "teacher"),
}
