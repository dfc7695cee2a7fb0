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
from qtarget.signals.scoring import ROW, measured, reference, student
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


def _other_tokens(config: Any, model: Any, name: str) -> str:
    """How the reference's tokenizer differs; nothing where it does not."""
    from transformers import AutoTokenizer

    try:
        theirs = AutoTokenizer.from_pretrained(name, revision=config.reference_model_revision or "main")
    except (OSError, ValueError):  # weights without a tokenizer beside them
        return ""
    difference = vocabulary_difference(origin.tokenizer_of(config, model), theirs) or ""
    return difference.replace("the student", "the model").replace("teacher", "reference")


def tables(
    trainer: QTargetTrainer,
    originals: dict[str, Dataset],
    fixed: bool,
    tell: Callable[[float], object],
    step: Callable[[], object],
) -> dict[str, Dataset]:
    """The original rows with the column, those left out that have no supervised token.

    Args:
        originals: the splits as they were. fixed: see ``column_of``. The others as in ``scoring.measured``.
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
        splits[split] = kept.add_column(column_of(fixed), values, feature=Value("float32"))
    return splits
