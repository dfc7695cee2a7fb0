"""What was expected, written and committed before the first result: from what others published, and from a look at the
untrained model on a few dozen sums, which hardly ever writes the demonstrations' form ``a + b = c`` by itself.
"""

from __future__ import annotations

from typing import NamedTuple

SCORES = ("strict", "lenient", "greedy")  # paired intervals; the others are read seed by seed


class Expectation(NamedTuple):
    """``other`` against ``first``, each CONDITION/ARM, of one measure.

    measure: strict, lenient or greedy (with qtarget compare's intervals); entropy of the sampled answers or nll of clean
    test answers (expected of every training seed). wanted: higher, lower or no difference shown.
    """

    first: str
    other: str
    measure: str
    wanted: str
    why: str


EXPECTATIONS = (
    Expectation("clean/base", "clean/sft", "strict", "higher", "the form is learned in a few steps"),
    Expectation("clean/base", "clean/target-sft", "strict", "higher", "the form is learned in a few steps"),
    Expectation(
        "clean/sft",
        "clean/dft",
        "strict",
        "lower",
        "the untrained model gives the form's first token a low probability, and dft learns unlikely labels slowly: the "
        "weak case of the literature, where plain sft wins",
    ),
    Expectation(
        "clean/sft",
        "clean/target-sft",
        "strict",
        "no difference shown",
        "labels are right, so that a teacher who has read them adds little",
    ),
    Expectation(
        "clean/sft",
        "clean/kd",
        "strict",
        "lower",
        "the teacher is sure of the result and not of the form: a student that copies its distribution samples other "
        "forms too",
    ),
    Expectation("clean/sft", "noisy/sft", "strict", "lower", "a quarter of the demonstrations end in a wrong result"),
    Expectation("clean/sft", "noisy/sft", "greedy", "no difference shown", "wrong results differ from row to row"),
    Expectation(
        "clean/dft",
        "noisy/dft",
        "strict",
        "no difference shown",
        "a wrong digit is unlikely and so weighs little in dft",
    ),
    Expectation(
        "noisy/sft",
        "noisy/target-sft",
        "strict",
        "higher",
        "its residual holds the teacher, who has read the right result",
    ),
    Expectation(
        "noisy/dft",
        "noisy/target-sft",
        "strict",
        "higher",
        "the teacher also teaches the form, which dft learns slowly",
    ),
    Expectation("clean/sft", "clean/dft", "entropy", "lower", "p-weighting sharpens"),
    Expectation("clean/sft", "clean/kd", "entropy", "higher", "the teacher's distribution is wider than a label"),
    Expectation("clean/sft", "clean/target-sft", "nll", "higher", "sft minimises just this"),
    Expectation("noisy/sft", "noisy/target-sft", "nll", "lower", "sft learns the wrong results' frequency, too"),
)
