"""A trainer on a few of the user's own rows, run through its own functions and observed.

Everything here goes through the trainer: its collator, its count of labels, its ``training_step``. What it should give is
worked out in ``expected``, which shares none of that.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qtarget.data.columns import SOURCE_ID, columns_of
from qtarget.data.text import text_of
from qtarget.losses import Head, TopK, linear_target_loss
from qtarget.models.forward import HeadTransform, LossCall, head_parameters
from qtarget.targets import Target, presets
from qtarget.teachers.agreement.measure import evenly_spaced
from qtarget.verification import peak
from qtarget.verification.check import worst

if TYPE_CHECKING:
    from qtarget.training.trainer import QTargetTrainer

Gradient = dict[str, Tensor]
# What a loss reads beside logits and labels, by its names in ``target_loss``.
Given = dict[str, Tensor]
Row = dict[str, Any]
# Relative errors of a gradient that rounding explains. A lost token or a wrong divisor shows at 1e-2 and more.
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-3}
HALF_PRECISION = 5e-2
# Tokens that are looked at one by one, and the rows they are taken from.
_TOKENS, _ROWS = 64, 4


@dataclass
class Step:
    """One step of the trainer over a batch, as it was seen from outside.

    Attributes:
        batch: as the collator made it. call: what the model's forward was asked for. student: its last hidden states,
            [B, T, d], and its head. hidden_gradient: what backward left on the states. gradient: of every trained weight,
            on the CPU. bytes: the most memory it took beyond what was there, or None.
    """

    batch: dict[str, Tensor]
    call: LossCall
    student: Head
    hidden_gradient: Tensor
    gradient: Gradient
    bytes: int | None


@dataclass
class Sample:
    """A few supervised tokens of one of the run's targets, [n] each.

    Attributes:
        number, target: which target. row: number of the prepared row. place: of the label in its row. labels: the labels.
        student: the states that predict them, with the head. gradient: [n, d], what backward left on the states.
        heads: teacher and reference, as the trainer asked them.
    """

    number: int
    target: Target
    row: Tensor
    place: Tensor
    labels: Tensor
    student: Head
    gradient: Tensor
    heads: dict[str, Head | TopK]


class Subject:
    """A trainer and the rows it is verified on.

    Args:
        trainer: a QTargetTrainer that neither packs nor drops padding, not trained yet. raw: its rows as the dataset has
            them. estimate: (positions, supervised tokens of a micro-batch) → the bytes a step takes beyond the models,
            or None where they are not known. packing_strategy: the run's own.
    """

    def __init__(
        self,
        trainer: QTargetTrainer,
        raw: Sequence[Mapping[str, Any]],
        estimate: Callable[[int, int], int | None] | None = None,
        packing_strategy: str = "bfd",
    ):
        self.trainer, self.raw, self.estimate = trainer, list(raw), estimate
        self.packing_strategy = packing_strategy
        self.rows: list[Row] = [dict(row) for row in trainer.train_dataset]
        self.model: Any = trainer.model
        self.base: Any = trainer.student.base
        self.device = torch.device(trainer.args.device)
        # Tokens the tokenizer knows, whatever the head's padding; counted here and not asked of the trainer.
        self.vocab = 1 + max(trainer.tokenizer.get_vocab().values())
        self.processes = int(trainer.accelerator.num_processes)
        # Where numbers of a target are on a schedule, half way: both ends have their part in it.
        trainer.state.max_steps = max(2, trainer.args.max_steps)
        trainer.state.global_step = trainer.state.max_steps // 2
        trainer.aux_loss_enabled = False  # of a mixture of experts: a mean over its micro-batch, by design

    # -- what is trained -----------------------------------------------------------------------------------------

    @functools.cached_property
    def targets(self) -> list[Target]:
        """The run's targets, one per data source; plain SFT last where the end token is taught by its label alone."""
        trainer = self.trainer
        targets = trainer.objective.at(trainer.state.global_step, trainer.state.max_steps)
        return [*targets, *([presets.build("sft")] if trainer.label_only_token is not None else [])]

    @property
    def requires(self) -> frozenset[str]:
        return frozenset().union(*(target.requires for target in self.targets))

    @property
    def dtype(self) -> torch.dtype:
        """The coarsest dtype that a trained weight or a model beside the student is in."""
        kinds = {p.dtype for model in self._models for p in model.parameters() if p.is_floating_point()}
        return max(kinds, key=lambda kind: torch.finfo(kind).eps)

    @property
    def _models(self) -> list[Any]:
        """The student and every model beside it."""
        return [self.model, *(one.model for one in self.trainer.aux.models)]

    @property
    def rounding(self) -> float:
        """The relative error of a gradient that this dtype explains."""
        return ROUNDING.get(self.dtype, HALF_PRECISION)

    # -- steps ---------------------------------------------------------------------------------------------------

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        return self.trainer.data_collator([dict(row) for row in rows])

    @functools.cached_property
    def step(self) -> Step:
        """The first step: every row in one micro-batch. What all other cuts of it are held against."""
        batch = self.collate(self.rows)
        seen: dict[str, Any] = {}

        def on_states(module: nn.Module, given: Any, output: Any) -> None:
            hidden = output.last_hidden_state
            if hidden.requires_grad:  # not a pass for a teacher, an old policy or weights
                hidden.retain_grad()
                seen["hidden"] = hidden

        def on_call(module: nn.Module, given: Any, named: dict[str, Any]) -> None:
            if torch.is_grad_enabled() and isinstance(named.get("qtarget"), LossCall):
                seen["call"] = named["qtarget"]

        for model in self._models:  # weights that are mapped from a file are there once they are read
            for parameter in model.parameters():
                parameter.detach().sum()
        with (
            self.base.base_model.register_forward_hook(on_states),
            self.model.register_forward_pre_hook(on_call, with_kwargs=True),
            peak.watched(self.device) as memory,
        ):
            self._run([batch], self.model)
        length = batch["labels"].shape[1]  # virtual tokens of prompt tuning come first
        states, gradient = (values.detach()[:, -length:] for values in (seen["hidden"], seen["hidden"].grad))
        weight, bias = head_parameters(self.base)
        transform = HeadTransform.of(self.base.config)
        bias = None if bias is None else bias.detach()
        student = Head(states, weight.detach(), bias, transform.scale, transform.softcap)
        return Step(batch, seen["call"], student, gradient, self.taken(), memory.bytes)

    def gradient(self, batches: Sequence[Mapping[str, Tensor]], model: nn.Module | None = None) -> Gradient:
        """Of one optimiser step over so many micro-batches, as the trainer forms it. ``model``: the student, wrapped."""
        self._run(batches, self.model if model is None else model)
        return self.taken()

    def _run(self, batches: Sequence[Mapping[str, Tensor]], model: Any) -> None:
        trainer = self.trainer
        self.model.zero_grad(set_to_none=True)
        trainer.current_gradient_accumulation_steps = len(batches)
        count = trainer.denominator(batches)
        with self.without_dropout(model):
            for batch in batches:
                trainer.training_step(model, dict(batch), count)

    def taken(self) -> Gradient:
        """What backward left on the trained weights, which it leaves no longer."""
        gradient = {
            name: parameter.grad.detach().to("cpu", copy=True)
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad and parameter.grad is not None
        }
        self.model.zero_grad(set_to_none=True)
        return gradient

    @contextmanager
    def without_dropout(self, *models: Any) -> Iterator[None]:
        """In training mode for whoever asks the model itself, in evaluation mode for every part of it."""
        models = (self.model, *(model for model in models if model is not self.model))
        modes = [(module, module.training) for model in models for module in model.modules()]
        for model in models:
            model.eval()
            model.train = functools.partial(_set_mode, model)  # the trainer calls it before each micro-batch
            model.train()
        try:
            yield
        finally:
            for model in models:
                del model.__dict__["train"]
            for module, mode in modes:
                module.training = mode

    # -- tokens --------------------------------------------------------------------------------------------------

    @functools.cached_property
    def samples(self) -> list[Sample]:
        """Some tokens of every target that the rows have, from a few of its rows."""
        step, labels = self.step, self.step.batch["labels"]
        of_target: dict[int, dict[int, list[tuple[int, int, int]]]] = {}  # number of the target → row → tokens
        for row, place, position, number in self.supervised():
            of_target.setdefault(number, {}).setdefault(row, []).append((row, place, position))
        samples = []
        for number, by_row in sorted(of_target.items()):
            rows = list(by_row.values())
            tokens = [token for i in evenly_spaced(len(rows), _ROWS) for token in rows[i]]
            spread = evenly_spaced(len(tokens), max(1, _TOKENS // len(of_target)))
            row, place, position = torch.tensor([tokens[i] for i in spread]).T
            before = (row, position - 1)  # what predicts the label
            samples.append(
                Sample(
                    number,
                    self.targets[number],
                    row,
                    place,
                    labels[row, position].to(self.device),
                    replace(step.student, hidden=step.student.hidden[before]),
                    step.hidden_gradient[before],
                    {name: _head_at(head, before) for name, head in step.call.others.items()},
                )
            )
        return samples

    def supervised(self) -> list[tuple[int, int, int, int]]:
        """(row, place of the label in it, position in the first step's batch, number of its target) of every label."""
        batch = self.step.batch
        # Padding may stand before a row.
        offsets = (
            batch["attention_mask"].int().argmax(1).tolist() if "attention_mask" in batch else [0] * len(self.rows)
        )
        supervised = []
        for row, before in (batch["labels"][:, 1:] != -100).nonzero().tolist():
            place = before + 1 - offsets[row]
            supervised.append((row, place, before + 1, self.number_of(self.rows[row], place)))
        return supervised

    def number_of(self, row: Row, place: int) -> int:
        """Which target is a token's: that of its source, or plain SFT for an end token taught by its label alone."""
        if self.trainer.label_only_token is not None and row["labels"][place] == self.trainer.label_only_token:
            return len(self.targets) - 1
        return int(row[SOURCE_ID][place]) if SOURCE_ID in row else 0

    def text_of(self, ids: Sequence[int]) -> str:
        text = self.trainer.tokenizer.decode(list(ids))
        return repr("".join(text_of(self.trainer.tokenizer, index) for index in ids) if "\ufffd" in text else text)

    # -- the engine ----------------------------------------------------------------------------------------------

    def engine(self, sample: Sample, given: Given, chunk_rows: int | None = None) -> tuple[Tensor, Tensor]:
        """(dH, dW) of a sample's summed loss by the engine, in its student's dtype, with the columns in ``given``."""
        student, target = sample.student, sample.target
        hidden, weight = (value.clone().requires_grad_() for value in (student.hidden, student.weight))
        columns = {name: given[name].to(self.device) for name in columns_of(target) if name in given}
        out = linear_target_loss(
            hidden,
            weight,
            sample.labels,
            target,
            head_bias=student.bias,
            **{name: head for name, head in sample.heads.items() if name in target.requires},  # type: ignore[arg-type]
            **columns,  # type: ignore[arg-type]
            vocab_size=min(self.vocab, weight.shape[0]),
            logit_scale=student.logit_scale,
            logit_softcap=student.logit_softcap,
            reduction="sum",
            chunk_rows=chunk_rows,
        )
        out.loss.backward()
        assert hidden.grad is not None and weight.grad is not None
        return hidden.grad, weight.grad


def supervised(row: Row) -> list[int]:
    """Places of a row's labels that are trained: nothing predicts the first token."""
    return [place for place, label in enumerate(row["labels"]) if place and label != -100]


def _head_at(head: Head | TopK, at: tuple[Tensor, ...]) -> Head | TopK:
    if isinstance(head, Head):
        return replace(head, hidden=head.hidden[at])
    tail = None if head.tail_logprob is None else head.tail_logprob[at]
    return replace(head, ids=head.ids[at], logprobs=head.logprobs[at], tail_logprob=tail)


def _set_mode(model: Any, mode: bool = True) -> Any:
    """As ``Module.train``, but the parts of the model stay in the mode they are in."""
    model.training = mode
    return model


def relative(got: Tensor, wanted: Tensor) -> float:
    """‖got − wanted‖ / ‖wanted‖; where nothing is wanted, ‖got‖."""
    size = float(wanted.double().norm())
    error = float((got.double().to(wanted.device) - wanted.double()).norm())
    return error / size if size else error


def distance(got: Gradient, wanted: Gradient) -> tuple[float, str]:
    """(‖difference‖ / ‖wanted‖ over all weights, the weight with the largest share of the difference)."""
    if odd := sorted(got.keys() ^ wanted.keys()):
        return math.inf, odd[0]
    if not wanted:
        return math.inf, "no weight"
    squares = {name: float((got[name].double() - value.double()).square().sum()) for name, value in wanted.items()}
    size = sum(float(value.double().square().sum()) for value in wanted.values())
    return math.sqrt(sum(squares.values()) / (size or 1.0)), worst(squares)
