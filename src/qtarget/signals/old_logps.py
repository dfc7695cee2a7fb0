"""psft's signal: log p of each label under the model as it starts (arXiv:2508.17784).

The rows are written as the trainer prepared them, as token ids: a number per token belongs to those tokens only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from datasets import Dataset, List, Value

from qtarget.signals.scoring import ROW, measured, student

if TYPE_CHECKING:
    from qtarget.training.trainer import QTargetTrainer

COLUMN = "old_logps"


def tables(trainer: QTargetTrainer, tell: Callable[[float], object], step: Callable[[], object]) -> dict[str, Dataset]:
    """The splits as input_ids, labels and old_logps, with what else a row holds one value of, such as its source.

    old_logps: float32, one per label before the shift, 0 where none is trained. Arguments as in ``scoring.measured``.
    """
    text = {trainer.args.dataset_text_field, "prompt", "completion", ROW}  # what has become tokens
    splits = {}
    for split, rows, values in measured(trainer, [student(trainer)], lambda _, logps: logps[0].numpy(), tell, step):
        others = [name for name, kind in rows.features.items() if isinstance(kind, Value) and name not in text]
        rows = rows.select_columns(["input_ids", "labels", *others])
        splits[split] = rows.add_column(COLUMN, values, feature=List(Value("float32")))
    return splits
