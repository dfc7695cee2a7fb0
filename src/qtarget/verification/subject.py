"""A trainer on a few of the user's own rows, stepped through its own functions, watched.

Everything here goes through the trainer: its collator, its count of labels, its ``training_step``. What it should give is
worked out in ``oracle``, which shares none of that.
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

from qtarget.losses import Head, TopK, linear_target_loss
from qtarget.models.forward import HeadTransform, LossCall, head_parameters
from qtarget.targets import Target, presets
from qtarget.teachers.agreement.measure import evenly_spaced
from qtarget.verification import peak

if TYPE_CHECKING:
    from qtarget.training.trainer import QTargetTrainer

Gradient = dict[str, Tensor]
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
        batch: as the collator made it. call: what the model's forward was asked for. hidden, hidden_gradient: [B, T, d],
            the last hidden states and what backward left on them. loss: as reported.
        gradient: of every trained weight, on the CPU. bytes: the most memory it took beyond what was there, or None.
    """

    batch: dict[str, Tensor]
    call: LossCall
    hidden: Tensor
    hidden_gradient: Tensor
    loss: float
    gradient: Gradient
    bytes: int | None


@dataclass
class Sample:
    """A few supervised tokens, [n] each.

    Attributes:
        row: number of the prepared row. place: of the label in its row. labels: the labels. number: which of the run's
            targets is theirs. hidden: [n, d] student's states that predict them.
    """

    row: Tensor
    place: Tensor
    labels: Tensor
    number: Tensor
    hidden: Tensor


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
        made = trainer.objective.at(trainer.state.global_step, trainer.state.max_steps)
        return [*made, presets.build("sft")] if trainer.label_only_token is not None else list(made)

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
        batch: dict[str, Tensor] = self.trainer.data_collator([dict(row) for row in rows])
        return batch

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

        hooks = [
            self.base.base_model.register_forward_hook(on_states),
            self.model.register_forward_pre_hook(on_call, with_kwargs=True),
        ]
        for model in self._models:  # weights that are mapped from a file are there once they are read
            for parameter in model.parameters():
                parameter.detach().sum()
        try:
            with peak.watched(self.device) as memory:
                loss = self._run([batch], self.model)
        finally:
            for hook in hooks:
                hook.remove()
        length = batch["labels"].shape[1]  # virtual tokens of prompt tuning come first
        hidden = seen["hidden"]
        states, gradient = (x.detach()[:, -length:] for x in (hidden, hidden.grad))
        return Step(batch, seen["call"], states, gradient, loss, self._taken(self.model), memory.bytes)

    def gradient(self, batches: Sequence[Mapping[str, Tensor]], model: nn.Module | None = None) -> Gradient:
        """Of one optimiser step over so many micro-batches, as the trainer forms it. ``model``: the student, wrapped."""
        model = self.model if model is None else model
        self._run(batches, model)
        return self._taken(model)

    def _run(self, batches: Sequence[Mapping[str, Tensor]], model: Any) -> float:
        trainer = self.trainer
        self.model.zero_grad(set_to_none=True)
        trainer.current_gradient_accumulation_steps = len(batches)
        count = trainer.denominator(batches)
        loss = 0.0
        with self.without_dropout(model):
            for batch in batches:
                loss += float(trainer.training_step(model, dict(batch), count))
        return loss

    def _taken(self, model: Any) -> Gradient:
        made = {
            name: parameter.grad.detach().to("cpu", copy=True)
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad and parameter.grad is not None
        }
        self.model.zero_grad(set_to_none=True)
        return made

    @contextmanager
    def without_dropout(self, *models: Any) -> Iterator[None]:
        """In training mode for whoever asks the model itself, in evaluation mode for every part of it."""
        models = (self.model, *(model for model in models if model is not self.model))
        modes = [(module, module.training) for model in models for module in model.modules()]
        for model in models:
            model.eval()
            model.train = _mode_of(model)  # the trainer calls it before each micro-batch
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
    def sample(self) -> Sample:
        labels = self.step.batch["labels"]
        offset = self.offsets(self.step.batch)
        of_target: dict[int, dict[int, list[tuple[int, int]]]] = {}  # number of the target → row → places
        for r, t in (labels[:, 1:] != -100).nonzero().tolist():
            target = self.number_of(self.rows[r], t + 1 - offset[r])
            of_target.setdefault(target, {}).setdefault(r, []).append((r, t + 1))
        picked: list[tuple[int, int]] = []
        for by_row in of_target.values():  # some of every target, from a few rows that have it
            rows = list(by_row)
            places = [place for i in evenly_spaced(len(rows), _ROWS) for place in by_row[rows[i]]]
            picked += [places[i] for i in evenly_spaced(len(places), max(1, _TOKENS // len(of_target)))]
        chosen = torch.tensor(sorted(picked), dtype=torch.int64)
        row, place = chosen.view(-1, 2).T
        number = torch.tensor([self.number_of(self.rows[r], p - offset[r]) for r, p in chosen.tolist()])
        hidden = self.step.hidden[row, place - 1]
        return Sample(row, place - torch.tensor(offset)[row], labels[row, place], number, hidden)

    def offsets(self, batch: Mapping[str, Tensor]) -> list[int]:
        """How many padding tokens stand before each row of a padded batch."""
        mask = batch.get("attention_mask")
        return [0] * len(self.rows) if mask is None else mask.int().argmax(1).tolist()

    def number_of(self, row: Row, place: int) -> int:
        """Which target is a token's: that of its source, or plain SFT for an end token taught by its label alone."""
        from qtarget.data.columns import SOURCE_ID

        if self.trainer.label_only_token is not None and row["labels"][place] == self.trainer.label_only_token:
            return len(self.targets) - 1
        return int(row[SOURCE_ID][place]) if SOURCE_ID in row else 0

    def text_of(self, ids: Sequence[int]) -> str:
        return repr(self.trainer.tokenizer.decode(list(ids)))

    # -- the engine ----------------------------------------------------------------------------------------------

    def heads_at(self, chosen: Tensor) -> dict[str, Head | TopK]:
        """Teacher and reference, as the trainer asked them, at some tokens of the sample."""
        sample, offset = self.sample, torch.tensor(self.offsets(self.step.batch))
        row = sample.row[chosen]
        at = (row, sample.place[chosen] + offset[row] - 1)
        made: dict[str, Head | TopK] = {}
        for name, head in self.step.call.others.items():
            if isinstance(head, Head):
                made[name] = replace(head, hidden=head.hidden[at])
            else:
                tail = None if head.tail_logprob is None else head.tail_logprob[at]
                made[name] = replace(head, ids=head.ids[at], logprobs=head.logprobs[at], tail_logprob=tail)
        return made

    def engine(
        self,
        hidden: Tensor,
        labels: Tensor,
        target: Target,
        others: Mapping[str, Head | TopK],
        columns: Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
        chunk_rows: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(dH, dW) of the summed loss by the engine, the student's head in ``dtype`` where one is given."""
        weight, bias = head_parameters(self.base)
        transform = HeadTransform.of(self.base.config)
        hidden, weight = hidden.detach(), weight.detach()
        if dtype is not None:
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        hidden.requires_grad_()
        weight = weight.clone().requires_grad_()
        out = linear_target_loss(
            hidden,
            weight,
            labels.to(hidden.device),
            target,
            head_bias=None if bias is None else bias.detach().to(weight.dtype),
            **{name: head for name, head in others.items() if name in target.requires},  # type: ignore[arg-type]
            **{name: column.to(hidden.device) for name, column in columns.items()},  # type: ignore[arg-type]
            vocab_size=min(self.vocab, weight.shape[0]),
            logit_scale=transform.scale,
            logit_softcap=transform.softcap,
            reduction="sum",
            chunk_rows=chunk_rows,
        )
        out.loss.backward()
        assert hidden.grad is not None and weight.grad is not None
        return hidden.grad, weight.grad

    @functools.cached_property
    def vocab(self) -> int:
        """Tokens the tokenizer knows, whatever the head's padding; counted here and not asked of the trainer."""
        tokenizer = self.trainer.tokenizer
        return 1 + max(index for index in tokenizer.get_vocab().values())


def _mode_of(model: Any) -> Callable[..., Any]:
    """A ``train`` that leaves the parts of a model in the mode they are in."""

    def train(mode: bool = True) -> Any:
        model.training = mode
        return model

    return train


def relative(got: Tensor, wanted: Tensor) -> float:
    """‖got − wanted‖ / ‖wanted‖; where nothing is wanted, ‖got‖."""
    size = float(wanted.double().norm())
    error = float((got.double().to(wanted.device) - wanted.double()).norm())
    return error / size if size else error


def distance(got: Gradient, wanted: Gradient) -> tuple[float, str]:
    """(‖difference‖ / ‖wanted‖ over all weights, the weight with the largest share of the difference)."""
    if got.keys() != wanted.keys():
        odd = sorted(got.keys() ^ wanted.keys())
        return math.inf, odd[0]
    squares, size = {}, 0.0
    for name, value in wanted.items():
        squares[name] = float((got[name].double() - value.double()).square().sum())
        size += float(value.double().square().sum())
    if not squares:
        return math.inf, "no weight"
    total = sum(squares.values())
    # ``max`` would pass over a NaN.
    worst = next(
        (name for name, square in squares.items() if math.isnan(square)), max(squares, key=lambda n: squares[n])
    )
    return math.sqrt(total / size) if size else math.sqrt(total), worst
