"""What a trainer should give, worked out in float64 from nothing of the trainer's own.

A document is forwarded alone, without padding, neighbours or chunks, through ``model(input_ids).logits``; the loss is
``qtarget.target_loss`` in float64 and its gradient is autograd's. Teacher and reference are asked the same way.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qtarget.data.batch import Batch
from qtarget.data.columns import REFERENCE, columns_for, columns_of
from qtarget.losses import Head, TopK, target_distribution, target_loss
from qtarget.losses.log_probs import importance_weight
from qtarget.models.forward import HeadTransform, head_parameters
from qtarget.models.frozen import adapters_off
from qtarget.targets import Target
from qtarget.verification.subject import Gradient, Row, Subject

_TILE = 8192  # rows of the head cast to float64 at a time


@dataclass
class Document:
    """Supervised tokens of one row.

    Attributes:
        places: [n] of the labels in the row. labels: [n]. logits: [n, V], the student's own. others: teacher and
            reference, [n, V'] logits. columns: weight, critical and old_logps, [n] each.
    """

    places: Tensor
    labels: Tensor
    logits: Tensor
    others: dict[str, Tensor]
    columns: dict[str, Tensor]


class Oracle:
    """Args: subject: what is verified."""

    def __init__(self, subject: Subject):
        self.subject = subject
        self.trainer, self.model, self.device = subject.trainer, subject.model, subject.device

    # -- documents -----------------------------------------------------------------------------------------------

    def document(self, row: Row) -> Document:
        """A row through the models' own forward, with the student's graph where one is being recorded."""
        labels = torch.tensor(row["labels"], device=self.device)
        places = (labels != -100).nonzero().flatten()
        places = places[places > 0]  # nothing predicts the first token
        ids = torch.tensor([row["input_ids"]], device=self.device)
        logits = self.logits(self.model, ids)[0, places - 1]
        with torch.no_grad():
            others = self._others(row, ids, labels, places, logits.detach())
            columns = self._columns(row, labels, places, logits.detach(), others)
        return Document(places, labels[places], logits, others, columns)

    def logits(self, model: torch.nn.Module, ids: Tensor, **more: Tensor) -> Tensor:
        """[B, T, V], whatever virtual tokens the model puts first."""
        logits: Tensor = model(input_ids=ids, **more).logits
        return logits[:, -ids.shape[1] :]

    def _others(self, row: Row, ids: Tensor, labels: Tensor, places: Tensor, student: Tensor) -> dict[str, Tensor]:
        made, aux = {}, self.trainer.aux
        if "teacher" in self.subject.requires:
            assert aux.teacher is not None
            batch = self.trainer.rows.batch(self.trainer.data_collator([dict(row)]))
            batch = Batch({"input_ids": ids}, labels[None], batch.columns)
            at = torch.zeros_like(places), places - 1
            found = aux.teacher.logits(self._ask, self.model, batch, at)
            made["teacher"] = self.dense(found, student) if isinstance(found, TopK) else found
        if self._asks_reference:
            with adapters_off(self.model) if aux.reference is None else contextlib.nullcontext():
                model = self.model if aux.reference is None else aux.reference.model
                made["reference"] = self.logits(model, ids)[0, places - 1]
        return made

    def _ask(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        return self.logits(model, inputs["input_ids"], **{k: v for k, v in inputs.items() if k == "attention_mask"})

    @property
    def _asks_reference(self) -> bool:
        requires = self.trainer.args.models_for(self.subject.requires)
        return "reference" in requires and not self.trainer.reads_reference_column

    def dense(self, head: Head | TopK, student: Tensor) -> Tensor:
        """[n, real] float64 logits at n positions; k kept tokens as documented: the rest of the mass in the student's
        shape, or evenly.

        ``student``: [n, V] the student's own logits.
        """
        if isinstance(head, Head):
            logits = head.hidden.double() @ head.weight[: head.width].double().T
            if head.bias is not None:
                logits = logits + head.bias[: head.width].double()
            return HeadTransform(head.logit_scale, head.logit_softcap).apply(logits)
        ids, kept = head.ids.long().to(self.device), head.logprobs.double().to(self.device)
        log_tail = head.tail_logprob
        log_tail = torch.log1p(-kept.exp().sum(-1).clamp(max=1)) if log_tail is None else log_tail.double()
        log_p = student[:, : self.subject.vocab].double().log_softmax(-1)
        shape = log_p if head.tail == "student" else torch.zeros_like(log_p)
        shape = shape.scatter(1, ids, -math.inf).log_softmax(-1)
        return (log_tail.to(self.device)[:, None] + shape).scatter(1, ids, kept)

    def _columns(
        self, row: Row, labels: Tensor, places: Tensor, student: Tensor, others: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        args = self.trainer.args
        needed = columns_for(self.subject.requires)
        made = {
            name: torch.tensor(row[name], dtype=torch.float64, device=self.device)[places]
            for name in needed
            if name in row
        }
        log_p = label_log_p(student, labels[places])
        if "old_logps" in needed and args.psft_refresh != "never":  # copied just now: r = 1
            made["old_logps"] = log_p
        if "weight" in needed and args.weights == "online":
            if self.trainer.reads_reference_column:
                reference = torch.tensor(row[REFERENCE], dtype=torch.float64, device=self.device)[places]
            else:
                reference = label_log_p(others["reference"], labels[places])
            gap = (log_p - reference).mean()
            made["weight"] = importance_weight(gap, args.weights_temperature).expand(len(places))
        return made

    def numbers(self, row: Row, places: Tensor) -> Tensor:
        """[n]: which of the run's targets is each token's."""
        return torch.tensor([self.subject.number_of(row, place) for place in places.tolist()], device=self.device)

    # -- gradients -----------------------------------------------------------------------------------------------

    @functools.cached_property
    def denominator(self) -> int:
        """Of a step over all rows."""
        return self._denominator(self.subject.rows)

    def _denominator(self, rows: Sequence[Row]) -> int:
        """Supervised labels; with "kept" those that no column puts at 0."""
        total = 0
        for row in rows:
            for place in range(1, len(row["labels"])):
                if row["labels"][place] == -100:
                    continue
                target = self.subject.targets[self.subject.number_of(row, place)]
                named = {"weight", "critical"} & set(columns_of(target))
                if self.trainer.args.denominator != "kept" or all(row[name][place] != 0 for name in named):
                    total += 1
        return max(1, total)

    def gradient(self, rows: Sequence[Row]) -> Gradient:
        """Of a step over some rows: autograd through each document alone, the loss in float64."""
        subject, count = self.subject, self._denominator(rows)
        subject.model.zero_grad(set_to_none=True)
        with subject.without_dropout(), torch.enable_grad():
            for row in rows:
                self._loss(row).div(count).backward()
        return subject._taken(subject.model)

    def _loss(self, row: Row) -> Tensor:
        document = self.document(row)
        numbers = self.numbers(row, document.places)
        logits = document.logits.double()
        loss = logits.new_zeros(())
        for number, target in enumerate(self.subject.targets):
            mine = document.labels.masked_fill(numbers != number, -100)
            if not bool((mine != -100).any()):
                continue
            loss = loss + self.loss(logits, mine, target, document.others, document.columns)
        return loss

    def loss(
        self,
        logits: Tensor,
        labels: Tensor,
        target: Target,
        others: dict[str, Tensor],
        columns: dict[str, Tensor],
    ) -> Tensor:
        """Summed, float64."""
        return target_loss(logits, labels, target, reduction="sum", **self._given(logits, target, others, columns)).loss

    def _given(self, logits: Tensor, target: Target, others: dict[str, Tensor], columns: dict[str, Tensor]) -> dict:
        return {
            **{f"{name}_logits": z.double() for name, z in others.items() if name in target.requires},
            **{name: column for name, column in columns.items() if name in columns_of(target)},
            "vocab_size": min(self.subject.vocab, logits.shape[-1]),
        }

    # -- a few tokens --------------------------------------------------------------------------------------------

    @functools.cached_property
    def sampled(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(others, columns) of the sample's tokens, in their order, from the documents they are of."""
        sample, others, columns = self.subject.sample, [], []
        with self.subject.without_dropout(), torch.no_grad():
            for row in sample.row.unique_consecutive().tolist():
                document = self.document(self.subject.rows[row])
                at = torch.searchsorted(document.places, sample.place[sample.row == row].to(self.device))
                others.append({name: z[at].double() for name, z in document.others.items()})
                columns.append({name: column[at] for name, column in document.columns.items()})
        return _joined(others), _joined(columns)

    @functools.cached_property
    def sampled_logits(self) -> Tensor:
        """[n, V] float64, from the hidden states the trainer had, so that only the loss is looked at."""
        return self.logits_of(self.subject.sample.hidden)

    def logits_of(self, hidden: Tensor, through: torch.dtype | None = None) -> Tensor:
        """[n, V] float64 of hidden states [n, d]; ``through``: the dtype the head is rounded to before."""
        bias = head_parameters(self.subject.base)[1]
        hidden = hidden.detach().double()
        logits = torch.cat([hidden @ piece.T for piece in self._head(through)], 1)
        if bias is not None:
            logits = logits + bias.detach().to(through or bias.dtype).double()
        return HeadTransform.of(self.subject.base.config).apply(logits)

    def to_hidden(self, logits: Tensor, g: Tensor, through: torch.dtype | None = None) -> Tensor:
        """dH [n, d] float64 of a gradient g [n, V] on the logits: back through the softcap and the head."""
        transform = HeadTransform.of(self.subject.base.config)
        if transform.softcap is not None:
            g = g * (1 - (logits / transform.softcap).square())
        pieces = zip(g.split(_TILE, 1), self._head(through), strict=True)
        return torch.stack([part @ piece for part, piece in pieces]).sum(0) * transform.scale

    def _head(self, through: torch.dtype | None) -> Iterator[Tensor]:
        for piece in head_parameters(self.subject.base)[0].detach().split(_TILE):
            yield piece.to(through or piece.dtype).double()

    def p_minus_q(
        self, logits: Tensor, labels: Tensor, target: Target, others: dict[str, Tensor], columns: dict[str, Tensor]
    ) -> Tensor:
        """p − Q [n, V] of float64 logits: what a token's gradient is."""
        Q = target_distribution(logits, labels, target, **self._given(logits, target, others, columns))
        return logits.softmax(-1) - Q

    def of_target(self) -> Iterator[tuple[Tensor, Target]]:
        """(places in the sample, target) of each of the run's targets that some token of the sample has."""
        for number, target in enumerate(self.subject.targets):
            (chosen,) = (self.subject.sample.number == number).nonzero(as_tuple=True)
            if len(chosen):
                yield chosen, target


def at(given: dict[str, Tensor], chosen: Tensor) -> dict[str, Tensor]:
    return {name: value[chosen.to(value.device)] for name, value in given.items()}


def label_log_p(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.double().log_softmax(-1).gather(-1, labels.to(logits.device)[:, None]).squeeze(-1)


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else {})}
