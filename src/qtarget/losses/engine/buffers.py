"""What a block of rows is made of: logits, other models' logits or kept rows, buffers, and what is known of the student.

Shape suffixes: r rows of the block, v vocabulary, k kept ids of a top-k distribution.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class KeptRows:
    """Rows of a top-k distribution: ids [r, k], log-probabilities [r, k], log of the tail's mass [r], tail's shape."""

    ids: Tensor
    logprobs: Tensor
    log_tail: Tensor
    tail: str

    def __getitem__(self, rows: slice) -> KeptRows:
        return KeptRows(self.ids[rows], self.logprobs[rows], self.log_tail[rows], self.tail)


@dataclass
class Rows:
    """One block: logits [r, v] (overwritten by the gradient), other models' logits or kept rows, labels, columns."""

    z: Tensor
    others: dict[str, Tensor | KeptRows]
    labels: Tensor
    columns: dict[str, Tensor]


class Scratch:
    """Buffers handed out by name, grown when a larger one is asked for."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self._dtype, self._device = dtype, device
        self._buffers: dict[str, Tensor] = {}

    def get(self, name: str, rows: int, width: int) -> Tensor:
        flat = self._buffers.get(name)
        if flat is None or flat.numel() < rows * width:
            with torch.inference_mode(False):  # or a buffer of an evaluation could not be written to in training
                flat = self._buffers[name] = torch.empty(rows * width, dtype=self._dtype, device=self._device)
        return flat[: rows * width].view(rows, width)

    def dot(self, x: Tensor, y: Tensor) -> Tensor:
        """Σ_v x y, [r]; ``torch.linalg.vecdot`` would allocate a block each time."""
        return torch.mul(x, y, out=self.get("product", *x.shape)).sum(-1)


@dataclass
class Student:
    """p up to a factor: ``scaled`` · inv[:, None] = p. Sums to 1 within one rounding, which softmax alone does not."""

    scaled: Tensor
    inv: Tensor
    lse: Tensor
    p_y: Tensor
    rest_mass: Tensor
    log_p_y: Tensor
    entropy: Tensor
    is_top1: Tensor

    def log_p(self, z: Tensor, ids: Tensor) -> Tensor:
        """Log-probabilities at ids [r, k]. The logarithm of p keeps digits that z − lse rounds away at the size of z."""
        p = self.scaled.gather(1, ids) * self.inv[:, None]
        return torch.where(p > torch.finfo(p.dtype).tiny, p.log(), z.gather(1, ids) - self.lse[:, None])


@dataclass
class Term:
    """What the reported values need of one residual, [r] each."""

    ce: Tensor  # CE(R, p)
    kl: Tensor  # KL(R ‖ p)
    lse_shift: Tensor  # log-normaliser of the pooled logits minus the student's
    size: Tensor | None = None  # Σ |g| without the label, where it is known without another pass
