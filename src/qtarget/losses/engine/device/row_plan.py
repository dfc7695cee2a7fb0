"""A target as kernels compute it: the label's pull, and a difference of two distributions.

    g = [label: −a (1 − p_y), else a p] + b (B − R)
    B = softmax(c_b z)        the student, c_b = 1, or the student at a temperature
    R = softmax(c_z z + c_o o [+ log σ(slope (z − z_y))])

By another divergence than forward KL the difference is B ⊙ (s − E_B[s]), s = score(log B − log R), and B the student
over the columns that R covers.

Distillation at a temperature T ≠ 1 has two residuals, T softmax(z_T/T) and −T softmax(z/T), in which the student at T = 1
cancels: as one difference it keeps the digits of a teacher near the student, which two terms lose.
"""

from __future__ import annotations

from dataclasses import dataclass

from qtarget.targets import Target
from qtarget.targets import divergence as by
from qtarget.targets.divergence import FORWARD_KL, Divergence
from qtarget.targets.residual import Residual

# A logit that is not there. Finite: 0 · (−inf) would be NaN and need a branch in every sum.
NEVER = -1.0e30

# What the first pass finds of each row, as rows of a [K, r] table: sums relative to a maximum, ...
SUMS = (
    "z_y",  # the label's logit
    "m",  # the largest logit: everything below is relative to it
    "rest",  # Σ e^(z − m) without the label, so that 1 − p_y keeps its digits where p_y is near 1
    "dot",  # Σ e^(z − m) (z − m) without the label
    "top",  # the largest logit but the label's
    "m_u",  # the largest pooled logit u = c_b (z − m) + d, d as below without its shift
    "s_u",  # Σ e^(u − m_u)
    "s_b",  # Σ e^(c_b (z − m)), over the columns of B
    "s_plain",  # Σ e^(c_z (z − m)), the pool without its offset
)
# ... and what follows from them.
DERIVED = (
    "log_s",  # log Σ e^(z − m)
    "log_p_y",
    "rest_mass",  # 1 − p_y
    "entropy",
    "log_s_u",
    "log_s_b",
    "shift",  # log R − log B = d − m_u + shift, d = c_o (o − z) + (c_z + c_o − c_b)(z − m) [+ offset]
    "offset_mass",  # Σ q w of a pool with an offset w
    "mean_score",  # E_B[s], found between the two passes
    "tail_pull",  # Σ of the difference over what is outside the k of a top-k distribution, whose share is e^(z − m)/s_b
)
TABLE = (*SUMS, *DERIVED)
# What the target's rule and the loss make of it: the label's weight, the difference's, a factor on the row's gradient.
WEIGHTS = ("a", "b", "factor")
# What the second pass finds: Σ |g|, the lowest Q_v, the divergence, which is Σ (R d + B − R) for forward KL, Σ of the
# difference times log p, Σ of the difference, and KL(Q ‖ p), where it is asked for.
FOUND = ("size", "lowest", "divergence", "cross", "drift", "kl_q")
# Divergences that the kernels know; one of a user's own is a function of tensors.
KNOWN = (by.ForwardKL, by.ReverseKL, by.JSD, by.SkewKL, by.SkewReverseKL, by.TotalVariation, by.Alpha, by.ToDi)


@dataclass(frozen=True)
class RowPlan:
    """The numbers of the form above.

    Attributes:
        c_z, c_o: coefficients of the student's logits and of another model's, in R. other: its name, or None.
        c_b: of the student's logits in B. slope: of the offset, or None.
        pool: the residual, None where every residual is the student. divergence: by which it is approached.
    """

    c_z: float = 1.0
    c_o: float = 0.0
    c_b: float = 1.0
    slope: float | None = None
    other: str | None = None
    pool: Residual | None = None
    divergence: Divergence = FORWARD_KL

    @property
    def is_pair(self) -> bool:
        """Whether B is not the student itself."""
        return self.c_b != 1

    @staticmethod
    def of(target: Target) -> RowPlan | None:
        """The plan, or None for a target that is not one difference: its residuals then need a pass each."""
        terms = target.residual_terms
        if not terms:
            return RowPlan()
        _, pool, divergence = terms[0]
        c_b = target.tempered if len(terms) == 2 else 1.0
        names = sorted(pool.requires)
        if c_b is None or len(terms) > 2 or len(names) > 1 or type(divergence) not in KNOWN:
            return None
        if pool.offset_slope is not None and (names or pool.coefficient("student") <= 0):
            return None
        other = names[0] if names else None
        c_o = pool.coefficient(other) if other else 0.0
        return RowPlan(pool.coefficient("student"), c_o, c_b, pool.offset_slope, other, pool, divergence)
