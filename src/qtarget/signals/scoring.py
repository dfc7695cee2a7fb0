"""psft's and iw-sft's signals: log p of the run's own labels, row by row."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, List, Value
from torch import Tensor

from qtarget.errors import ConfigError, DataError, NonFiniteLogits
from qtarget.losses.log_probs import importance_weight
from qtarget.models.frozen import evaluation_mode
from qtarget.models.loading import load_tokenizer
from qtarget.signals import manifest
from qtarget.teachers.vocabulary import vocabulary_difference

if TYPE_CHECKING:
    from qtarget.training.trainer import QTargetTrainer

# The number of an original row, which follows it through the trainer's preparation. No dataset has this name.
ROW = "qtarget_row"

# (inputs without labels, labels [batch, length]) → log p of each label, float32 [batch, length], 0 where it is masked
Ask = Callable[[dict[str, Any], Tensor], Tensor]
Tell = Callable[[float], object]  # gets an estimate of the seconds for a split, after its first batch
Step = Callable[[], object]  # called after each row


def numbered(datasets: dict[str, Any], column: str) -> dict[str, Dataset]:
    """The splits with each row's number.

    Raises:
        ConfigError: a stream, which has no numbers, or rows that have the column already.
    """
    for name, dataset in datasets.items():
        if not isinstance(dataset, Dataset):
            raise ConfigError("dataset_streaming is true, but the rows of a stream are not numbered; set it to false")
        if column in dataset.column_names:
            raise DataError(f"the {name} split has a column {column!r} already; remove it, or train on it as it is")
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

    def ask(inputs: dict[str, Any], labels: Tensor) -> Tensor:
        trainer.check_heads(inputs)
        with evaluation_mode(trainer.student.model):
            return trainer.student.label_log_p(inputs, labels)

    return ask


def reference(trainer: QTargetTrainer) -> Ask:
    """The run's reference: its own model, or the model as it starts."""
    if not trainer.args.reference_model_name_or_path:
        return student(trainer)
    aux = trainer.auxiliary({"reference"})

    def ask(inputs: dict[str, Any], labels: Tensor) -> Tensor:
        aux.check_heads(inputs)
        return aux.reference_log_p(trainer.student, inputs, labels)

    return ask


@torch.no_grad()
def measured(
    trainer: QTargetTrainer,
    asks: list[Ask],
    value_of: Callable[[list[int], list[Tensor]], Any],
    tell: Tell,
    step: Step,
) -> Iterator[tuple[str, Dataset, list[Any]]]:
    """(name, rows, a value for each row) of the prepared splits.

    Rows are asked by length, the longest first, so that little is padded and a batch too large for the device is known at
    once.

    Args:
        trainer: a QTargetTrainer made on ``numbered`` rows. asks: the models.
        value_of: (a row's labels, for each model log p of them, float32 [length], 0 where none is trained) → its value.
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
                try:
                    logps = [ask(batch.inputs, batch.labels).float().cpu() + 0.0 for ask in asks]  # no −0
                except NonFiniteLogits as error:
                    raise DataError(
                        f"{error.what} are NaN or infinite at row {rows[places[error.row]][ROW]} of the {split} dataset, "
                        f"position {error.position}; check its weights and that row, or load it in float32 or bfloat16"
                    ) from None
            if not begin:
                longest = sum(lengths[place] for place in places)
                tell((time.monotonic() - started) * sum(lengths) / longest)
            for i, place in enumerate(places):
                values[place] = value_of(labels[place], [line[i, : lengths[place]] for line in logps])
                step()
        yield split, rows, values


# -- psft's and iw-sft's columns --------------------------------------------------------------------------------


def old_logps(trainer: QTargetTrainer, tell: Tell, step: Step) -> dict[str, Dataset]:
    """psft's signal (arXiv:2508.17784): log p of each label under the model as it starts. Arguments as in ``measured``.

    The splits are written as the trainer prepared them, for a number per token belongs to those tokens only: input_ids,
    labels, old_logps (float32, one per label before the shift, 0 where none is trained), and what else a row holds one
    value of, such as its source.
    """
    text = {trainer.args.dataset_text_field, "prompt", "completion", ROW}  # what has become tokens
    splits = {}
    for split, rows, values in measured(trainer, [student(trainer)], lambda _, logps: logps[0].numpy(), tell, step):
        others = [name for name, kind in rows.features.items() if isinstance(kind, Value) and name not in text]
        rows = rows.select_columns(["input_ids", "labels", *others])
        splits[split] = rows.add_column("old_logps", values, feature=List(Value("float32")))
    return splits


def weights(
    trainer: QTargetTrainer, tell: Tell, step: Step, originals: dict[str, Dataset], fixed: bool
) -> dict[str, Dataset]:
    """iw-sft's signal (arXiv:2507.12856): the original rows with a number each, without those that train no token.

    The weight of a sequence is w = exp(temperature · mean over its supervised tokens of (log p_θ − log p_ref)), clamped
    to [0, 16] as in the paper's code. p_θ moves, p_ref does not: with the column ``reference_logp``, the mean of
    log p_ref, a run needs no second model. With the column ``weight`` w is that of the model as it starts, and stays.

    Args:
        originals: the splits as they were. fixed: the column weight. The others as in ``measured``.
    """

    def value_of(labels: list[int], logps: list[Tensor]) -> float:
        trained = [place for place, label in enumerate(labels) if place and label != -100]
        means = [line[trained].double().mean() for line in logps]
        gap = means[-1] - means[0]
        return float(importance_weight(gap, trainer.args.weights_temperature) if fixed else means[0])

    asks = [reference(trainer), *([student(trainer)] if fixed else [])]
    splits = {}
    for split, rows, values in measured(trainer, asks, value_of, tell, step):
        kept = originals[split].select(rows[ROW])
        splits[split] = kept.add_column(weight_column(fixed), values, feature=Value("float32"))
    return splits


def weight_column(fixed: bool) -> str:
    return "weight" if fixed else "reference_logp"


def validate_reference(config: Any, model: Any, fixed: bool) -> None:
    """Raise ConfigError where the weights would all be 1, or the reference's ids mean other tokens."""
    name = config.reference_model_name_or_path
    if fixed and not manifest.other_model(manifest.model_of(model), manifest.reference_of(config, model)):
        what = f"{name!r}, the model itself, so that" if name else "not set, so that the model is its own reference and"
        raise ConfigError(
            f"fixed is true, but reference_model_name_or_path is {what} all weights are 1; name another reference, or "
            "leave --fixed out"
        )
    if name and (difference := _other_tokens(config, model, name)):
        raise ConfigError(
            f"reference_model_name_or_path is {name!r}, which has another tokenizer: {difference}; use a reference of "
            "the same family"
        )


def _other_tokens(config: Any, model: Any, name: str) -> str:
    """How the reference's tokenizer differs; nothing where it does not."""
    try:
        theirs = load_tokenizer(name, config.reference_model_revision)
    except (OSError, ValueError):  # weights without a tokenizer beside them
        return ""
    difference = vocabulary_difference(manifest.tokenizer_of(config, model), theirs, added_too=True) or ""
    return difference.replace("the student", "the model").replace("teacher", "reference")
