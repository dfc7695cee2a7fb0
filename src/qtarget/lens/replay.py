"""Applies any target to a record, without a model, and bounds the error of missing tails.

A record keeps every model's log-probabilities at the ids of a token and the mass outside them. What a target does there
is computed as written; a residual's share of the tail is bounded from that mass, from the largest probability that can
be in it, and from the number of tokens outside. The middle of the bounds is shown, the distance to them is the error.

Under another divergence than forward KL the tail counts as one token, which is exact where it has the student's shape.
The score may have no bound, as reverse KL's: then the error is ∞, unless the whole vocabulary was captured.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import numpy as np
import torch

from qtarget.errors import ConfigError
from qtarget.lens import token_statistics
from qtarget.lens.record import OTHERS, Record
from qtarget.lens.scores import deepest, highest, times_p
from qtarget.targets import Target, TokenStats
from qtarget.targets.residual import Pool, Residual, Term

# A mean error of the update or of Q from which a figure is called unreliable: five percent of probability.
UNRELIABLE = 0.05
# Without a captured column: the weight of a plain row, every token critical, an old policy refreshed just now (r = 1).
_WITHOUT_COLUMN = {"weight": "1", "critical": "1", "old_logps": "the student's own, so r = 1"}
_NO_BOUND = (
    "the residual's tail is assumed to have the student's shape; the error of that has no bound, because the score "
    "has none"
)


@dataclass
class ReplayedTarget:
    """What a target does to each token of a record: arrays [tokens], float64, unless said otherwise.

    Attributes:
        trust: a, the label's weight. residual_mass: Σ b. update: ½‖p − Q‖₁.
        update_error: the update is off by at most this, for what is not known of the tails.
        q: [tokens, ids] the induced target Q = p − g at the record's ids. q_tail: its mass outside them.
        q_error: total variation between Q and the true target, both with the tail as one entry, is at most this.
        off_simplex: booleans, Q has a negative entry among the ids.
        residual: [tokens, ids] the residuals' own mixture Σ b R / Σ b, NaN where there is none. residual_tail: outside.
        notes: what was assumed, and where k is too small.
    """

    trust: np.ndarray
    residual_mass: np.ndarray
    update: np.ndarray
    update_error: np.ndarray
    q: np.ndarray
    q_tail: np.ndarray
    q_error: np.ndarray
    off_simplex: np.ndarray
    residual: np.ndarray
    residual_tail: np.ndarray
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Summary:
    """A target over a whole record, means over tokens.

    update_vs_sft: its update over plain SFT's. carries_90: share of tokens that carry 90 % of the update.
    """

    trust: float
    residual_mass: float
    update: float
    update_vs_sft: float
    carries_90: float
    off_simplex: float
    update_error: float
    q_error: float

    @property
    def error(self) -> float:
        """The larger of both errors; ∞ where there is no bound."""
        return max(self.update_error, self.q_error)

    @property
    def reliable(self) -> bool:
        return self.error <= UNRELIABLE

    @property
    def k_is_too_small(self) -> bool:
        return UNRELIABLE < self.error < np.inf


@dataclass(frozen=True)
class _Pull:
    """What a residual of weight 1 does to each token.

    R, g: [tokens, ids], the residual and its gradient on the logits; R_tail, g_tail: outside the ids. error: g is off by
    at most this in total variation. most: the most that |g| can sum to outside.
    """

    R: np.ndarray
    R_tail: np.ndarray
    g: np.ndarray
    g_tail: np.ndarray
    error: np.ndarray
    most: np.ndarray


class Replay:
    """Replays targets on a record.

    Args:
        record: see ``record.read``.
    """

    def __init__(self, record: Record):
        self.record = record
        self.ids = record.padded("ids", -1)
        self.there = self.ids >= 0
        self.logps = {name: record.padded(name, -np.inf) for name in ("student", *record.others)}
        self.tail = {name: np.exp(record.numbers(f"{name}_tail")) for name in self.logps}
        self.floor = {name: record.numbers(f"{name}_floor") for name in self.logps}
        self.outside = record.vocab_size - self.there.sum(1).astype(np.float64)
        self.log_p_y = record.numbers("log_p_y")
        self.p = np.exp(self.logps["student"])
        self.is_label = self.ids == np.asarray(record.tokens["label"])[:, None]

    def figures(self, target: Target) -> ReplayedTarget:
        """What the target teaches each token.

        Raises:
            ConfigError: it needs a model that was not captured.
        """
        notes: list[str] = []
        a, b, unsure = self.weights(target, notes)
        pulls = [self._pull(term, notes) for term in target.residual_terms]
        p, p_tail = self.p, self.tail["student"]
        mass = sum(b, np.zeros_like(a))
        q, q_tail = a[:, None] * self.is_label + (1 - a)[:, None] * p, (1 - a) * p_tail
        q_error = unsure * (np.abs(a) + sum(np.abs(weight) for weight in b)) if b else unsure
        mixed, mixed_tail = np.zeros_like(q), np.zeros_like(a)
        most = np.abs(a) * p_tail
        for weight, pull in zip(b, pulls, strict=True):
            q, q_tail = q - weight[:, None] * pull.g, q_tail - weight * pull.g_tail
            mixed, mixed_tail = mixed + weight[:, None] * pull.R, mixed_tail + weight * pull.R_tail
            q_error = q_error + _times(np.abs(weight), pull.error)
            most = most + _times(np.abs(weight), pull.most)
        q = np.where(self.there, q, 0.0)
        tail = np.abs(p_tail - q_tail)
        # With no residual of its own every tail entry moves the same way, and the sum of moves is the move of the sum.
        unknown = np.maximum(most - tail, 0.0) / 2 if pulls else np.zeros_like(a)
        with np.errstate(invalid="ignore", divide="ignore"):
            residual = np.where(mass[:, None] != 0, mixed / mass[:, None], np.nan)
            residual_tail = np.where(mass != 0, mixed_tail / mass, np.nan)
        return ReplayedTarget(
            trust=a,
            residual_mass=mass,
            update=(np.abs(np.where(self.there, p - q, 0.0)).sum(1) + tail) / 2,
            update_error=unknown + q_error,
            q=q,
            q_tail=q_tail,
            q_error=q_error,
            off_simplex=((q < -1e-6) & self.there).any(1) | (q_tail < -1e-6),
            residual=residual,
            residual_tail=residual_tail,
            notes=notes,
        )

    def summary(self, figures: ReplayedTarget) -> Summary:
        """The target over all tokens."""
        update, sft = figures.update.mean(), -np.expm1(self.log_p_y).mean()
        ordered = np.sort(figures.update)[::-1].cumsum()
        carriers = int(np.searchsorted(ordered, 0.9 * ordered[-1]) + 1) if ordered[-1] > 0 else 0
        share = update / sft if sft > 0 else np.nan
        return Summary(
            trust=float(figures.trust.mean()),
            residual_mass=float(figures.residual_mass.mean()),
            update=float(update),
            update_vs_sft=float(share),
            carries_90=carriers / len(figures.update),
            off_simplex=float(figures.off_simplex.mean()),
            update_error=float(figures.update_error.mean()),
            q_error=float(figures.q_error.mean()),
        )

    # -- weights -------------------------------------------------------------------------------------------------

    def weights(self, target: Target, notes: list[str]) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
        """(a, [b_j], by what share of themselves they are unsure), [tokens] each; what was assumed goes into ``notes``.

        Raises:
            ConfigError: as ``figures``.
        """
        for name in OTHERS:
            if name in target.requires and name not in self.logps:
                raise ConfigError(
                    f"target {target} needs a {name}, which this capture does not have; capture again with "
                    f"{name}_model_name_or_path"
                )
        values = {
            "log_p_y": self.log_p_y,
            "rest_mass": -np.expm1(self.log_p_y),
            "entropy": self.record.numbers("entropy"),
        }
        for name in self.record.others:
            values[f"{name}_log_p_y"] = self.record.numbers(f"{name}_log_p_y")
        values |= token_statistics.of_tokens(self, target.needs, notes)
        for name, taken in _WITHOUT_COLUMN.items():
            if name in self.record.signals:
                values[name] = self.record.numbers(name)
            elif name in target.needs:
                values[name] = self.log_p_y if name == "old_logps" else np.ones_like(self.log_p_y)
                notes.append(f"column {name} was not captured and is assumed to be {taken}")
        unsure = np.zeros_like(self.log_p_y)
        if "offset_mass" in target.needs:
            values["offset_mass"], unsure = self._offset_mass(target.residual_terms[0].pool)
            unsure = unsure / values["offset_mass"]

        def top_k(k: int) -> torch.Tensor:
            kept = self.record.manifest["top_k"]
            if k > kept:
                notes.append(
                    f"top_k is {k}, but only the {kept} likeliest tokens were captured; capture with --top_k {k}"
                )
            return torch.from_numpy(-np.sort(-self.logps["student"], axis=1)[:, : min(k, kept)])

        stats = TokenStats({name: torch.from_numpy(v) for name, v in values.items()}, top_k, target.needs)
        a, b = target.weights(stats)
        return a.numpy(), [weight.numpy() for weight in b], unsure

    def _offset_mass(self, pool: Residual) -> tuple[np.ndarray, np.ndarray]:
        """Σ_v q_v w_v of a residual with an elementwise offset, and at most how far off it is: [tokens] each."""
        if pool.offset_slope is None:
            return np.ones_like(self.log_p_y), np.zeros_like(self.log_p_y)
        plain = Pool(**pool.nonzero)
        inside, whole = np.exp(self._scores(pool)).sum(1), np.exp(self._scores(plain)).sum(1)
        shown, low, high = self._tail(plain)
        middle, cap = self._tail_offsets(pool)
        mass = (inside + middle * shown) / (whole + shown)
        most = np.maximum(*((inside + cap * tail) / (whole + tail) for tail in (low, high)))
        return mass, np.maximum(most - mass, mass - inside / (whole + high))

    def _tail_offsets(self, pool: Residual) -> tuple[np.ndarray, np.ndarray]:
        """The offset w of a token outside the ids: of an average one, and the most it can be. [tokens] each."""
        assert pool.offset_slope is not None
        with np.errstate(divide="ignore", invalid="ignore"):
            average = np.where(self.outside > 0, np.log(self.tail["student"] / self.outside), -np.inf)
        w = [np.exp(_log_sigmoid(pool.offset_slope * (at - self.log_p_y))) for at in (average, self.floor["student"])]
        return w[0], w[1]

    # -- residuals -----------------------------------------------------------------------------------------------

    def _scores(self, pool: Residual) -> np.ndarray:
        """Pooled log-probabilities at the ids, up to a constant: [tokens, ids], −inf behind each list's end."""
        scores = np.zeros_like(self.p)
        for name, coefficient in pool.nonzero.items():
            scores = scores + coefficient * np.where(self.there, self.logps[name], 0.0)
        if pool.offset_slope is not None:
            scores = scores + _log_sigmoid(pool.offset_slope * (self.logps["student"] - self.log_p_y[:, None]))
        return np.where(self.there, scores, -np.inf)

    def _tail(self, pool: Residual) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What the pool's exponentials sum to outside the ids: (shown, at least, at most), [tokens] each."""
        n, terms = self.outside, pool.nonzero
        masses = {name: np.where(n > 0, self.tail[name], 0.0) for name in terms}
        total = sum(terms.values())
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            if pool.offset_slope is not None:
                plain = Pool(**pool.nonzero)
                shown, low, high = self._tail(plain)
                middle, cap = self._tail_offsets(pool)
                return shown * middle, np.zeros_like(low), high * cap
            if not terms:
                return n, n, n
            if len(terms) == 1:
                ((name, c),) = terms.items()
                M, cap = masses[name], np.exp(self.floor[name])
                even, concentrated = _times(n ** (1 - c), M**c), _times(cap ** (c - 1), M)
                # Σ xᶜ over parts of M, none above the cap: equal parts are one end and as few as may be the other.
                low, high = np.minimum(even, concentrated), np.maximum(even, concentrated)
                if c > 1:
                    high = np.minimum(high, M**c)
                return np.sqrt(low * high), low, high
            # Hölder: Σ Π xᶜ ≤ n^(1 − Σc) Π M^c, and Π M^c where Σ c ≥ 1. It is reached where the tails have one shape.
            high = n ** max(0.0, 1 - total) * np.prod([masses[name] ** c for name, c in terms.items()], axis=0)
            high = np.where(n > 0, high, 0.0)
            if any(c < 0 for c in terms.values()):
                high = np.full_like(high, np.inf)
        return high, np.zeros_like(high), high

    def _residual(self, pool: Residual) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(log R at the ids given that it is one of them, R's tail, the least and the most that it can be)."""
        scores = self._scores(pool)
        shift = scores.max(1)
        inside = np.exp(scores - shift[:, None]).sum(1)
        with np.errstate(over="ignore", invalid="ignore"):
            shown, low, high = (_times(np.exp(-shift), tail) for tail in self._tail(pool))
            total = inside + shown
            least, most = low / (inside + low), np.where(np.isinf(high), 1.0, high / (inside + high))
            here = np.where(np.isinf(total), 1.0, shown / total)
        return scores - (shift + np.log(inside))[:, None], here, least, most

    def _pull(self, term: Term, notes: list[str]) -> _Pull:
        log_inside, tail, least, most = self._residual(term.pool)
        p, p_tail = self.p, self.tail["student"]
        R = np.exp(log_inside) * (1 - tail)[:, None]
        if term.divergence.is_forward_kl:
            return _Pull(R, tail, p - R, p_tail - tail, np.maximum(most - tail, tail - least), p_tail + most)
        scored = functools.partial(times_p, term.divergence)

        def inside(tail: np.ndarray) -> np.ndarray:
            with np.errstate(divide="ignore"):
                return scored(self.logps["student"], log_inside + np.log1p(-tail)[:, None])

        score = highest(term.divergence, self._most_apart(term.pool))
        if np.isinf(score).any() and self.outside.any():
            notes.append(_NO_BOUND)
        with np.errstate(divide="ignore"):
            in_tail = scored(np.log(p_tail), np.log(tail))
        here = inside(tail)
        mean = here.sum(1) + in_tail
        moved = np.maximum(*(np.abs(inside(other) - here).sum(1) for other in (least, most)))
        above, below = _times(score, p_tail), deepest(term.divergence) * most
        off = moved + np.maximum(above - in_tail, in_tail + below)  # of the mean score
        error = moved + _times(p.sum(1), off)
        g, g_tail = here - p * mean[:, None], in_tail - p_tail * mean
        return _Pull(R, tail, g, g_tail, error, _times(p_tail, np.abs(mean) + off) + above + below)

    def _most_apart(self, pool: Residual) -> np.ndarray:
        """The most that log p − log R can be outside the ids: known where R is the same for every token."""
        if pool.nonzero or pool.offset_slope is not None:
            return np.full_like(self.log_p_y, np.inf)
        return self.floor["student"] + np.log(self.record.vocab_size)


def _times(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """x · y with 0 · ∞ = 0: nothing outside, whatever its exponent."""
    with np.errstate(invalid="ignore"):
        return np.where((x == 0) | (y == 0), 0.0, x * y)


def _log_sigmoid(x: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0.0, -x)
