"""log p of a run's own labels, row by row, as the trainer prepares and forwards them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor

from qtarget.errors import ConfigError, DataError
from qtarget.models.frozen import evaluation_mode

if TYPE_CHECKING:
    from qtarget.training.trainer import QTargetTrainer

# The number of an original row, which follows it through the trainer's preparation. No dataset has this name.
ROW = "qtarget_row"

# (inputs without labels, labels [batch, length]) → log p of each label, float32 [batch, length], 0 where it is masked
Ask = Callable[[dict[str, Any], Tensor], Tensor]


def numbered(datasets: dict[str, Any], column: str) -> dict[str, Dataset]:
    """The splits with each row's number.

    Raises:
        ConfigError: a stream, which has no numbers, or rows that have the column already.
    """
    for name, dataset in datasets.items():
        if not isinstance(dataset, Dataset):
            raise ConfigError("dataset_streaming is true, but rows of a stream have no number; set it to false")
        if column in dataset.column_names:
            raise DataError(f"the {name} split has a column {column!r} already; take it out, or train on it as it is")
    return {name: dataset.add_column(ROW, list(range(len(dataset)))) for name, dataset in datasets.items()}


def prepared(trainer: QTargetTrainer) -> dict[str, Dataset]:
    """The splits as the trainer prepared them: those rows that have a label to train, in the order of the originals."""
    ready = {}
    for name, rows in {"train": trainer.train_dataset, "test": trainer.eval_dataset}.items():
        if rows is not None and len(rows):
            numbers = rows[ROW]
            trained = [place for place, labels in enumerate(rows["labels"]) if supervised(labels)]
            if trained:
                ready[name] = rows.select(sorted(trained, key=lambda place: numbers[place]))
    return ready


def supervised(labels: list[int]) -> int:
    """How many labels are trained: the first is not, for nothing predicts it."""
    return sum(label != -100 for label in labels[1:])


def student(trainer: QTargetTrainer) -> Ask:
    """The run's model as it starts."""
    model = trainer.student

    def ask(inputs: dict[str, Any], labels: Tensor) -> Tensor:
        trainer.check_heads(inputs)
        with evaluation_mode(model.model):
            return model.label_log_p(inputs, labels)

    return ask


def reference(trainer: QTargetTrainer) -> Ask:
    """The run's reference: its own model, the model without its adapters, or the model as it starts."""
    model = trainer.student
    if not trainer.args.reference_model_name_or_path and not trainer.aux.has_adapters:
        return student(trainer)
    aux = trainer.auxiliary({"reference"})

    def ask(inputs: dict[str, Any], labels: Tensor) -> Tensor:
        aux.check_heads(inputs)
        return aux.reference_log_p(model, inputs, labels)

    return ask


@torch.no_grad()
def measured(
    trainer: QTargetTrainer,
    asks: list[Ask],
    value_of: Callable[[list[int], list[Tensor]], Any],
    tell: Callable[[float], object],
    step: Callable[[], object],
) -> Iterator[tuple[str, Dataset, list[Any]]]:
    """(name, rows, a value for each row) of the prepared splits.

    Rows are asked by length, the longest first, so that little is padded and a batch too large for the device is known at
    once.

    Args:
        trainer: a QTargetTrainer made on ``numbered`` rows. asks: the models.
        value_of: (a row's labels, for each model log p of them, float32 [length], 0 where none is trained) → its value.
        tell: gets an estimate of the seconds for a split after its first batch. step: called after each row.
    """
    size = trainer.args.per_device_eval_batch_size
    for split, rows in prepared(trainer).items():
        lengths, labels = [len(ids) for ids in rows["input_ids"]], rows["labels"]
        values: list[Any] = [None] * len(rows)
        order = sorted(range(len(rows)), key=lambda place: -lengths[place])
        for begin in range(0, len(order), size):
            places = order[begin : begin + size]
            started = time.monotonic()
            # What the loss would run under: a log-prob of other precision would not be that of the model that is trained.
            with trainer.compute_loss_context_manager():
                batch = trainer.batch({name: rows[place][name] for name in ("input_ids", "labels")} for place in places)
                logps = [ask(batch.inputs, batch.labels).float().cpu() + 0.0 for ask in asks]  # no −0
            if not begin:
                longest = sum(lengths[place] for place in places)
                tell((time.monotonic() - started) * sum(lengths) / longest)
            for i, place in enumerate(places):
                values[place] = value_of(labels[place], [line[i, : lengths[place]] for line in logps])
                step()
        yield split, rows, values
