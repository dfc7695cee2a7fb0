"""A batch as models read it: inputs, labels, and one number per token of every column."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Prepared rows, collated and on the model's device; made by ``QTargetTrainer.batch``.

    Attributes:
        inputs: what a model is called with: input_ids [B, T], and attention_mask, position_ids or the lengths of packed
            documents; no labels.
        labels: [B, T] int64 before the shift; -100 where nothing is trained.
        columns: name → [B, T] beside the tokens, such as weight or the uids that join a teacher.
    """

    inputs: dict[str, Any]
    labels: Tensor
    columns: dict[str, Tensor] = field(default_factory=dict)

    @property
    def shifted(self) -> Tensor:
        """[B, T − 1]: at each position the label it predicts."""
        return self.labels[:, 1:]

    def supervised(self) -> tuple[Tensor, Tensor]:
        """(row, place), [n] each: where ``shifted`` holds a label to train."""
        row, place = (self.shifted != -100).nonzero(as_tuple=True)
        return row, place

    def documents(self) -> Tensor:
        """[B, T]: the number of each token's document in the batch; a row that is not packed is one."""
        starts = torch.zeros_like(self.labels)
        if "position_ids" in self.inputs:
            starts = (self.inputs["position_ids"] == 0).expand(self.labels.shape).long()
        starts[:, 0] = 1
        return starts.flatten().cumsum(0).view(self.labels.shape) - 1
