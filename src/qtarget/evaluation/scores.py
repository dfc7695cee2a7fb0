"""avg@n, pass@k, maj@n and intervals, from verdicts [problems, n] of 0 and 1.

avg@n is the mean over problems of the share of right samples: it estimates pass@1 without bias, whatever n.
pass@k from n ≥ k samples of which c are right: 1 − C(n−c, k)/C(n, k) (Chen et al. 2021, arXiv:2107.03374).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

_FEW = 20


def avg(right_pn: np.ndarray) -> float:
    """avg@n of verdicts [p, n]."""
    return float(np.asarray(right_pn, float).mean(1).mean())


def pass_at(n: int, correct_p: np.ndarray, k: int) -> np.ndarray:
    """[p] unbiased pass@k of each problem from its number of right samples, as a running product.

    >>> pass_at(4, np.array([0, 1, 4]), 2).tolist()
    [0.0, 0.5, 1.0]
    """
    if not 1 <= k <= n:
        raise ValueError(f"k is {k}; use 1 to n = {n}")
    wrong = n - np.asarray(correct_p, dtype=float)
    none_right = np.ones_like(wrong)
    for i in range(k):  # C(w, k)/C(n, k) = Π (w − i)/(n − i); it is 0 from w < k on
        none_right *= np.maximum(wrong - i, 0) / (n - i)
    return 1 - none_right


def pass_curve(right_pn: np.ndarray) -> list[float]:
    """[n] pass@1 ... pass@n, means over problems."""
    right = np.asarray(right_pn)
    n = right.shape[1]
    return [float(pass_at(n, right.sum(1), k).mean()) for k in range(1, n + 1)]


def majority(parsed: Sequence[str | None], right: Sequence[bool]) -> float:
    """maj@n of one problem: whether its most frequent parsed answer is right; a tie counts by the share that is.

    Answers are the same where their normal forms are the same text; samples without one have no vote.
    """
    verdicts: dict[str, list[bool]] = {}
    for answer, verdict in zip(parsed, right, strict=True):
        if answer is not None:
            verdicts.setdefault(answer, []).append(bool(verdict))
    most = max(map(len, verdicts.values()), default=0)
    winners = [votes for votes in verdicts.values() if len(votes) == most]
    return sum(sum(votes) / most for votes in winners) / len(winners) if winners else 0.0


def macro(averages: Sequence[float]) -> float:
    """The unweighted mean over benchmarks: the "Average@16" of the papers."""
    return float(np.mean(np.asarray(averages, float)))


# -- of a task's records -------------------------------------------------------------------------------------------


def summary(records: Sequence[dict[str, Any]], n: int, seed: int = 0) -> dict[str, Any]:
    """All scores of one task.

    Args:
        records: of every problem n samples and perhaps a greedy one, in any order; see ``records``.
        n: samples a problem. seed: of the bootstrap.
    """
    by_problem = grouped(records)
    samples = [[record for record in group if record["sample"] != "greedy"] for group in by_problem.values()]
    greedy = [record for group in by_problem.values() for record in group if record["sample"] == "greedy"]
    flat = [record for group in samples for record in group] or greedy
    # What a call that hung or raised had read is unknown too, where the verifier never tells.
    untold = any(record.get("unparsed") for record in flat)
    result: dict[str, Any] = {"problems": len(by_problem), "n": n}
    for reading in ("strict", "lenient"):
        parsed = "parsed" if reading == "strict" else "lenient_parsed"
        part: dict[str, Any] = {}
        if n:
            right = np.array([[record[reading] for record in group] for group in samples], dtype=float)
            part["avg"] = avg(right)
            part["interval"] = list(interval(with_unseen(two_level(right, seed=seed), len(right))))
            part["pass"] = pass_curve(right)
            votes = [majority([r[parsed] for r in group], [r[reading] for r in group]) for group in samples]
            part["majority"] = None if untold else macro(votes)
        part["greedy"] = share([record[reading] for record in greedy])
        part["no_answer"] = None if untold else share([record[parsed] is None for record in flat])
        result[reading] = part
    entropies = [(record["entropy"], record["tokens"]) for record in flat if record["entropy"] is not None]
    tokens = sum(count for _, count in entropies)
    return result | {
        "mean_tokens": float(np.mean([record["tokens"] for record in flat])),
        "truncated": share([record["finish"] == "length" for record in flat]),
        "empty": share([not record["text"].strip() for record in flat]),
        "entropy": sum(entropy * count for entropy, count in entropies) / tokens if tokens else None,
        "timeouts": sum(record["fault"] == "timeout" for record in records),
        "errors": sum(record["fault"] == "error" for record in records),
    }


def grouped(records: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """{problem: its records}, samples in their order."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(record["problem"], []).append(record)
    for group in groups.values():
        group.sort(key=lambda record: -1 if record["sample"] == "greedy" else record["sample"])
    return groups


def share(holds: Sequence[bool]) -> float | None:
    """The share that is true; None of none."""
    return sum(map(bool, holds)) / len(holds) if holds else None


def too_few(problems: dict[str, int]) -> list[str]:
    """A sentence for each task whose interval is not to be trusted. ``problems``: task → how many."""
    return [
        f"Task {task} has {count} problems: too few for a reliable interval."
        for task, count in problems.items()
        if count < _FEW
    ]


# -- bootstrap -----------------------------------------------------------------------------------------------------


def two_level(values: np.ndarray, draws: int = 10_000, seed: int = 0) -> np.ndarray:
    """[draws] bootstrap means of values in {−1, 0, 1}: problems are drawn, then samples within, training seeds outermost.

    Args:
        values: [p, n], or [s, p, n] with s training seeds. Verdicts, or differences of paired verdicts. Problems are
            drawn once for all seeds, which share them.

    Of n samples drawn from n, plus and minus counts are multinomial; so counts are drawn instead of samples. The spread
    of the problems' means holds the samples' noise already, and drawing samples would add it again: twice too much
    variance where problems hardly differ, as paired differences do. So the means are first drawn together, by the factor
    that leaves the sum right (Davison and Hinkley 1997, section 3.8): Σ c (m_p − m) + noise, c² = 1 − noise/spread.
    """
    values = np.asarray(values)
    values = values[None] if values.ndim == 2 else values
    n = values.shape[2]
    plus, minus = (values > 0).mean(2), (values < 0).mean(2)  # [s, p]
    rest = np.divide(minus, 1 - plus, out=np.zeros_like(minus), where=plus < 1).clip(0, 1)
    means_sp = values.mean(2)
    shift_sp = _together(values, means_sp) - means_sp
    generator = np.random.default_rng(seed)

    def redrawn(*at: np.ndarray) -> np.ndarray:
        ups = generator.binomial(n, plus[at])
        downs = generator.binomial(n - ups, rest[at]) if minus.any() else 0
        return (ups - downs) / n + shift_sp[at]

    return _bootstrap(redrawn, plus.shape, draws, generator).clip(values.min(), values.max())


def _together(values_spn: np.ndarray, means_sp: np.ndarray) -> np.ndarray:
    """[s, p] problems' means, drawn toward their own mean so that redrawn samples restore the spread they had."""
    centre = means_sp.mean(1, keepdims=True)
    spread = means_sp.var(1, keepdims=True)
    noise = values_spn.var(2).mean(1, keepdims=True) / values_spn.shape[2]
    left = 1 - np.divide(noise, spread, out=np.zeros_like(spread), where=spread > 0)
    return centre + np.sqrt(left.clip(0)) * (means_sp - centre)


def one_level(values: np.ndarray, draws: int = 10_000, seed: int = 0) -> np.ndarray:
    """[draws] bootstrap means of any numbers [p] or [s, p]: problems, and training seeds outermost, are drawn."""
    values = np.asarray(values, float)
    values = values[None] if values.ndim == 1 else values
    return _bootstrap(lambda *at: values[at], values.shape, draws, np.random.default_rng(seed))


def _bootstrap(
    values_at: Callable[..., np.ndarray], shape: Sequence[int], draws: int, generator: np.random.Generator
) -> np.ndarray:
    """[draws] means of ``values_at(seeds, problems)``, both drawn again each time; ``shape``: how many of each."""
    seeds, problems = shape
    means = np.empty(draws)
    chunk = max(1, 2_000_000 // (seeds * problems))
    for start in range(0, draws, chunk):
        count = min(chunk, draws - start)
        drawn_problems = generator.integers(problems, size=(count, 1, problems))
        drawn_seeds = generator.integers(seeds, size=(count, seeds, 1))
        means[start : start + count] = values_at(drawn_seeds, drawn_problems).mean((1, 2))
    return means


def with_unseen(means: np.ndarray, problems: int, differences: bool = False) -> np.ndarray:
    """[draws] bootstrap means as they may be with problems of a kind that was not drawn.

    Half a problem that always is right, and half a one that never is, are weighed beside the others as the Bayesian
    bootstrap does (Rubin 1981): Dirichlet(1/2, 1/2, problems). Where no sample is right, or all are, this is Jeffreys'
    interval, Beta(1/2, problems + 1/2); without it the interval would be a point.

    Args:
        means: of ``two_level`` or ``one_level``, from 0 to 1, or from −1 to 1 if they are differences. Of two models
            either may solve such a problem alone, in a quarter of a problem each.
    """
    known = problems + 0.5 if differences else problems
    end = 0.25 if differences else 0.5
    up, down, rest = np.random.default_rng(problems).dirichlet((end, end, known), len(means)).T
    return up - differences * down + rest * means


def interval(draws: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The percentile interval."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
