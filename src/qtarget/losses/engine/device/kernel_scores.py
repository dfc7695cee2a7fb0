"""Scores and values of divergences in the second pass's kernel, in Triton.

They are those of ``targets/divergence.py``, by e^(−|d|), d = log p − log R, so that nothing overflows, and by series
where d is small, so that what is small keeps its digits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qtarget.targets.divergence import Alpha, Divergence

_LOG2E = tl.constexpr(1.4426950408889634)


def kind(divergence: Divergence) -> tuple[str, float]:
    """(name, number) of a divergence of ``row_plan.KNOWN``, as the functions here take them."""
    if divergence == Alpha(0):
        return "reverse_kl", 0.0
    (number,) = [*vars(divergence).values()] or [0.0]
    return divergence.name, float(number)


@triton.jit
def expm1_over(d, DOUBLE: tl.constexpr):
    """(e^d − 1)/d for small d."""
    last = d * (1.0 / 24)
    if DOUBLE:
        last = d * (1.0 / 24 + d * (1.0 / 120))
    return 1 + d * (0.5 + d * (1.0 / 6) + d * last)


@triton.jit
def is_small(d, DOUBLE: tl.constexpr):
    """Where ``expm1_over`` is good to rounding."""
    return tl.abs(d) < (2e-3 if DOUBLE else 0.0625)


@triton.jit
def _expm1(x, DOUBLE: tl.constexpr):
    return tl.where(is_small(x, DOUBLE), x * expm1_over(x, DOUBLE), tl.exp2(x * _LOG2E) - 1)


@triton.jit
def _log1p(x, DOUBLE: tl.constexpr):
    """log(1 + x) = 2 artanh(x / (2 + x)), by its series where x is small."""
    t = x / (2 + x)
    square = t * t
    TERMS: tl.constexpr = 7 if DOUBLE else 4
    acc = x * 0 + 1.0 / (2 * TERMS - 1)
    for i in tl.static_range(1, TERMS):
        acc = acc * square + 1.0 / (2 * (TERMS - i) - 1)
    return tl.where(tl.abs(x) < 0.1, 2 * t * acc, tl.log(1 + x))


@triton.jit
def compared(p, R, gap, log2_p, d, c, KIND: tl.constexpr, DOUBLE: tl.constexpr):
    """(p · score(d), the terms of D), the terms each of second order where R is near p.

    p, R, gap = p − R, d: of the entries. log2_p: log₂ p. c: the divergence's number.
    """
    if KIND == "reverse_kl":
        pulled = tl.where(p > 0, p * d, 0.0)
        value = pulled - gap
    elif KIND == "total_variation":
        pulled = 0.5 * tl.where(d > 0, p, tl.where(d < 0, -p, 0.0))
        value = 0.5 * tl.abs(gap)
    elif KIND == "alpha":
        pulled = p - tl.exp2(log2_p - c * d * _LOG2E)  # where p vanishes, e^(−αd) may not stay finite
        pulled = tl.where(is_small(c * d, DOUBLE), p * (c * d) * expm1_over(-c * d, DOUBLE), pulled) / c
        value = tl.where(c == 1, gap - R * d, (pulled - gap) / tl.where(c == 1, 1.0, 1 - c))
    elif KIND == "todi":
        t = _expm1(-tl.abs(c * d), DOUBLE)
        tanh = tl.where(d > 0, -t, t) / (2 + t)  # 1 − 2w
        w = 0.5 - 0.5 * tanh
        reverse = tl.where(p > 0, p * d, 0.0)
        pulled = w * gap + (1 - w) * reverse + tanh * p
        value = (1 - w) * reverse - tl.where(R > 0, w * R * d, 0.0)
    else:
        # Mixtures m = (1 − share) p + share R. log(p/m) = min(d, 0) − log(1 + x), and p/m − 1 = ratio · share.
        share = c
        if KIND == "skew_reverse_kl":
            share = 1 - c
        t = _expm1(-tl.abs(d), DOUBLE)
        x = tl.where(d > 0, share, 1 - share) * t
        ratio = tl.where(d > 0, -t, t) / (1 + x)
        if KIND == "jsd":
            log_p_over_m = tl.minimum(d, 0.0) - _log1p(x, DOUBLE)
            pulled = (1 - c) * p * log_p_over_m
            value = pulled + c * R * (log_p_over_m - d)
        elif KIND == "skew_kl":
            pulled = (1 - c) * (1 - c) * p * ratio
            value = R * (tl.minimum(-d, 0.0) - _log1p(x, DOUBLE)) + (1 - c) * gap
        else:
            tl.static_assert(KIND == "skew_reverse_kl")
            log_p_over_m = tl.minimum(d, 0.0) - _log1p(x, DOUBLE)
            pulled = p * (log_p_over_m - c * (1 - c) * ratio)
            value = p * log_p_over_m - (1 - c) * gap
    return pulled, value
