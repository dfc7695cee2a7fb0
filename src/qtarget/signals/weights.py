"""iw-sft's signal: a row's weight, or the reference's mean log p (arXiv:2507.12856).

The weight of a sequence is w = exp(temperature · mean over its supervised tokens of (log p_θ − log p_ref)), clamped to
[0, 16] as in the paper's code. p_θ moves, p_ref does not: with the column ``reference_logp`` a run needs no second model.
With the column ``weight`` w is that of the model as it starts, and stays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from datasets import Dataset, Value
from torch import Tensor

from qtarget.errors import ConfigError
from qtarget.losses.log_probs import importance_weight
from qtarget.signals import origin
from qtarget.signals.scoring import ROW, label_logps, prepared, reference, student
from qtarget.teachers.vocabulary import vocabulary_difference

if TYPE_CHECKING:
    from qtarget.training.trainer import QTargetTrainer


def column_of(fixed: bool) -> str:
    return "weight" if fixed else "reference_logp"


def check(config: Any, model: Any, fixed: bool) -> None:
    """Raise ConfigError where the weights would all be 1, or the reference's ids mean other tokens."""
    name = config.reference_model_name_or_path
    if fixed and not name:
        raise ConfigError(
            "fixed is true, but reference_model_name_or_path is not set, so that the model is its own reference and all "
            "weights are 1; name another reference, or leave --fixed out"
        )
    ours, theirs = origin.model_of(model), origin.reference_of(config, model)
    if fixed and not origin.other_model(ours, theirs):
        raise ConfigError(
            f"fixed is true, but reference_model_name_or_path is {name!r}, the model itself, so that all weights are 1; "
            "name another reference, or leave --fixed out"
        )
    if name and (difference := _other_tokens(config, model, name)):
        raise ConfigError(
            f"reference_model_name_or_path is {name!r}, which has another tokenizer: {difference}; use a reference of "
            "the same family"
        )


def _other_tokens(config: Any, model: Any, name: str) -> str | None:
    from transformers import AutoTokenizer

    try:
        theirs = AutoTokenizer.from_pretrained(name, revision=config.reference_model_revision or "main")
    except (OSError, ValueError):  # weights without a tokenizer beside them
        return None
    difference = vocabulary_difference(origin.tokenizer_of(config, model), theirs)
    return (
        None if difference is None else difference.replace("the student", "the model").replace("teacher", "reference")
    )


def tables(
    trainer: QTargetTrainer,
    originals: dict[str, Dataset],
    fixed: bool,
    tell: Callable[[float], object],
    step: Callable[[], object],
) -> dict[str, Dataset]:
    """The original rows with the column, those left out that have no supervised token.

    Args:
        trainer: a QTargetTrainer made on ``scoring.numbered`` rows. originals: the splits as they were.
        fixed: see ``column_of``. tell: see ``label_logps``. step: called after each row.
    """
    made = {}
    asks = [reference(trainer), *([student(trainer)] if fixed else [])]
    for split, rows in prepared(trainer).items():
        values = [0.0] * len(rows)
        labels = rows["labels"]
        for place, logps in label_logps(trainer, rows, asks, tell):
            means = [_mean(line, labels[place]) for line in logps]
            gap = means[-1] - means[0]
            values[place] = float(importance_weight(gap, trainer.args.weights_temperature) if fixed else means[0])
            step()
        kept = originals[split].select(rows[ROW])
        made[split] = kept.add_column(column_of(fixed), values, feature=Value("float32"))
    return made


def _mean(logps: Tensor, labels: list[int]) -> Tensor:
    trained = [i for i, label in enumerate(labels) if i and label != -100]
    return logps[trained].double().mean()
