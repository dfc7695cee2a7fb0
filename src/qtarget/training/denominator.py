"""What the summed loss is divided by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qtarget.data.columns import SOURCE_ID, columns_of
from qtarget.targets.objective import Objective

if TYPE_CHECKING:
    from qtarget.training.trainer import QTargetTrainer


def of_step(trainer: QTargetTrainer, batches: Sequence[Mapping[str, Tensor]], device: torch.device) -> Tensor | None:
    """Over all micro-batches and processes; None where each micro-batch has its own."""
    if trainer.args.denominator == "micro_batch" or not batches:
        return None
    total = count(batches, trainer.args.denominator, trainer.objective).to(device)
    if trainer.args.world_size > 1:
        total = trainer.accelerator.gather(total).sum() / trainer.get_tp_size()
    return total.float()


def count(batches: Iterable[Mapping[str, Tensor]], denominator: str, objective: Objective) -> Tensor:
    """Shifted supervised labels of some micro-batches, float64; with "kept" only those a column keeps.

    Counted here for every architecture alike: Transformers leaves it to the architecture (GPT-2 counts position 0, a
    forward without ``**kwargs`` gets no count), so that the same data would give other gradients.
    """
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        counted = batch["labels"][..., 1:] != -100
        if denominator == "kept":
            counted = counted & _kept(batch, objective)
        total = total + counted.sum().to(total)
    return total


def _kept(batch: Mapping[str, Tensor], objective: Objective) -> Tensor:
    """Tokens that a weight or critical column of their own target does not put at 0, after the shift."""
    kept = torch.ones_like(batch["labels"][..., 1:], dtype=torch.bool)
    for number, target in enumerate(objective.finals()):
        of_target = batch[SOURCE_ID][..., 1:] == number if SOURCE_ID in batch else torch.ones_like(kept)
        for name in {"weight", "critical"} & set(columns_of(target)):
            kept &= ~of_target | (batch[name][..., 1:] != 0)
    return kept
