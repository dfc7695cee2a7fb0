"""What was expected, of each plan before its first result. Sources: the papers of the objectives, and what others found.

Before the first plan, a trial of six arms had been seen, with a seed that is not in it and at one learning rate. Before the
grid, the first plan had been seen, and a trial on three other seeds: the weak base with the sharp teacher, with and without
wrong steps, and with the good teacher at a third of its temperature; sft, dft, kd, kd-hybrid and target-sft's dial.

A side is CELL/ARM, or MODEL or MODEL@best (at the temperature chosen on dev problems) of ``models``: base, weak, good ...
``all/ARM`` is the mean over the cells of the grid. A sum of sides is written with −, for how a difference changes between
two cells.
"""

from __future__ import annotations

from dataclasses import dataclass

SAME = "no difference shown"


@dataclass(frozen=True)
class Expectation:
    """measure: avg (avg@16), pass (pass@16), greedy, or entropy. wanted: higher, lower, or SAME."""

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
        SAME,
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
    Expectation("clip-off/dft", SAME, "centre/dft", "avg", "Adam undoes a scale that clipping would undo"),
]

EXPECTED_OF_THE_GRID = [
    Expectation(
        "weak-sharp/target-sft",
        "higher",
        "weak-sharp/sft",
        "avg",
        "the teacher knows what the student doesn't, and the labels err",
    ),
    Expectation(
        "weak-sharp/target-sft", "higher", "weak-sharp/dft", "avg", "a weak student is no judge of labels; a teacher is"
    ),
    Expectation(
        "weak-sharp/target-sft",
        SAME,
        "weak-sharp/kd",
        "avg",
        "where the student trusts no label, target-sft is nearly kd",
    ),
    Expectation(
        "weak-sharp/target-sft", "higher", "weak-sharp/kd-hybrid", "avg", "half of the label brings half of its noise"
    ),
    Expectation(
        "weak-sharp/target-sft-0.25", SAME, "weak-sharp/target-sft-1.0", "avg", "the trial's dial was flat here"
    ),
    Expectation(
        "weak-sharp/target-sft",
        "higher",
        "weak-sharp/dft",
        "pass",
        "dft gives alternatives up before it knows which is right",
    ),
    Expectation("weak-sharp/dft", "lower", "weak-sharp/sft", "pass", "as above"),
    Expectation("weak-sharp/asft", "lower", "weak-sharp/sft", "avg", "a spring to a base that can hardly do the task"),
    Expectation("weak-sharp/idft", SAME, "weak-sharp/dft", "avg", "both judge by the student's own probabilities"),
    Expectation(
        "weak-sharp/gift", SAME, "weak-sharp/kd", "avg", "a sharp teacher of the style leaves a label nothing to add"
    ),
    Expectation("weak-sharp/taid", SAME, "weak-sharp/kd", "avg", "a way to the same teacher"),
    Expectation(
        "weak-sharp-noise-0/target-sft", SAME, "weak-sharp-noise-0/sft", "avg", "labels that are right need no judge"
    ),
    Expectation(
        "weak-sharp-noise-30/target-sft − weak-sharp-noise-30/sft",
        "higher",
        "weak-sharp-noise-0/target-sft − weak-sharp-noise-0/sft",
        "avg",
        "the more labels are wrong, the more there is to gain",
    ),
    Expectation(
        "weak-sharp-long/target-sft",
        "higher",
        "weak-sharp-long/sft",
        "avg",
        "more steps teach sft its labels' noise, too",
    ),
    Expectation(
        "weak-sharp-long/target-sft − weak-sharp-long/sft",
        "higher",
        "weak-sharp/target-sft − weak-sharp/sft",
        "avg",
        "sft is bounded by about (1 − noise)^K, the teacher isn't",
    ),
    Expectation(
        "weak-sharp-long/dft", "higher", "weak-sharp-long/sft", "avg", "once the student knows the task, it can judge"
    ),
    Expectation("weak-sharp-long/target-sft", SAME, "weak-sharp-long/kd", "avg", "both follow the teacher"),
    Expectation(
        "weak-cold/target-sft",
        "lower",
        "weak-cold/sft",
        "avg",
        "a cold teacher is sure of styles that the labels don't have",
    ),
    Expectation("weak-cold/kd", "lower", "weak-cold/sft", "avg", "as above"),
    Expectation(
        "weak-cold/target-sft-1.0",
        "higher",
        "weak-cold/target-sft-0.25",
        "avg",
        "half-way between two sure models is neither; the trial had it so",
    ),
    Expectation(
        "weak-good/target-sft",
        "lower",
        "weak-good/sft",
        "avg",
        "the teacher writes in all styles, which is more to learn",
    ),
    Expectation(
        "weak-good/gift", "higher", "weak-good/kd", "avg", "the label settles the style, the teacher the digits"
    ),
    Expectation(
        "weak-bad/target-sft", "lower", "weak-bad/sft", "avg", "a teacher that errs as the labels do, in all styles"
    ),
    Expectation(
        "middle-sharp/target-sft",
        "higher",
        "middle-sharp/dft",
        "avg",
        "there is room left, and the teacher knows the rest",
    ),
    Expectation("middle-sharp/target-sft", "higher", "middle-sharp/sft", "avg", "as in the corner"),
    Expectation("middle-sharp/target-sft", "higher", "middle-sharp/kd", "avg", "it sharpens, which kd does not"),
    Expectation(
        "middle-good/target-sft",
        "lower",
        "middle-good/dft",
        "avg",
        "the good teacher un-sharpens, as at the centre of the first plan",
    ),
    Expectation(
        "strong-sharp/target-sft", SAME, "strong-sharp/dft", "avg", "both near the task's ceiling in the first plan"
    ),
    Expectation("strong-sharp/target-sft", "higher", "strong-sharp/kd", "avg", "it sharpens beyond its teacher"),
    Expectation("strong-good/target-sft", "lower", "strong-good/dft", "avg", "as at the centre of the first plan"),
    Expectation(
        "strong-good/target-sft-0.25",
        "higher",
        "strong-good/target-sft-1.0",
        "avg",
        "less of a teacher of high entropy is more",
    ),
    Expectation(
        "strong-good/gift", "higher", "strong-good/kd", "avg", "the label settles the style, the teacher the digits"
    ),
    Expectation("strong-good/kd+reverse_kl", "higher", "strong-good/kd", "avg", "it seeks modes, and so sharpens"),
    Expectation(
        "strong-cold/target-sft", "higher", "strong-good/target-sft", "avg", "the same teacher with less entropy"
    ),
    Expectation("strong-bad/target-sft", "lower", "strong-bad/dft", "avg", "a worse teacher guides worse"),
    Expectation("strong-sharp/kd-hybrid", "lower", "strong-sharp/kd", "avg", "the label's half brings its noise along"),
    Expectation(
        "all/target-sft",
        "higher",
        "all/sft",
        "avg",
        "least regret: ahead of sft wherever labels err and the teacher knows",
    ),
    Expectation("all/target-sft", "higher", "all/dft", "avg", "what it loses on strong bases it gains on weak ones"),
    Expectation("all/target-sft", "higher", "all/kd", "avg", "what it loses on weak bases it gains on strong ones"),
    Expectation("all/target-sft", "higher", "all/kd-hybrid", "avg", "half of the label brings half of its noise"),
    Expectation("all/target-sft", "higher", "all/dft", "pass", "its residual keeps alternatives"),
    Expectation("all/target-sft", "lower", "all/kd", "pass", "kd gives up none"),
]
