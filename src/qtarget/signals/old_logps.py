"""psft's signal: log p of each label under the model as it starts (arXiv:2508.17784).

The rows are written as the trainer prepared them, as token ids: a number per token belongs to those tokens only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from datasets import Dataset, List, Value

from qtarget.signals.scoring import ROW, label_logps, prepared, student

if TYPE_CHECKING:
    from qtarget.training.trainer import QTargetTrainer

COLUMN = "old_logps"


def tables(trainer: QTargetTrainer, tell: Callable[[float], object], step: Callable[[], object]) -> dict[str, Dataset]:
    """The splits as input_ids, labels and old_logps, with what else a row holds one value of, such as its source.

    old_logps: float32, one per label before the shift, 0 where none is trained.

    Args:
        trainer: a QTargetTrainer made on ``scoring.numbered`` rows. tell: see ``label_logps``.
        step: called after each row.
    """
    made = {}
    for split, rows in prepared(trainer).items():
        values: list[Any] = [None] * len(rows)
        for place, (logps,) in label_logps(trainer, rows, [student(trainer)], tell):
            values[place] = logps.numpy()
            step()
        kept = rows.select_columns(["input_ids", "labels", *_others(rows, trainer.args.dataset_text_field)])
        made[split] = kept.add_column(COLUMN, values, feature=List(Value("float32")))
    return made


def _others(rows: Dataset, text_field: str) -> list[str]:
    """Columns of one value per row, without the text that has become tokens."""
    text = {text_field, "prompt", "completion", ROW}
    return [name for name, kind in rows.features.items() if isinstance(kind, Value) and name not in text]
