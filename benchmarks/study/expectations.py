"""What was expected, written before the study's first result; a trial of six arms with a seed that is not in the study,
at one learning rate, had been seen. Sources: the papers of the objectives, and what others found of them.

A side is CELL/ARM, or MODEL or MODEL@best (at the temperature chosen on dev problems) of ``models``: base, weak, good ...
A sum of sides is written with + and −, for how a difference changes between two cells.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Expectation:
    """measure: avg (avg@16), pass (pass@16), greedy, or entropy. wanted: higher, lower or no difference shown."""

    left: str
    wanted: str
    right: str
    measure: str
    why: str


EXPECTED = [
    Expectation(
        "centre/sft", "lower", "base", "avg", "the likelihood's gradient is largest on the least likely tokens"
    ),
    Expectation("noise-0/sft", "higher", "base", "avg", "clean demonstrations in one style sharpen and teach"),
    Expectation("noise-50/sft", "lower", "noise-5/sft", "avg", "an imitator is right at about (1 − noise)^K"),
    Expectation("centre/dft", "higher", "centre/sft", "avg", "wrong digits are unlikely and weigh little"),
    Expectation("centre/dft", "higher", "base", "avg", "p-weighting sharpens"),
    Expectation("centre/dft", "lower", "base", "entropy", "p-weighting sharpens"),
    Expectation("centre/dft", "lower", "base", "pass", "what is sharpened loses alternatives"),
    Expectation(
        "base@best",
        "no difference shown",
        "centre/dft",
        "avg",
        "much of dft's gain is sharpening, which a temperature gives",
    ),
    Expectation("own-samples/dft", "higher", "base", "avg", "p-weighting sharpens even without a demonstration"),
    Expectation("base-weak/dft", "lower", "base-weak/sft", "avg", "a weak prior is no judge of labels"),
    Expectation("style-unseen/dft", "lower", "style-unseen/sft", "avg", "news is unlikely too, and weighs little"),
    Expectation("noise-50/dft − noise-0/dft", "higher", "noise-50/sft − noise-0/sft", "avg", "noise costs dft less"),
    Expectation("centre/kd", "higher", "centre/sft", "avg", "a clean teacher removes wrong labels"),
    Expectation("centre/kd", "lower", "good", "avg", "an imitator of the teacher's entropy does not pass it"),
    Expectation("centre/kd-hybrid", "lower", "centre/kd", "avg", "the label's half brings its noise along"),
    Expectation(
        "noise-0/kd-hybrid", "higher", "noise-0/kd", "avg", "clean labels sharpen what the teacher leaves open"
    ),
    Expectation(
        "centre/target-sft",
        "lower",
        "centre/dft",
        "avg",
        "the good teacher writes in all styles and un-sharpens the student",
    ),
    Expectation(
        "centre/target-sft", "higher", "centre/dft", "pass", "its residual keeps alternatives that dft gives up"
    ),
    Expectation(
        "teacher-sharp/target-sft", "higher", "centre/dft", "avg", "a sharp teacher of the style adds no entropy"
    ),
    Expectation(
        "teacher-tempered/target-sft", "higher", "centre/target-sft", "avg", "the same teacher with less entropy"
    ),
    Expectation("teacher-bad/target-sft", "lower", "centre/target-sft", "avg", "a worse teacher guides worse"),
    Expectation(
        "teacher-misaligned/target-sft",
        "lower",
        "centre/target-sft",
        "avg",
        "it pulls away from the layout demonstrated",
    ),
    Expectation(
        "teacher-bad/kd", "lower", "teacher-bad/target-sft", "avg", "trust in the label bounds what a teacher can do"
    ),
    Expectation("centre/target-sft", "higher", "centre/sft", "avg", "as dft"),
    Expectation(
        "noise-0/target-sft − noise-0/sft",
        "lower",
        "centre/target-sft − centre/sft",
        "avg",
        "without noise there is less to gain",
    ),
    Expectation(
        "base-weak/target-sft",
        "higher",
        "base-weak/dft",
        "avg",
        "the teacher stands in where the student knows nothing",
    ),
    Expectation(
        "style-unseen/target-sft",
        "lower",
        "style-unseen/sft",
        "avg",
        "neither student nor teacher trusts the new layout",
    ),
    Expectation(
        "clip-off/dft", "no difference shown", "centre/dft", "avg", "Adam undoes a scale that clipping would undo"
    ),
]
