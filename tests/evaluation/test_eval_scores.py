"""Scores: identities, tables by hand, published averages, and intervals that cover what they should."""

from __future__ import annotations

from itertools import combinations, product
from math import comb

import numpy as np
import pytest

from qtarget.evaluation import scores

RIGHT = np.array([[1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 1]])


def test_pass_at_1_is_avg_at_n_and_pass_at_n_is_any_right():
    curve = scores.pass_curve(RIGHT)
    assert curve[0] == pytest.approx(scores.avg(RIGHT), abs=1e-15) and scores.avg(RIGHT) == pytest.approx(10 / 20)
    assert curve[-1] == pytest.approx(RIGHT.any(1).mean(), abs=1e-15)
    assert curve == sorted(curve)


@pytest.mark.parametrize(
    ("n", "c", "k"), [(n, c, k) for n in (1, 2, 5, 7) for c in range(n + 1) for k in range(1, n + 1)]
)
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_sample(n, c, k):
    drawn = [any(i < c for i in subset) for subset in combinations(range(n), k)]
    assert scores.pass_at(n, np.array([c]), k)[0] == pytest.approx(sum(drawn) / comb(n, k), abs=1e-14)


def test_pass_at_k_of_many_samples_overflows_nothing():
    value = scores.pass_at(10_000, np.array([1]), 5_000)[0]
    assert value == pytest.approx(0.5, abs=1e-9)


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_k_needs_k_samples(k):
    with pytest.raises(ValueError, match=r"use 1 to n = 4"):
        scores.pass_at(4, np.array([1]), k)


@pytest.mark.parametrize(
    ("parsed", "right", "value"),
    [
        (["7", "7", "8"], [1, 1, 0], 1.0),
        (["7", "8", "8"], [1, 0, 0], 0.0),
        (["7", "8"], [1, 0], 0.5),
        (["7", "8", "9", "9", "7"], [1, 0, 0, 0, 1], 0.5),
        ([None, None, "7"], [0, 0, 1], 1.0),
        ([None, None], [0, 0], 0.0),
    ],
)
def test_majority(parsed, right, value):
    assert scores.majority(parsed, right) == value


def record(problem, sample, right, parsed="x", **more):
    return {
        "problem": problem,
        "sample": sample,
        "strict": bool(right),
        "lenient": bool(right),
        "parsed": parsed,
        "lenient_parsed": parsed,
        "text": "text",
        "finish": "stop",
        "tokens": 10,
        "entropy": 0.5,
        "fault": None,
        **more,
    }


def made() -> list[dict]:
    rows = [
        record(
            f"p{p}", s, RIGHT[p, s], parsed=None if s == 3 and not RIGHT[p, s] else f"a{RIGHT[p, s] or s % 2}{s == 2}"
        )
        for p, s in product(range(5), range(4))
    ]
    return rows + [record(f"p{p}", "greedy", p % 2) for p in range(5)]


def test_summary_by_hand():
    rows = made()
    rows[0] |= {"finish": "length", "tokens": 50, "entropy": 2.0}
    rows[5] |= {"text": " ", "fault": "timeout"}
    rows[6] |= {"fault": "error"}
    summary = scores.summary(rows, 4)
    assert summary["strict"]["avg"] == pytest.approx(0.5)
    assert summary["strict"]["greedy"] == pytest.approx(2 / 5)
    assert summary["strict"]["no_answer"] == pytest.approx(3 / 20)
    assert summary["mean_tokens"] == pytest.approx((19 * 10 + 50) / 20)
    assert summary["truncated"] == pytest.approx(1 / 20)
    assert summary["empty"] == pytest.approx(1 / 20)
    assert summary["entropy"] == pytest.approx((19 * 10 * 0.5 + 50 * 2.0) / 240)  # a mean over tokens
    assert (summary["timeouts"], summary["errors"]) == (1, 1)


def test_permuting_samples_changes_nothing():
    rows = made()
    summary = scores.summary(rows, 4)
    generator = np.random.default_rng(0)
    for _ in range(5):
        # other indices for the samples, and other lines: problems keep their order, since the bootstrap draws by place
        renamed = []
        for p in range(5):
            order = generator.permutation(4)
            own = [r for r in rows if r["problem"] == f"p{p}"]
            own = [{**r, "sample": r["sample"] if r["sample"] == "greedy" else int(order[r["sample"]])} for r in own]
            renamed += [own[i] for i in generator.permutation(len(own))]
        assert scores.summary(renamed, 4) == summary


def test_without_samples_there_is_the_greedy_answer():
    summary = scores.summary([r for r in made() if r["sample"] == "greedy"], 0)
    assert "avg" not in summary["strict"] and summary["strict"]["greedy"] == pytest.approx(2 / 5)
    assert summary["mean_tokens"] == 10


def test_a_verifier_that_tells_no_answer_has_no_majority():
    summary = scores.summary([{**r, "unparsed": True} for r in made()], 4)
    assert summary["strict"]["majority"] is None and summary["strict"]["no_answer"] is None
    rows = [{**r, "unparsed": True} for r in made()]
    del rows[0]["unparsed"]  # its call hung
    assert scores.summary(rows, 4)["lenient"]["no_answer"] is None


# DFT, arXiv:2508.05629, table 1: MATH-500, Minerva, Olympiad, AIME24, AMC23, and the average they print.
PUBLISHED = {
    "llama-3.2-3b base": ([1.63, 1.36, 1.01, 0.41, 1.56], 1.19),
    "llama-3.2-3b sft": ([8.65, 2.38, 2.06, 0.00, 3.13], 3.24),
    "llama-3.2-3b dft": ([12.79, 2.84, 2.90, 0.83, 3.91], 4.65),
    "llama-3.1-8b base": ([1.86, 0.98, 0.94, 0.21, 1.01], 1.00),
    "llama-3.1-8b sft": ([16.85, 5.78, 3.88, 0.00, 5.16], 6.33),
    "llama-3.1-8b dft": ([27.44, 8.26, 6.94, 0.41, 12.03], 11.02),
    "deepseekmath-7b sft": ([26.83, 7.26, 6.33, 0.41, 8.28], 9.82),
    "deepseekmath-7b dft": ([41.46, 16.79, 15.00, 1.24, 16.25], 18.15),
    "qwen2.5-math-1.5b base": ([31.66, 8.51, 15.88, 4.16, 19.38], 15.92),
    "qwen2.5-math-1.5b sft": ([43.76, 13.04, 12.63, 1.87, 18.75], 18.01),
    "qwen2.5-math-1.5b dft": ([64.89, 20.94, 27.08, 6.87, 38.13], 31.58),
    "qwen2.5-math-7b base": ([40.12, 14.39, 17.12, 6.68, 27.96], 21.25),
    "qwen2.5-math-7b sft": ([53.96, 16.66, 18.93, 2.48, 26.09], 23.62),
    "qwen2.5-math-7b dft": ([68.20, 30.16, 33.83, 8.56, 45.00], 37.15),
    # BLL, arXiv:2510.00526, table 1
    "bll qwen2.5-math-1.5b base": ([30.71, 8.81, 14.88, 2.49, 17.97], 14.97),
    "bll qwen2.5-math-1.5b nll": ([42.52, 12.71, 12.09, 0.62, 17.03], 17.00),
    "bll qwen2.5-math-1.5b threshold": ([63.95, 24.79, 26.08, 7.09, 38.28], 32.04),
    # of its last arm 32.75 is printed, which does not follow from the columns at hand
    "bll qwen2.5-math-1.5b p": ([65.27, 26.18, 26.66, 6.88, 38.13], 32.62),
    # BLL, table 2, its ten printed columns: the printed 47.23 has a hidden eleventh
    "bll llama-3.1-8b medical": ([55.08, 59.47, 74.00, 53.62, 32.05, 57.28, 52.27, 46.10, 15.87, 59.20], 50.49),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_averages_follow_from_their_columns(name):
    columns, average = PUBLISHED[name]
    assert scores.macro(columns) == pytest.approx(average, abs=0.0101)  # their columns are rounded or cut to 0.01


# -- intervals -----------------------------------------------------------------------------------------------------


def simulated(generator, problems, n, gain):
    """Two models' verdicts [p, n] on problems of one difficulty each; the expected difference is exact."""
    ease = generator.beta(0.6, 0.8, problems)
    better = np.clip(ease + gain * (1 - ease), 0, 1)
    return generator.random((problems, n)) < ease[:, None], generator.random((problems, n)) < better[:, None]


@pytest.mark.parametrize("n", [1, 4, 16])
def test_the_interval_covers_the_truth_in_about_95_of_100_simulations(n):
    generator = np.random.default_rng(n)
    gain, rounds, covered = 0.15, 400, 0
    truth = gain * (1 - 0.6 / 1.4)  # mean of the beta distribution
    for i in range(rounds):
        a, b = simulated(generator, 80, n, gain)
        low, high = scores.interval(scores.two_level(b.astype(float) - a, draws=500, seed=i))
        covered += low <= truth <= high
    # 0.95 and three binomial errors of 400 rounds, 0.033; samples' noise counted twice would cover 0.99 and more.
    assert 0.917 <= covered / rounds <= 0.983


def test_the_interval_of_one_model_covers_too():
    generator = np.random.default_rng(5)
    covered = 0
    for i in range(400):
        a, _ = simulated(generator, 100, 8, 0)
        low, high = scores.interval(scores.two_level(a.astype(float), draws=500, seed=i))
        covered += low <= 0.6 / 1.4 <= high
    assert 0.917 <= covered / 400 <= 0.983


@pytest.mark.parametrize("ease", [0.01, 0.03, 0.9, 0.97])
@pytest.mark.parametrize("n", [1, 4, 16])
def test_intervals_cover_where_problems_are_hard_or_easy(n, ease):
    """30 problems; difficulties from a beta distribution of this mean, most near 0 and 1; the other model gains 0.15."""
    generator = np.random.default_rng([n, round(100 * ease)])
    rounds, k, gain = 150, max(1, n // 2), 0.15
    alpha, beta = 0.8 * ease, 0.8 * (1 - ease)
    missed = np.prod([(beta + i) / (alpha + beta + i) for i in range(k)])  # E[(1 − ease)^k]
    covered = np.zeros(3)
    for seed in range(rounds):
        eases = generator.beta(alpha, beta, (30, 1))
        right = (generator.random((30, n)) < eases).astype(float)
        better = generator.random((30, n)) < eases + gain * (1 - eases)
        found = (
            (scores.two_level(right, 200, seed), False, ease),
            (scores.one_level(scores.pass_at(n, right.sum(1), k), 200, seed), False, 1 - missed),
            (scores.two_level(better - right, 200, seed), True, gain * (1 - ease)),
        )
        for i, (draws, differences, truth) in enumerate(found):
            low, high = scores.interval(scores.with_unseen(draws, 30, differences))
            covered[i] += low <= truth <= high
    assert (covered / rounds >= 0.9).all()


def test_none_right_is_no_point():
    """Jeffreys' interval: the quantile of Beta(1/2, 1000.5) at 0.975 is 0.00251."""
    low, high = scores.interval(scores.with_unseen(np.zeros(10_000), 1000))
    assert low == pytest.approx(0, abs=1e-4) and high == pytest.approx(0.00251, rel=0.1)
    low, high = scores.interval(scores.with_unseen(np.zeros(10_000), 30, differences=True))
    assert low == pytest.approx(-high, rel=0.2) and 0.03 < high < 0.1


def test_drawing_counts_is_drawing_samples():
    """The draws against a bootstrap that draws every index, and moves the problems' means together."""
    generator = np.random.default_rng(0)
    values = generator.choice([-1.0, 0.0, 1.0], size=(30, 6), p=[0.2, 0.5, 0.3])
    values[:8] = 1
    fast = scores.two_level(values, draws=20_000)
    which = generator.integers(30, size=(20_000, 30))
    shift = (scores._together(values[None], values.mean(1)[None]) - values.mean(1))[0]
    slow = values[which[:, :, None], generator.integers(6, size=(20_000, 30, 6))].mean((1, 2)) + shift[which].mean(1)
    assert fast.mean() == pytest.approx(slow.mean(), abs=4 * slow.std() / 20_000**0.5 * 2**0.5)
    assert fast.std() == pytest.approx(slow.std(), rel=0.03)


def test_training_seeds_are_the_outer_level():
    """Where seeds differ and problems do not, the interval is that of the seeds."""
    values = np.zeros((3, 50, 4))
    values[0] = 1
    assert scores.interval(scores.two_level(values)) == (0.0, 1.0)
    assert scores.interval(scores.one_level(values.mean(2))) == (0.0, 1.0)
    alone = scores.two_level(values.mean(0).round()[None])
    assert scores.interval(alone) == (0.0, 0.0)


def test_problems_are_shared_by_the_seeds():
    """Drawn apart for each seed, problems would average out and the interval shrink by the root of the seeds."""
    one = np.repeat(np.array([0, 1] * 20), 4).reshape(1, 40, 4).astype(float)
    many = np.repeat(one, 5, axis=0)
    assert scores.two_level(many).std() == pytest.approx(scores.two_level(one).std(), rel=0.05)
