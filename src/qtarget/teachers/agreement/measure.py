"""Do a run's teacher, its student and its labels agree on the run's own rows?

Rows come from the trainer's own preparation and the teacher is asked as in training, wherever it comes from. Dense
log-probabilities exist for a chunk of supervised tokens at a time and never for a batch; what is kept of a token is some
twenty numbers.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qtarget.data.text import text_of
from qtarget.errors import ConfigError, DataError
from qtarget.losses import TopK
from qtarget.losses.log_probs import log_probs
from qtarget.models.frozen import evaluation_mode
from qtarget.teachers import settings as teacher_settings
from qtarget.teachers.agreement.report import CONFIDENT, DENIED, PLACES, Agreement, Conflict, EndToken, Place, Side

if TYPE_CHECKING:
    from qtarget.training.trainer import QTargetTrainer

# Supervised tokens whose log-probabilities are formed at a time; [256, vocabulary] float32 is 50 MB at 49,152.
_CHUNK = 256

_MOST_CONFLICTING = 10


def measure(
    trainer: QTargetTrainer,
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


def before_training(trainer: QTargetTrainer) -> str:
    """The line a run prints on how far student and teacher agree."""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:  # the student is whole yet, and may not fit
        return "student and teacher are not compared here: run qtarget teacher check on one process"
    return measure(trainer, trainer.args.teacher_check_rows).short()


def estimate(trainer: QTargetTrainer, rows: int) -> tuple[int, int]:
    """(rows, supervised tokens) that ``measure`` will look at. Raises ConfigError as it does."""
    _check(trainer, rows, (1,))
    chosen = _rows(trainer, rows)
    tokens = sum(label != -100 for row in chosen for label in _labels(row))
    return sum(map(_documents_in, chosen)), tokens


def _check(trainer: QTargetTrainer, rows: int, top_k: Sequence[int]) -> None:
    for name, number in (("rows is", rows), *(("top_k holds", k) for k in top_k)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ConfigError(f"{name} {number!r}; use a whole number from 1")
    if not trainer.reads_teacher:
        raise ConfigError(
            f"target {trainer.objective} has no teacher to compare with; name a target that needs one, such as kd, and "
            "its teacher (teacher_model_name_or_path)"
        )


def _rows(trainer: QTargetTrainer, rows: int) -> list[dict[str, Any]]:
    """Prepared rows that hold about so many documents: evenly spaced, or the first of a stream."""
    dataset = trainer.train_dataset
    if not hasattr(dataset, "__len__"):
        taken: list[dict[str, Any]] = []
        documents = 0
        for row in dataset:
            taken.append(row)
            documents += _documents_in(row)
            if documents >= rows:
                break
        return taken
    chosen = [dataset[place] for place in evenly_spaced(len(dataset), rows)]
    documents = sum(map(_documents_in, chosen))
    if documents <= max(rows, len(chosen)):
        return chosen
    return [dataset[place] for place in evenly_spaced(len(dataset), -(-rows * len(chosen) // documents))]


def evenly_spaced(length: int, count: int) -> list[int]:
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

    def __init__(self, trainer: QTargetTrainer, top_k: list[int]):
        assert trainer.aux.teacher is not None
        self.trainer, self.teacher = trainer, trainer.aux.teacher
        self.top_k = [k for k in top_k if k <= trainer.vocab_size]
        self.cached_k: int | None = None
        self.end: int | None = trainer.tokenizer.eos_token_id
        self.chunks: list[dict[str, Tensor]] = []
        self.documents = self.touched = 0

    def add(self, rows: list[dict[str, Any]]) -> None:
        trainer = self.trainer
        batch = trainer.batch(rows)
        heads = trainer.ask(batch, {"student", "teacher"})
        student, teacher = heads["student"], heads["teacher"]
        if isinstance(teacher, TopK) and self.cached_k is None:
            self.cached_k = teacher.ids.shape[-1]
            self.top_k = [*(k for k in self.top_k if k < self.cached_k), self.cached_k]
        document = batch.documents() + self.documents
        self.documents = int(document.max()) + 1
        shifted, document = batch.shifted, document[:, 1:]
        compared = shifted != -100
        if self._ends_differ:
            self.touched += int(shifted.eq(torch.tensor(self.end)).sum())
            if trainer.label_only_token is not None:
                compared &= shifted != trainer.label_only_token
        places = compared.nonzero(as_tuple=True)
        for at in zip(*(place.split(_CHUNK) for place in places), strict=True):
            log_p = log_probs(student, at, trainer.vocab_size)
            log_t = log_probs(teacher, at, trainer.vocab_size, log_p)
            kept = (teacher.ids[at].long(), teacher.log_tail()[at]) if isinstance(teacher, TopK) else None
            figures = _of_chunk(log_p, log_t, kept, shifted[at], self.top_k)
            self.chunks.append(on_cpu({**figures, "row": document[at], "label": shifted[at]}))

    @property
    def _ends_differ(self) -> bool:
        return self.teacher.ends_with not in (None, self.end) and self.end is not None

    def agreement(self, rows: int) -> Agreement:
        if not any(len(chunk["row"]) for chunk in self.chunks):
            raise DataError(
                f"rows is {rows}, and none of the rows used has a supervised token that the teacher is asked about; "
                "use more rows, or check completion_only_loss, assistant_only_loss and max_length"
            )
        tokens = joined(self.chunks)
        for who in ("student", "teacher"):
            if bool(torch.isnan(tokens[f"{who}_entropy"]).any()):
                field = "model_init_kwargs" if who == "student" else "teacher_model_init_kwargs"
                raise ConfigError(
                    f"the {who} gives NaN for one of the rows used; check the rows, or load it in float32 or bfloat16 "
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
            top_k_mass={k: min(1.0, _mean(tokens["mass"][:, place])) for place, k in enumerate(self.top_k)},
            cached_k=self.cached_k,
            lost_mass=_mean(tokens["lost"]) if cached else None,
            labels_outside_k=_mean(tokens["outside"]) if cached else None,
            conflicts=_mean(conflict),
            sides_with_teacher=_mean(sides[conflict]) if bool(conflict.any()) else None,
            denied=_mean(tokens["teacher_log_p"] < math.log(DENIED)),
            places=tuple(self._places(tokens, conflict)),
            conflicting=tuple(self._conflicting(tokens, conflict)),
            end_token=self._end_token(),
            own_average=self.teacher.average is not None,
            other_templates=teacher_settings.other_templates(self.trainer.args, self.trainer.tokenizer),
        )

    def _places(self, tokens: dict[str, Tensor], conflict: Tensor) -> Iterable[Place]:
        where = _thirds(tokens["row"], torch.zeros_like(conflict) if self.end is None else tokens["label"] == self.end)
        for number, name in enumerate(PLACES):
            here = where == number
            if not bool(here.any()):
                yield Place(name, 0, None, None, None)
                continue
            part = {key: values[here] for key, values in tokens.items()}
            yield Place(name, int(here.sum()), _side(part, "student"), _side(part, "teacher"), _mean(conflict[here]))

    def _conflicting(self, tokens: dict[str, Tensor], conflict: Tensor) -> Iterable[Conflict]:
        def text(index: int) -> str:
            return text_of(self.trainer.tokenizer, index)

        labels, instead = tokens["label"][conflict].tolist(), tokens["teacher_top"][conflict].tolist()
        everywhere = Counter(tokens["label"].tolist())
        counts = Counter(labels)
        for label in sorted(counts, key=lambda index: (-counts[index], index))[:_MOST_CONFLICTING]:
            others = Counter(top for own, top in zip(labels, instead, strict=True) if own == label)
            often = sorted(others.items(), key=lambda item: (-item[1], item[0]))[:3]
            named = tuple((top, text(top), count) for top, count in often)
            yield Conflict(label, text(label), counts[label], everywhere[label], named)

    def _end_token(self) -> EndToken | None:
        if not self._ends_differ:
            return None
        tokenizer, setting = self.trainer.tokenizer, self.trainer.args.teacher_end_token
        own, other = self.end, self.teacher.ends_with
        assert own is not None and other is not None
        left_out = 0 if self.trainer.label_only_token is None else self.touched
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
        kept_p = t.gather(1, kept[0])
        largest = kept_p.sort(-1, descending=True).values
        top = kept[0].gather(1, kept_p.argmax(-1, keepdim=True)).squeeze(1)
    figures = {
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
        "mass": largest.cumsum(-1)[:, [k - 1 for k in top_k]],
    }
    if kept is not None:
        figures["lost"] = kept[1].float().exp()
        figures["outside"] = (kept[0] != at_label).all(-1)
    return figures


def on_cpu(columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: values.cpu() for name, values in columns.items()}


def joined(chunks: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The columns of all chunks of tokens, those of numbers with a point in float64."""
    columns = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
    return {name: values.double() if values.is_floating_point() else values for name, values in columns.items()}


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
