"""Which document each token of a batch belongs to."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def document_numbers(inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    """[B, T] int64, from 0 on over the whole batch: a row is one document, or several where its positions start again.

    Args:
        inputs: a batch; ``position_ids``, of [B, T] or [1, T], tell the documents of a packed or padding-free row apart.
        labels: [B, T].
    """
    starts = torch.zeros_like(labels)
    if "position_ids" in inputs:
        starts = (inputs["position_ids"] == 0).expand(labels.shape).long()
    starts[:, 0] = 1
    return starts.flatten().cumsum(0).view(labels.shape) - 1
