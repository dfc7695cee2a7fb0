"""What a trainer should give, calculated in float64 without any of the trainer's own code.

A document is forwarded alone, without padding, neighbours or chunks, through ``model(input_ids).logits``; the loss is
``qtarget.target_loss`` in float64 and its gradient is autograd's. Teacher and reference are asked the same way.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qtarget.data.batch import Batch
from qtarget.data.columns import REFERENCE, columns_for, columns_of
from qtarget.losses import Head, TopK, target_distribution, target_loss
from qtarget.losses.log_probs import importance_weight
from qtarget.models.forward import HeadTransform
from qtarget.models.frozen import adapters_off
from qtarget.targets import Target, presets
from qtarget.verification.subject import Given, Gradient, Row, Sample, Subject, supervised

_NOTHING = 1e-5  # of plain SFT's gradient: what float32 leaves of p − p
_TILE = 8192  # rows of the head cast to float64 at a time


@dataclass
class Document:
    """Supervised tokens of one row.

    Attributes:
        places: [n] of the labels in the row. labels: [n]. logits: [n, V], the student's own. given: what else its loss
            reads, by its names in ``target_loss``: logits [n, V'] of teacher and reference, columns [n].
    """

    places: Tensor
    labels: Tensor
    logits: Tensor
    given: Given


class Expected:
    """What a subject's trainer should give. ``subject``: what is verified."""

    def __init__(self, subject: Subject):
        self.subject = subject
        self.trainer, self.model, self.device = subject.trainer, subject.model, subject.device

    # -- documents -----------------------------------------------------------------------------------------------

    def document(self, row: Row) -> Document:
        """A row through the models' own forward, with the student's graph where one is being recorded."""
        ids = torch.tensor([row["input_ids"]], device=self.device)
        places = torch.tensor(supervised(row), device=self.device, dtype=torch.int64)
        labels = torch.tensor(row["labels"], device=self.device)
        logits = own_logits(self.model, {"input_ids": ids})[0, places - 1]
        document = Document(places, labels[places], logits, {})
        with torch.no_grad():
            document.given |= self._models(row, ids, labels, document)
            document.given |= self._columns(row, document)
        return document

    def _models(self, row: Row, ids: Tensor, labels: Tensor, document: Document) -> Given:
        given, args, aux = {}, self.trainer.args, self.trainer.aux
        before = document.places - 1
        if "teacher" in self.subject.requires:
            assert aux.teacher is not None
            columns = self.trainer.rows.batch(self.trainer.data_collator([dict(row)])).columns
            batch = Batch({"input_ids": ids}, labels[None], columns)
            teacher = aux.teacher.logits(own_logits, self.model, batch, (torch.zeros_like(before), before))
            given["teacher_logits"] = self.dense(teacher, document.logits) if isinstance(teacher, TopK) else teacher
        if "reference" in args.models_for(self.subject.requires) and not self.trainer.reads_reference_column:
            # Before the first step the adapters are as they started; weights put in place would break the graph.
            off = aux.reference is None and aux.start is None
            with adapters_off(self.model) if off else contextlib.nullcontext():
                model = self.model if aux.reference is None else aux.reference.model
                given["reference_logits"] = own_logits(model, {"input_ids": ids})[0, before]
        return given

    def dense(self, head: Head | TopK, student: Tensor) -> Tensor:
        """[n, real] float64 logits at n positions; k kept tokens as documented: the rest of the mass in the student's
        shape, or evenly.

        ``student``: [n, V] the student's own logits.
        """
        if isinstance(head, Head):
            return logits_of(head)
        ids, kept = head.ids.long().to(self.device), head.logprobs.double().to(self.device)
        log_tail = head.tail_logprob
        log_tail = torch.log1p(-kept.exp().sum(-1).clamp(max=1)) if log_tail is None else log_tail.double()
        log_p = student[:, : self.subject.vocab].double().log_softmax(-1)
        shape = log_p if head.tail == "student" else torch.zeros_like(log_p)
        shape = shape.scatter(1, ids, -math.inf).log_softmax(-1)
        return (log_tail.to(self.device)[:, None] + shape).scatter(1, ids, kept)

    def _columns(self, row: Row, document: Document) -> Given:
        args, needed = self.trainer.args, columns_for(self.subject.requires)

        def column(name: str) -> Tensor:
            return torch.tensor(row[name], dtype=torch.float64, device=self.device)[document.places]

        columns = {name: column(name) for name in needed if name in row}
        log_p = label_log_p(document.logits, document.labels)
        if "old_logps" in needed and args.psft_refresh != "never":  # copied just now: r = 1
            columns["old_logps"] = log_p
        if "weight" in needed and args.weights == "online":
            if self.trainer.reads_reference_column:
                reference = column(REFERENCE)
            else:
                reference = label_log_p(document.given["reference_logits"], document.labels)
            weight = importance_weight((log_p - reference).mean(), args.weights_temperature)
            columns["weight"] = weight.expand(len(log_p))
        return columns

    # -- gradients -----------------------------------------------------------------------------------------------

    def denominator(self, rows: Sequence[Row]) -> int:
        """Of a step over the rows: supervised labels; with "kept" those that no column puts at 0."""
        total = 0
        for row in rows:
            for place in supervised(row):
                target = self.subject.targets[self.subject.number_of(row, place)]
                masks = {"weight", "critical"} & set(columns_of(target))
                total += self.trainer.args.denominator != "kept" or all(row[name][place] != 0 for name in masks)
        return max(1, total)

    def gradient(self, rows: Sequence[Row]) -> Gradient:
        """Of a step over some rows: autograd through each document alone, the loss in float64."""
        subject, count = self.subject, self.denominator(rows)
        subject.model.zero_grad(set_to_none=True)
        with subject.without_dropout(), torch.enable_grad():
            for row in rows:
                self._loss(row).div(count).backward()
        return subject.taken()

    def _loss(self, row: Row) -> Tensor:
        document = self.document(row)
        numbers = torch.tensor([self.subject.number_of(row, place) for place in document.places.tolist()])
        logits = document.logits.double()
        loss = logits.new_zeros(())
        for number in numbers.unique().tolist():
            target = self.subject.targets[number]
            labels = document.labels.masked_fill((numbers != number).to(self.device), -100)
            given = self._given(logits, target, document.given)
            out = target_loss(logits, labels, target, z_loss=self.trainer.args.z_loss, reduction="sum", **given)
            loss = loss + out.loss
        return loss

    def _given(self, logits: Tensor, target: Target, given: Given) -> dict[str, Any]:
        """Of what there is, what the target reads."""
        names = {*columns_of(target), *(f"{name}_logits" for name in target.requires)}
        read = {name: value.double() for name, value in given.items() if name in names}
        return {**read, "vocab_size": min(self.subject.vocab, logits.shape[-1])}

    # -- a few tokens --------------------------------------------------------------------------------------------

    def given(self, sample: Sample) -> Given:
        """What the loss of a sample's tokens reads, as ``Document.given``, from the documents they are of."""
        parts = []
        with self.subject.without_dropout(), torch.no_grad():
            for row in sample.row.unique_consecutive().tolist():
                document = self.document(self.subject.rows[row])
                at = torch.searchsorted(document.places, sample.place[sample.row == row].to(self.device))
                parts.append({name: value[at].double() for name, value in document.given.items()})
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def hidden_gradient(
        self, sample: Sample, given: Given, logits: Tensor | None = None, z_loss: float = 0.0
    ) -> Tensor:
        """dH [n, d] float64 of the summed loss of a sample: (p − Q) through the student's head.

        ``logits``: [n, V] in place of those that the student's states give. ``z_loss``: c, which adds 2 c lse p.
        """
        logits = logits_of(sample.student) if logits is None else logits
        Q = target_distribution(logits, sample.labels, sample.target, **self._given(logits, sample.target, given))
        p = logits.softmax(-1)
        return through_head(sample.student, logits, p - Q + 2 * z_loss * logits.logsumexp(-1, keepdim=True) * p)

    def is_nothing(self) -> bool:
        """Whether neither the target nor the trainer has a gradient beyond rounding, held against plain SFT's."""
        sizes = torch.zeros(3, dtype=torch.float64)
        for sample in self.subject.samples:
            given, sft = self.given(sample), replace(sample, target=presets.build("sft"))
            wanted = self.hidden_gradient(sample, given, z_loss=self.trainer.args.z_loss)
            got = sample.gradient.double() * self.denominator(self.subject.rows)
            parts = (wanted, got, self.hidden_gradient(sft, given))
            sizes += torch.stack([part.square().sum().cpu() for part in parts])
        target, trained, label = sizes.sqrt().tolist()
        return max(target, trained) <= _NOTHING * label


def own_logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    """[B, T, V] by a model's own forward, whatever virtual tokens it puts first."""
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
    return model(**inputs).logits[:, -inputs["input_ids"].shape[1] :]


def logits_of(head: Head) -> Tensor:
    """[n, V] float64 of a head's states; the loss is looked at, and not how they came about."""
    hidden = head.hidden.double()
    logits = torch.cat([hidden @ piece.double().T for piece in head.weight[: head.width].split(_TILE)], 1)
    if head.bias is not None:
        logits = logits + head.bias[: head.width].double()
    return HeadTransform(head.logit_scale, head.logit_softcap).apply(logits)


def through_head(head: Head, logits: Tensor, g: Tensor) -> Tensor:
    """dH [n, d] float64 of a gradient g [n, V] on a head's logits: back through the softcap and the weight."""
    if head.logit_softcap is not None:
        g = g * (1 - (logits / head.logit_softcap).square())
    pieces = zip(g.split(_TILE, 1), head.weight.split(_TILE), strict=True)
    return torch.stack([part @ piece.double() for part, piece in pieces]).sum(0) * head.logit_scale


def label_log_p(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.double().log_softmax(-1).gather(-1, labels.to(logits.device)[:, None]).squeeze(-1)
