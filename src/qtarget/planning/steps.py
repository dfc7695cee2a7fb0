"""How many steps a run takes, as Accelerate and Transformers count them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

GPUS = 8


@dataclass(frozen=True)
class Steps:
    """Rows and steps of a run.

    Attributes:
        batch: rows of a whole optimiser step. whole: steps of an epoch that are whole. short: rows of the step after
            them, 0 for none: the trainer takes such a step, with fewer rows than the others.
        total: steps of the run. rows: of the training data.
    """

    batch: int
    whole: int
    short: int
    total: int
    rows: int

    @property
    def per_epoch(self) -> int:
        return self.whole + bool(self.short)


def planned(rows: int, gpus: int, config: Any) -> Steps:
    """The steps of a run on ``rows`` rows, none of them packed."""
    micro, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    drop = config.dataloader_drop_last
    batches = rows // micro if drop else math.ceil(rows / micro)
    each = batches // gpus if drop else math.ceil(batches / gpus)  # micro-batches of a process
    whole, rest = divmod(each, accumulation)
    batch = gpus * micro * accumulation
    if not drop and not rest and rows < whole * batch:  # the last micro-batches are not full
        whole, rest = whole - 1, accumulation
    short = 0 if not rest else rest * gpus * micro if drop else rows - whole * batch
    per_epoch = whole + bool(short)
    total = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * per_epoch)
    return Steps(batch, whole, short, total, rows)


def faults(steps: Steps | None, batch: int, gpus: int, config: Any, expected: int | None, epochs: bool) -> list[str]:
    """Contradictions between a recipe's numbers.

    Args:
        steps: None where the number of rows is not known. batch: rows of a step. expected: rows of a step, as the recipe
            says. epochs: whether num_train_epochs was given.
    """
    micro, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    if expected is not None and batch != expected:
        split = f"{gpus} GPUs x {micro} rows x {accumulation} accumulations is {batch}"
        wanted, rest = divmod(expected, gpus * micro)
        mend = (
            f"set gradient_accumulation_steps: {wanted}"
            if not rest
            else f"{expected} is not a multiple of {gpus} x {micro}: use another per_device_train_batch_size or --gpus"
        )
        return [f"expected_batch is {expected} rows, but {split}; {mend}"]
    if steps is None:
        return []
    if not steps.per_epoch:
        return [f"the data have {steps.rows} rows, fewer than a step's {batch}; with dataloader_drop_last none is left"]
    wanted = math.floor(config.num_train_epochs * steps.whole)
    if config.max_steps > 0 and epochs and config.max_steps != wanted:
        epoch = "1 epoch" if config.num_train_epochs == 1 else f"{config.num_train_epochs:g} epochs"
        return [
            f"max_steps is {config.max_steps}, but {epoch} of {steps.rows} rows are {wanted} "
            f"whole steps of {batch}; set max_steps: {wanted}, or leave out one of max_steps and num_train_epochs"
        ]
    return []
