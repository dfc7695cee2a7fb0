"""Recommends targets from how well the model already knows the data.

What is said rests on published comparisons and on the figures of the record, both of which are shown with it. The
thresholds are between published cases and were not tuned: they are heuristics, and advice is not a promise.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from qtarget.lens.page_targets import targets_of_run
from qtarget.lens.record import Record
from qtarget.lens.replay import Replay
from qtarget.targets import Target, presets

# Mean probability of the training tokens before training, by kind of data (arXiv:2510.00526, table 5): mathematics 0.76
# to 0.81, medical 0.50 to 0.59, rendered text 0.01 to 0.07. The bounds lie halfway between the kinds.
STRONG, WEAK = 0.67, 0.28

_CASES = {
    "strong": [
        "Qwen2.5-Math-1.5B on NuminaMath, mean p_y 0.76–0.81: sft 17.0, −p (dft's gradient) 32.8, sft on tokens with "
        "p ≥ 0.2 only 32.0, average of five benchmarks (arXiv:2510.00526, table 1)",
        "LLaMA-3.1-8B on the same: sft 6.5, −p 10.6 (the same table)",
    ],
    "middle": [
        "LLaMA-3.1-8B on medical reasoning, mean p_y 0.50–0.59: sft 47.2, −p 45.9; Qwen2.5-1.5B: 35.1 and 35.0 "
        "(arXiv:2510.00526, table 2)",
    ],
    "weak": [
        "rendered text (mean p_y 0.01–0.07) is the kind on which −log p did better than −p (arXiv:2510.00526, table 5 "
        "and its discussion)",
    ],
    "instruct": [
        "Qwen3-4B-Instruct on mathematics: sft 69.4, eaft 69.3, dft 63.5; general benchmarks 76.5, 80.1, 78.1 (EAFT's "
        "README): a student that is instruction-tuned already, where dft lost to sft",
    ],
    "noise": [
        "OpenBookQA with label noise, 14B: sft 27.0, −p 91.6; without noise 95.0 and 93.4 (arXiv:2510.00526, table 10)",
    ],
}
_SUITS = {
    "strong": "dft, beyond-log with alpha ≥ 1, profit or target-sft: the model's own belief tells signal from noise here",
    "middle": "sft and dft tend to be close; target-sft or eaft keep more of what the model knows",
    "weak": "sft, or beyond-log with alpha below ½: objectives that trust p_y would teach hardly anything",
}
_PLACE = {
    "strong": "the model knows most of these tokens",
    "middle": "the model half knows these tokens",
    "weak": "most of these tokens are new to the model",
}


@dataclass
class Advice:
    """What is said of a record.

    Attributes:
        place: "strong", "middle" or "weak". figures: name → number behind it. suits: targets that tend to suit.
        cases: published cases. doubts: what speaks against taking the advice. warnings: settings that do nothing.
    """

    place: str
    figures: dict[str, float]
    suits: str
    cases: list[str]
    doubts: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The advice as text, a line each."""
        figures = ", ".join(f"{name} {value:.3g}" for name, value in self.figures.items())
        return [
            f"{_PLACE[self.place]} ({figures})",
            f"targets that tend to suit: {self.suits}",
            *(f"seen: {case}" for case in self.cases),
            *(f"doubt: {doubt}" for doubt in self.doubts),
            *(f"warning: {warning}" for warning in self.warnings),
        ]


def advise(record: Record, target: Target | None = None) -> Advice:
    """Advice for a record, with warnings on ``target`` (None: on the target of the captured run)."""
    replay = Replay(record)
    p = np.exp(replay.log_p_y)
    rank = np.asarray(record.tokens["rank"])
    sure = record.numbers("entropy") < 0.1 * np.log(record.vocab_size)  # a tenth of what the entropy can be
    confident_wrong = (p < 0.1) & (replay.figures(presets.build("sft")).update > 0.9) & sure
    figures = {
        "mean p_y": float(p.mean()),
        "median p_y": float(np.median(p)),
        "label is the likeliest": float((rank == 0).mean()),
        "confident conflicts": float(confident_wrong.mean()),
    }
    place = "strong" if p.mean() >= STRONG else "weak" if p.mean() < WEAK else "middle"
    cases = [*_CASES[place]]
    doubts = [
        f"the bounds {WEAK} and {STRONG} are halfway between published kinds of data, not measured on yours",
        "those cases are base models of 1.5B to 14B on other data; yours may behave differently",
    ]
    if place == "strong":
        cases += _CASES["instruct"]
        doubts.append(
            "an instruction-tuned student whose answers are already right may do worse with dft, see the last case"
        )
    if figures["confident conflicts"] > 0.05:
        cases += _CASES["noise"]
        doubts.append(
            "more than 5 % of the tokens contradict a confident student: either noise, or exactly what should be "
            "learnt; look at them (qtarget lens report, the list of disagreements) before choosing how far to trust "
            "them"
        )
    _about_teacher(record, replay, figures, doubts)
    if len(record) < 1000:
        doubts.append(f"{len(record)} tokens are few; capture more rows")
    return Advice(place, figures, _SUITS[place], cases, doubts, _warnings(record, replay, target))


def _about_teacher(record: Record, replay: Replay, figures: dict[str, float], doubts: list[str]) -> None:
    if "teacher" not in record.others:
        return
    teacher_p = np.exp(record.numbers("teacher_log_p_y"))
    top = replay.logps["teacher"].argmax(1) == replay.logps["student"].argmax(1)
    figures["teacher's mean p of the label"] = float(teacher_p.mean())
    figures["teacher and student agree on the likeliest"] = float(top.mean())
    if top.mean() > 0.995:
        doubts.append("student and teacher agree nearly everywhere: a residual from this teacher changes little")
    if teacher_p.mean() < np.exp(replay.log_p_y).mean():
        doubts.append(
            "the teacher gives the labels less probability than the student does: it may pull away from the data"
        )


def _warnings(record: Record, replay: Replay, target: Target | None) -> list[str]:
    """Settings that equal another objective, or teach nothing."""
    if target is None:
        run_targets = [*targets_of_run(record).values()] or [presets.build("sft")]
        if len(run_targets) > 1 or not isinstance(run_targets[0], Target):  # there is no single target to look at
            return []
        target = run_targets[0]
    needed = {"teacher", "reference"} & target.requires
    if not needed <= set(record.others):
        return [f"target {target} needs a {' and a '.join(sorted(needed))}, which was not captured"]
    mine = replay.figures(target)
    summary = replay.summary(mine)
    warnings = []
    if summary.update < 1e-6:
        warnings.append(f"target {target} teaches nothing on these tokens: the update is {summary.update:.1e}")
    for name in ("sft", "dft"):
        if target.name == name:
            continue
        other = replay.figures(presets.build(name))
        if np.abs(mine.q - other.q).max() < 1e-6 and np.abs(mine.q_tail - other.q_tail).max() < 1e-6:
            warnings.append(f"target {target} is {name} on these tokens: every Q is the same")
    if summary.k_is_too_small:
        warnings.append(
            f"k is too small for {target}: its figures may be off by {summary.error:.2f}; capture with a larger --top_k"
        )
    return warnings + mine.notes
