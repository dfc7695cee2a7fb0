"""What a comparison of teacher, student and labels found: figures, verdict, words."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from qtarget.data.text import visible

# What counts as a conflict of teacher and label.
CONFIDENT = 0.5  # the teacher's probability of another token than the label
DENIED = 0.01  # or less than this for the label itself
# Rules of thumb for the verdict, chosen by hand and not tuned on any result.
IDENTICAL_KL = 0.02  # nats: below it a residual from this teacher is nearly the one from the student itself
STANDARD_ERRORS = 2.0  # a teacher is called better or worse on the labels beyond this,
NLL_MARGIN = 0.02  # and beyond this many nats per token: many rows make any difference certain
SHARPER = 0.8  # clearly sharper: at most this share of the student's entropy,
AGREEING = 0.7  # and agreeing: the same likeliest token at least this often
CONFLICTS_OFTEN = 0.1  # too sure of other tokens: confident conflicts on more than this share of the tokens
FEW_ROWS = 8  # a standard error over fewer rows than this is itself a guess

PLACES = ("first third", "middle third", "last third", "end token")


@dataclass(frozen=True)
class Side:
    """A model on some tokens; means. nll: −log p of the label, nats. p: of the label. accuracy: the label is its
    likeliest token. entropy: nats."""

    nll: float
    p: float
    accuracy: float
    entropy: float


@dataclass(frozen=True)
class Place:
    """The tokens of one place in their answers. student, teacher and conflicts are None where there is no token."""

    name: str
    tokens: int
    student: Side | None
    teacher: Side | None
    conflicts: float | None


@dataclass(frozen=True)
class Conflict:
    """A label in which the teacher is often confident of another token.

    Attributes:
        token, text: the label. conflicts: how often. tokens: of how many. instead: what the teacher says there, the most
            frequent first: (id, text, how often).
    """

    token: int
    text: str
    conflicts: int
    tokens: int
    instead: tuple[tuple[int, str, int], ...]


@dataclass(frozen=True)
class EndToken:
    """Data and teacher end a text with different tokens.

    Attributes:
        data, data_text: the data's. teacher, teacher_text: the teacher's. setting: teacher_end_token.
        tokens: supervised tokens this touches. left_out: of these, those taught by their label alone.
    """

    data: int
    data_text: str
    teacher: int
    teacher_text: str
    setting: str
    tokens: int
    left_out: int


@dataclass(frozen=True)
class Agreement:
    """Student, teacher and labels compared; means over supervised tokens, entropies and KL in nats.

    Attributes:
        rows: rows (documents of a packed sequence) that have a token here. tokens: supervised tokens compared.
        student, teacher: each against the labels. nll_gap: the teacher's nll minus the student's.
        nll_gap_error: its standard error, tokens of a row taken together; None for a single row.
        top1_match: both have the same likeliest token.
        kl_teacher_student: KL(teacher ‖ student). kl_student_teacher: KL(student ‖ teacher).
        top_k_mass: k → share of the teacher's mass in its k likeliest tokens.
        cached_k, lost_mass, labels_outside_k: of a cached teacher: tokens kept, the mass outside them, and the share of
            labels among those outside, whose probability is the tail's. None for a live one.
        conflicts: share of tokens with the teacher confident (≥ CONFIDENT) of another token than the label.
        sides_with_teacher: share of these where the teacher's token is the student's likeliest; None without any.
        denied: share of tokens of which the teacher gives the label less than DENIED.
        places: the same by place in the answer; see PLACES. conflicting: labels with most conflicts.
        end_token: None where teacher and data end alike, or the teacher's is not known.
        own_average: the teacher is the student's own average, which starts as the student.
        other_templates: named teachers whose chat template is not the student's, in which they read the rows.
    """

    rows: int
    tokens: int
    student: Side
    teacher: Side
    nll_gap: float
    nll_gap_error: float | None
    top1_match: float
    kl_teacher_student: float
    kl_student_teacher: float
    top_k_mass: dict[int, float]
    cached_k: int | None
    lost_mass: float | None
    labels_outside_k: float | None
    conflicts: float
    sides_with_teacher: float | None
    denied: float
    places: tuple[Place, ...]
    conflicting: tuple[Conflict, ...]
    end_token: EndToken | None
    own_average: bool
    other_templates: tuple[str, ...] = ()

    # -- the verdict ---------------------------------------------------------------------------------------------

    @property
    def judgement(self) -> str:
        """ "identical", "misaligned", "helps" or "mixed", by the rules of thumb above."""
        if self.kl_teacher_student < IDENTICAL_KL:
            return "identical"
        if not self._alike_on_labels:
            return "misaligned" if self.nll_gap > 0 else "helps"
        sharper = self.teacher.entropy <= SHARPER * self.student.entropy and self.top1_match >= AGREEING
        return "helps" if sharper and not self.too_sure else "mixed"

    @property
    def too_sure(self) -> bool:
        """Whether the teacher is often confident of another token than the label."""
        return self.conflicts > CONFLICTS_OFTEN

    @property
    def verdict(self) -> str:
        """One line: what the figures suggest, those it rests on, and that it is a rule of thumb."""
        return f"{self._verdict()} (a rule of thumb{self._doubt()})"

    def _verdict(self) -> str:
        kl, match = f"KL(teacher‖student) {self.kl_teacher_student:.3g}", f"top-1 match {self.top1_match:.0%}"
        if self.judgement == "identical":
            why = " (it is the student's own average, which starts as the student)" if self.own_average else ""
            sentence = (
                f"nearly identical to the student{why}: {kl} is below {IDENTICAL_KL}, {match}; the target is nearly the "
                "one without a teacher"
            )
        elif self.judgement == "misaligned":
            sentence = (
                f"misaligned: it explains the labels worse than the student ({self._nlls()}), {kl}, {match}; it pulls "
                "away from the demonstrations"
            )
            if self.teacher.p > self.student.p:  # a few labels it denies outweigh many that it gives more
                sentence += (
                    f", although its mean p of the label is higher ({self.teacher.p:.3f} against {self.student.p:.3f}): "
                    "it may only be too sharp"
                )
        elif self.judgement == "helps" and self.nll_gap < 0 and not self._alike_on_labels:
            sentence = f"likely to help: it explains the labels better than the student ({self._nlls()}), {kl}, {match}"
        elif self.judgement == "helps":
            sentence = (
                f"likely to help: it is clearly sharper than the student (entropy {self.teacher.entropy:.3g} against "
                f"{self.student.entropy:.3g}) and agrees with it ({match}), {kl}; on the labels they are equal "
                f"({self._nlls()})"
            )
        else:
            sentence = f"mixed: on the labels no clear difference from the student ({self._nlls()}), {kl}, {match}"
        if self.too_sure:
            sentence += (
                f"; too sure of other tokens: confident of a token other than the label on {self.conflicts:.0%} of the "
                f"tokens, more than {CONFLICTS_OFTEN:.0%}"
            )
            if self.sides_with_teacher is not None:
                sentence += f" (the student sides with it on {self.sides_with_teacher:.0%} of these)"
        return sentence

    @property
    def _alike_on_labels(self) -> bool:
        error = math.inf if self.nll_gap_error is None else self.nll_gap_error
        return abs(self.nll_gap) <= max(NLL_MARGIN, STANDARD_ERRORS * error)

    def _doubt(self) -> str:
        if self.rows == 1:
            return ", and a single row has no standard error: look at more rows"
        return f", on {self.rows} rows only: look at more" if self.rows < FEW_ROWS else ""

    def _nlls(self) -> str:
        return f"nll {self.teacher.nll:.3f} against {self.student.nll:.3f}, {self._gap()}"

    def _gap(self) -> str:
        error = "unknown" if self.nll_gap_error is None else f"{self.nll_gap_error:.3f}"
        return f"{self.nll_gap:+.3f} ± {error}"

    # -- in words ------------------------------------------------------------------------------------------------

    def short(self) -> str:
        """One line for a log, before a step is trained."""
        kinds = {
            "identical": "nearly identical to the student",
            "misaligned": "misaligned with the labels",
            "helps": "likely to help",
            "mixed": "mixed",
        }
        sure = f", too sure of other tokens ({self.conflicts:.0%})" if self.too_sure else ""
        return (
            f"teacher check ({self.rows} rows, {self.tokens} tokens): nll of the labels {self.teacher.nll:.3f}, the "
            f"student's {self.student.nll:.3f} ({self._gap()}), top-1 match {self.top1_match:.0%}, KL(teacher‖student) "
            f"{self.kl_teacher_student:.3g}: {kinds[self.judgement]}{sure}, by rule of thumb"
        )

    def figures(self) -> list[tuple[str, str, str]]:
        """Lines of (what, the student's, the teacher's); a figure of both stands in the last, the second is empty."""
        s, t = self.student, self.teacher
        lines = [
            ("nll of the label", f"{s.nll:.3f}", f"{t.nll:.3f}"),
            ("mean p of the label", f"{s.p:.3f}", f"{t.p:.3f}"),
            ("the label is the likeliest", f"{s.accuracy:.1%}", f"{t.accuracy:.1%}"),
            ("entropy", f"{s.entropy:.3f}", f"{t.entropy:.3f}"),
            ("teacher's nll − student's, ± a standard error over rows", "", self._gap()),
            ("same likeliest token", "", f"{self.top1_match:.1%}"),
            ("KL(teacher‖student)", "", f"{self.kl_teacher_student:.4g}"),
            ("KL(student‖teacher)", "", f"{self.kl_student_teacher:.4g}"),
            *(
                (f"teacher's mass in its top {k}", "", f"{mass:.2%}" if mass < 0.99 else f"{mass:.4%}")
                for k, mass in self.top_k_mass.items()
            ),
        ]
        if self.cached_k is not None:
            lines += [
                (f"mass lost outside the cache's {self.cached_k}", "", f"{self.lost_mass:.3%}"),
                (f"labels outside the cache's {self.cached_k}", "", f"{self.labels_outside_k:.1%}"),
            ]
        lines.append((f"teacher gives a token other than the label {CONFIDENT} or more", "", f"{self.conflicts:.1%}"))
        if self.sides_with_teacher is not None:
            lines.append(("of these the student sides with the teacher", "", f"{self.sides_with_teacher:.0%}"))
        return [*lines, (f"teacher gives the label less than {DENIED}", "", f"{self.denied:.1%}")]

    def notes(self) -> list[str]:
        """Sentences on what was left out or is not the teacher's own."""
        notes = []
        if (end := self.end_token) is not None:
            what = {
                "label": "they are taught by their label alone and left out of all figures",
                "map": "the two are swapped in the teacher",
                "keep": "nothing is changed",
            }[end.setting]
            notes.append(
                f"the data end with {visible(end.data_text)} and the teacher with {visible(end.teacher_text)}, which "
                f"touches {end.tokens} tokens: {what} (teacher_end_token: {end.setting})"
            )
        if self.other_templates:
            notes.append(
                f"{', '.join(self.other_templates)} has another chat template than the student, and reads chats in the "
                "student's, which may be unknown to it"
            )
        if self.cached_k is not None:
            notes.append(
                "the teacher's mass outside the cache has the shape that teacher_tail sets, which affects most figures"
            )
        return notes

    def conflict_lines(self) -> list[tuple[str, str, str]]:
        """(the label, how often of how many, what instead) of the labels with most conflicts, fit for a terminal."""
        return [
            (
                visible(one.text),
                f"{one.conflicts} of {one.tokens}",
                ", ".join(f"{visible(text)} {count}" for _, text, count in one.instead),
            )
            for one in self.conflicting
        ]

    def to_dict(self) -> dict[str, Any]:
        """Every figure and the verdict, as JSON takes them; what is undefined is None."""
        return {
            **asdict(self),
            "top_k_mass": {str(k): mass for k, mass in self.top_k_mass.items()},
            "judgement": self.judgement,
            "too_sure": self.too_sure,
            "verdict": self.verdict,
        }
