"""Does a run's teacher agree with its student and with its labels, on the run's own rows, and is it likely to help?

Rows come from the trainer's own preparation and the teacher is asked as in training, wherever it comes from. Dense
log-probabilities exist for a chunk of supervised tokens at a time and never for a batch; what is kept of a token is some
twenty numbers.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from qtarget.errors import ConfigError
from qtarget.losses import TopK
from qtarget.losses.log_probs import log_probs
from qtarget.teachers.frozen import evaluation_mode

# Supervised tokens whose log-probabilities are formed at a time; [256, vocabulary] float32 is 50 MB at 49,152.
_CHUNK = 256

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
_MOST_CONFLICTING = 10


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

    # -- the verdict ---------------------------------------------------------------------------------------------

    @property
    def judgement(self) -> str:
        """ "identical", "misaligned", "helps" or "mixed", by the rules of thumb above."""
        if self.kl_teacher_student < IDENTICAL_KL:
            return "identical"
        certain = self.nll_gap_error is not None and abs(self.nll_gap) > STANDARD_ERRORS * self.nll_gap_error
        if certain and abs(self.nll_gap) > NLL_MARGIN:
            return "misaligned" if self.nll_gap > 0 else "helps"
        return "helps" if self._sharper and not self.too_sure else "mixed"

    @property
    def _sharper(self) -> bool:
        return self.teacher.entropy <= SHARPER * self.student.entropy and self.top1_match >= AGREEING

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
            said = (
                f"nearly identical to the student{why}: {kl} is below {IDENTICAL_KL}, {match}; the target is nearly the "
                "one without a teacher"
            )
        elif self.judgement == "misaligned":
            said = (
                f"misaligned: it explains the labels worse than the student ({self._nlls()}), {kl}, {match}; it pulls "
                "away from the demonstrations"
            )
            if self.teacher.p > self.student.p:  # a few labels it denies outweigh many that it gives more
                said += (
                    f", although its mean p of the label is higher ({self.teacher.p:.3f} against {self.student.p:.3f}): "
                    "it may only be too sharp"
                )
        elif self.judgement == "helps" and self.nll_gap < 0 and not self._undecided:
            said = f"likely to help: it explains the labels better than the student ({self._nlls()}), {kl}, {match}"
        elif self.judgement == "helps":
            said = (
                f"likely to help: it is clearly sharper than the student (entropy {self.teacher.entropy:.3g} against "
                f"{self.student.entropy:.3g}) and agrees with it ({match}), {kl}; on the labels alike ({self._nlls()})"
            )
        else:
            said = f"mixed: on the labels no clear difference to the student ({self._nlls()}), {kl}, {match}"
        if self.too_sure:
            said += (
                f"; too sure of other tokens: confident of another token than the label on {self.conflicts:.0%} of the "
                f"tokens, more than {CONFLICTS_OFTEN:.0%}"
            )
            if self.sides_with_teacher is not None:
                said += f" (the student sides with it on {self.sides_with_teacher:.0%} of these)"
        return said

    @property
    def _undecided(self) -> bool:
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
        lines.append((f"teacher gives another token than the label {CONFIDENT} or more", "", f"{self.conflicts:.1%}"))
        if self.sides_with_teacher is not None:
            lines.append(("of these the student sides with the teacher", "", f"{self.sides_with_teacher:.0%}"))
        return [*lines, (f"teacher gives the label less than {DENIED}", "", f"{self.denied:.1%}")]

    def notes(self) -> list[str]:
        """Sentences on what was left out or is not the teacher's own."""
        notes = []
        if (end := self.end_token) is not None:
            what = {
                "label": "they are taught by their label alone and left out of all figures",
                "map": "the two are exchanged in the teacher",
                "keep": "nothing is done about it",
            }[end.setting]
            notes.append(
                f"the data end with {_visible(end.data_text)} and the teacher with {_visible(end.teacher_text)}, which "
                f"touches {end.tokens} tokens: {what} (teacher_end_token: {end.setting})"
            )
        if self.cached_k is not None:
            notes.append(
                "the teacher's mass outside the cache has the shape that teacher_tail says, which most figures contain"
            )
        return notes

    def lines(self) -> list[str]:
        """All figures as plain text, a line each; the verdict comes last."""
        said = [f"{self.rows} rows, {self.tokens} supervised tokens: student | teacher"]
        for what, student, teacher in self.figures():
            said.append(f"  {what}: " + (f"{student} | {teacher}" if student else teacher))
        said.append("by place in the answer: nll, p, likeliest of the student | of the teacher, conflicts")
        for place in self.places:
            if place.student is None or place.teacher is None:
                said.append(f"  {place.name}: no tokens")
                continue
            sides = " | ".join(
                f"{side.nll:.3f} {side.p:.3f} {side.accuracy:.0%}" for side in (place.student, place.teacher)
            )
            said.append(f"  {place.name}: {place.tokens} tokens, {sides}, {place.conflicts:.0%}")
        if self.conflicting:
            said.append("labels with most conflicts, and what the teacher says instead")
            said += [f"  {label}: {often}, {instead}" for label, often, instead in self.conflict_lines()]
        return [*said, *(f"note: {note}" for note in self.notes()), f"verdict: {self.verdict}"]

    def conflict_lines(self) -> list[tuple[str, str, str]]:
        """(the label, how often of how many, what instead) of the labels with most conflicts, fit for a terminal."""
        return [
            (
                _visible(one.text),
                f"{one.conflicts} of {one.tokens}",
                ", ".join(f"{_visible(text)} {count}" for _, text, count in one.instead),
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


# -- measuring ---------------------------------------------------------------------------------------------------


def measure(
    trainer: Any,
    rows: int,
    top_k: Sequence[int] = (1, 16, 64),
    progress: Callable[[int], object] = lambda done: None,
) -> Agreement:
    """Compare the teacher of a trainer with its student and with the labels of its training rows.

    Nothing is trained and nothing is changed: no gradient, evaluation mode for the duration, no optimiser step counted.

    Args:
        trainer: a QTargetTrainer whose teacher is loaded, or read from a cache.
        rows: how many rows, evenly spread over the training set, or the first of a stream. Documents of packed
            sequences count as rows, and sequences are taken whole.
        top_k: k of ``top_k_mass``; of a cached teacher those up to its own k, and that.
        progress: called with the number of prepared rows done.

    Raises:
        ConfigError: no teacher, numbers that make no sense, no supervised token, or NaN from a model.
    """
    _check(trainer, rows, top_k)
    chosen = sorted(_rows(trainer, rows), key=lambda row: len(row["input_ids"]))  # less padding
    size = trainer.args.per_device_train_batch_size  # what trains in this memory can be compared in it
    tally = _Tally(trainer, sorted(set(top_k)))
    with torch.no_grad(), evaluation_mode(trainer.model):
        for begin in range(0, len(chosen), size):
            tally.add(chosen[begin : begin + size])
            progress(min(begin + size, len(chosen)))
    return tally.agreement(rows)


def estimate(trainer: Any, rows: int) -> tuple[int, int]:
    """(rows, supervised tokens) that ``measure`` will look at. Raises ConfigError as it does."""
    _check(trainer, rows, (1,))
    chosen = _rows(trainer, rows)
    tokens = sum(label != -100 for row in chosen for label in _labels(row))
    return sum(map(_documents_in, chosen)), tokens


def _check(trainer: Any, rows: int, top_k: Sequence[int]) -> None:
    for name, number in (("rows is", rows), *(("top_k holds", k) for k in top_k)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ConfigError(f"{name} {number!r}; use a whole number from 1")
    if not trainer.reads_teacher:
        raise ConfigError(
            f"target {trainer._objective} has no teacher to compare with; name a target that asks one, such as kd, and "
            "its teacher (teacher_model_name_or_path)"
        )


def _rows(trainer: Any, rows: int) -> list[dict[str, Any]]:
    """Prepared rows that hold about so many documents: evenly spread, or the first of a stream."""
    dataset = trainer.train_dataset
    if not hasattr(dataset, "__len__"):
        taken: list[dict[str, Any]] = []
        documents = 0
        stream = iter(dataset)
        while documents < rows and (row := next(stream, None)) is not None:
            taken.append(row)
            documents += _documents_in(row)
        return taken
    chosen = [dataset[place] for place in spread(len(dataset), rows)]
    documents = sum(map(_documents_in, chosen))
    if documents <= max(rows, len(chosen)):
        return chosen
    return [dataset[place] for place in spread(len(dataset), -(-rows * len(chosen) // documents))]


def spread(length: int, count: int) -> list[int]:
    """Up to ``count`` places of ``length``, evenly spread and the same on every call."""
    count = min(length, count)
    return [number * length // count for number in range(count)]


def _documents_in(row: dict[str, Any]) -> int:
    return len(row["seq_lengths"]) if row.get("seq_lengths") is not None else 1


def _labels(row: dict[str, Any]) -> list[int]:
    """Labels of a prepared row that are trained: nothing predicts the first token of a document."""
    labels = list(row["labels"])
    lengths = row.get("seq_lengths")
    firsts = {0} if lengths is None else {0, *itertools.accumulate(lengths)}
    return [label for place, label in enumerate(labels) if place not in firsts]


class _Tally:
    """What is kept of each supervised token, and the figures made of it."""

    def __init__(self, trainer: Any, top_k: list[int]):
        self.trainer, self.others = trainer, trainer._others
        self.top_k = [k for k in top_k if k <= trainer._vocab_size]
        self.cached_k: int | None = None
        self.end: int | None = trainer._tokenizer.eos_token_id
        self.parts: dict[str, list[Tensor]] = {}
        self.documents = self.touched = 0

    def add(self, rows: list[dict[str, Any]]) -> None:
        trainer = self.trainer
        inputs = trainer._prepare_inputs(trainer.data_collator([dict(row) for row in rows]))
        labels = inputs.pop("labels")
        columns = trainer.take_columns(inputs)
        teacher = self.others.heads(trainer.model, inputs, frozenset({"teacher"}), labels, columns)["teacher"]
        student = self.others._head(trainer.model, inputs)
        if isinstance(teacher, TopK):
            self.cached_k = teacher.ids.shape[-1]
        document = _document_of(inputs, labels) + self.documents
        self.documents = int(document.max()) + 1
        shifted, document = labels[:, 1:], document[:, 1:]
        asked = shifted != -100
        if self._ends_differ:
            self.touched += int((shifted == self.end).sum())
            if trainer._label_only is not None:
                asked = asked & (shifted != trainer._label_only)
        places = asked.nonzero(as_tuple=True)
        for begin in range(0, len(places[0]), _CHUNK):
            at = tuple(place[begin : begin + _CHUNK] for place in places)
            log_p = log_probs(student, at, trainer._vocab_size)
            log_t = log_probs(teacher, at, trainer._vocab_size, log_p)
            kept = (teacher.ids[at].long(), teacher.log_tail()[at]) if isinstance(teacher, TopK) else None
            made = _of_chunk(log_p, log_t, kept, shifted[at], self._ks())
            for name, values in {**made, "row": document[at], "label": shifted[at]}.items():
                values = values.cpu()
                self.parts.setdefault(name, []).append(values.double() if values.is_floating_point() else values)

    @property
    def _ends_differ(self) -> bool:
        return self.others.ends_with not in (None, self.end) and self.end is not None

    def _ks(self) -> list[int]:
        if self.cached_k is None:
            return self.top_k
        return [*(k for k in self.top_k if k < self.cached_k), self.cached_k]

    def agreement(self, rows: int) -> Agreement:
        if not self.parts:
            raise ConfigError(
                f"rows is {rows}, and none of the rows looked at has a supervised token that the teacher is asked about; "
                "look at more rows, or check completion_only_loss, assistant_only_loss and max_length"
            )
        tokens = {name: torch.cat(parts) for name, parts in self.parts.items()}
        for who in ("student", "teacher"):
            if bool(torch.isnan(tokens[f"{who}_entropy"]).any()):
                field = "model_init_kwargs" if who == "student" else "teacher_model_init_kwargs"
                raise ConfigError(
                    f"the {who} gives NaN for a row looked at; check the rows, or load it in float32 or bfloat16 "
                    f"({field}: {{dtype: ...}})"
                )
        conflict = (tokens["teacher_top_p"] >= CONFIDENT) & (tokens["teacher_top"] != tokens["label"])
        sides = tokens["student_top"] == tokens["teacher_top"]
        gap = tokens["student_log_p"] - tokens["teacher_log_p"]
        mean_gap, error = _clustered(gap, tokens["row"])
        cached = self.cached_k is not None
        return Agreement(
            rows=len(tokens["row"].unique()),
            tokens=len(gap),
            student=_side(tokens, "student"),
            teacher=_side(tokens, "teacher"),
            nll_gap=mean_gap,
            nll_gap_error=error,
            top1_match=_mean(sides),
            kl_teacher_student=_mean(tokens["kl_teacher_student"]),
            kl_student_teacher=_mean(tokens["kl_student_teacher"]),
            top_k_mass={k: min(1.0, _mean(tokens["mass"][:, place])) for place, k in enumerate(self._ks())},
            cached_k=self.cached_k,
            lost_mass=_mean(tokens["lost"]) if cached else None,
            labels_outside_k=_mean(tokens["outside"]) if cached else None,
            conflicts=_mean(conflict),
            sides_with_teacher=_mean(sides[conflict]) if bool(conflict.any()) else None,
            denied=_mean(tokens["teacher_log_p"] < math.log(DENIED)),
            places=tuple(self._places(tokens, conflict)),
            conflicting=tuple(self._conflicting(tokens, conflict)),
            end_token=self._end_token(),
            own_average=self.others.average is not None,
        )

    def _places(self, tokens: dict[str, Tensor], conflict: Tensor) -> Iterable[Place]:
        where = _thirds(tokens["row"], torch.zeros_like(conflict) if self.end is None else tokens["label"] == self.end)
        for number, name in enumerate(PLACES):
            here = where == number
            if not bool(here.any()):
                yield Place(name, 0, None, None, None)
                continue
            own = {key: values[here] for key, values in tokens.items()}
            yield Place(name, int(here.sum()), _side(own, "student"), _side(own, "teacher"), _mean(conflict[here]))

    def _conflicting(self, tokens: dict[str, Tensor], conflict: Tensor) -> Iterable[Conflict]:
        # training asks lens only here: lens is built on training
        from qtarget.lens.capture import text_of

        def text(index: int) -> str:
            return text_of(self.trainer._tokenizer, index)

        labels, instead = tokens["label"][conflict].tolist(), tokens["teacher_top"][conflict].tolist()
        everywhere = Counter(tokens["label"].tolist())
        counts = Counter(labels)
        for label in sorted(counts, key=lambda index: (-counts[index], index))[:_MOST_CONFLICTING]:
            said = Counter(top for own, top in zip(labels, instead, strict=True) if own == label)
            often = sorted(said.items(), key=lambda item: (-item[1], item[0]))[:3]
            others = tuple((top, text(top), count) for top, count in often)
            yield Conflict(label, text(label), counts[label], everywhere[label], others)

    def _end_token(self) -> EndToken | None:
        if not self._ends_differ:
            return None
        from qtarget.lens.capture import text_of

        tokenizer, setting = self.trainer._tokenizer, self.trainer.args.teacher_end_token
        own, other = self.end, self.others.ends_with
        assert own is not None
        left_out = 0 if self.trainer._label_only is None else self.touched
        return EndToken(own, text_of(tokenizer, own), other, text_of(tokenizer, other), setting, self.touched, left_out)


def _of_chunk(
    log_p: Tensor, log_t: Tensor, kept: tuple[Tensor, Tensor] | None, labels: Tensor, top_k: list[int]
) -> dict[str, Tensor]:
    """What is kept of c tokens: [c] each, and mass [c, len(top_k)].

    Args:
        log_p, log_t: [c, vocab], the student's and the teacher's. kept: ids [c, k] and log of the rest [c] of a cached
            teacher. labels: [c].
    """
    p, t, gap = log_p.exp(), log_t.exp(), log_t - log_p
    at_label = labels[:, None]
    if kept is None:
        largest = t.topk(max(top_k, default=1), dim=-1).values
        top = t.argmax(-1)
    else:  # a tail in the student's shape may peak higher, on a token that is not the teacher's
        own = t.gather(1, kept[0])
        largest = own.sort(-1, descending=True).values
        top = kept[0].gather(1, own.argmax(-1, keepdim=True)).squeeze(1)
    cumulated = largest.cumsum(-1)
    made = {
        "student_log_p": log_p.gather(1, at_label).squeeze(1),
        "teacher_log_p": log_t.gather(1, at_label).squeeze(1),
        "student_top": log_p.argmax(-1),
        "teacher_top": top,
        "teacher_top_p": largest[:, 0],
        "student_entropy": -(p * log_p).sum(-1),
        "teacher_entropy": -(t * log_t).sum(-1),
        # Rounding leaves some 1e-7 on either side of 0.
        "kl_teacher_student": (t * gap).sum(-1).clamp(min=0),
        "kl_student_teacher": -(p * gap).sum(-1).clamp(max=0),
        "mass": cumulated[:, [k - 1 for k in top_k]],
    }
    if kept is not None:
        made["lost"] = kept[1].float().exp()
        made["outside"] = (kept[0] != at_label).all(-1)
    return made


def _document_of(inputs: dict[str, Any], labels: Tensor) -> Tensor:
    """[B, T]: the number of each token's document in the batch; a padded row is one."""
    starts = torch.zeros_like(labels)
    if "position_ids" in inputs:
        starts = (inputs["position_ids"] == 0).expand(labels.shape).long()
    starts[:, 0] = 1
    return starts.flatten().cumsum(0).view(labels.shape) - 1


def _thirds(row: Tensor, end: Tensor) -> Tensor:
    """[n]: 0, 1 or 2 for the third of its row's tokens a token is in, end tokens not counted; 3 for an end token.

    Tokens of a row stand together and in order.
    """
    where = torch.full_like(row, 3)
    _, counts = row[~end].unique_consecutive(return_counts=True)
    first = counts.cumsum(0) - counts
    number = torch.arange(int(counts.sum())) - first.repeat_interleave(counts)
    where[~end] = 3 * number // counts.repeat_interleave(counts)
    return where


def _clustered(values: Tensor, row: Tensor) -> tuple[float, float | None]:
    """Mean over tokens and its standard error with tokens of a row taken together: of a ratio of two sums over rows."""
    mean = values.mean()
    _, number = row.unique(return_inverse=True)
    rows = int(number.max()) + 1
    if rows == 1:
        return float(mean), None
    residual = torch.zeros(rows, dtype=values.dtype).index_add(0, number, values - mean)
    return float(mean), float((residual.square().sum() * rows / (rows - 1)).sqrt() / len(values))


def _side(tokens: dict[str, Tensor], who: str) -> Side:
    log_p = tokens[f"{who}_log_p"]
    return Side(
        nll=-_mean(log_p),
        p=_mean(log_p.exp()),
        accuracy=_mean(tokens[f"{who}_top"] == tokens["label"]),
        entropy=_mean(tokens[f"{who}_entropy"]),
    )


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


def _visible(text: str) -> str:
    from qtarget.lens.terminal import visible

    return visible(text)
