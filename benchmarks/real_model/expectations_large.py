"""What is expected of the large form, written before any of it was run.

From the small form's results, and from what each target does with a label and a teacher.
"""

from __future__ import annotations

from real_model.expectations import Expectation

EXPECTATIONS = (
    Expectation("clean/base", "clean/sft", "strict", "higher", "the form and most of the arithmetic are learned"),
    Expectation(
        "clean/sft",
        "clean/dft",
        "strict",
        "higher",
        "250 steps are enough for the form; from there p-weighting sharpens, and a sharper model slips less often in "
        "the two to four steps of a sampled answer",
    ),
    Expectation(
        "clean/sft",
        "clean/dft",
        "greedy",
        "lower",
        "as in the small form: dft learns the digits that the student finds unlikely slowly",
    ),
    Expectation(
        "clean/sft",
        "clean/kd",
        "greedy",
        "no difference shown",
        "the teacher knows what sft knows, from as many other rows",
    ),
    Expectation(
        "clean/sft",
        "clean/target-sft",
        "strict",
        "higher",
        "trust in the student sharpens, and the teacher's residual keeps the digits that dft learns slowly",
    ),
    Expectation(
        "clean/kd",
        "clean/kd-context",
        "strict",
        "lower",
        "as in the small form: a teacher in context doubts the form, and kd learns the doubt",
    ),
    Expectation(
        "clean/target-sft",
        "clean/target-sft-context",
        "greedy",
        "no difference shown",
        "the labels are right, and either teacher mostly agrees with them",
    ),
    Expectation(
        "clean/sft",
        "noisy/sft",
        "strict",
        "lower",
        "15 % of the steps are learned as wrong as often as they are, and an answer has two to four of them",
    ),
    Expectation(
        "clean/sft",
        "noisy/sft",
        "greedy",
        "lower",
        "as in the small form: wrong labels also slow learning, though no wrong result is the likeliest",
    ),
    Expectation(
        "clean/kd",
        "noisy/kd",
        "strict",
        "no difference shown",
        "kd reads no label; a wrong step is to it a sum that begins with another number",
    ),
    Expectation("noisy/sft", "noisy/dft", "strict", "higher", "a wrong digit is unlikely, and so weighs little in dft"),
    Expectation("noisy/sft", "noisy/kd", "strict", "higher", "its teacher never saw a wrong step"),
    Expectation("noisy/sft", "noisy/target-sft", "strict", "higher", "its residual holds such a teacher"),
    Expectation(
        "noisy/dft",
        "noisy/target-sft",
        "strict",
        "higher",
        "the same trust in the label, with a residual that also teaches what the label's low probability leaves out",
    ),
    Expectation(
        "noisy/sft",
        "noisy/target-sft-context",
        "strict",
        "higher",
        "as in the small form: the teacher has read the right step",
    ),
    Expectation(
        "noisy/target-sft",
        "noisy/target-sft-context",
        "strict",
        "lower",
        "behind a wrong step the answer in context no longer follows from what was written, and its teacher copies on; "
        "a trained teacher carries on from the wrong result, as the demonstration does",
    ),
    Expectation("clean/sft", "clean/dft", "entropy", "lower", "p-weighting sharpens"),
    Expectation("clean/kd", "clean/kd-context", "entropy", "higher", "the teacher in context doubts the form"),
    Expectation("clean/sft", "clean/dft", "nll", "higher", "sft minimises just this"),
    Expectation("noisy/sft", "noisy/kd", "nll", "lower", "sft learns the wrong results' frequency, too"),
)
