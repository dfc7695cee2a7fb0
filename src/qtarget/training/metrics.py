"""Statistics that can be compared: each is a (sum, count) over tokens, micro-batches and processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class TokenSums:
    """Sums of per-token statistics since they were last read, kept on the device so that no step waits for them."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, stats: dict[str, Tensor], loss_sum: Tensor | None = None) -> None:
        """Add a micro-batch: tensors of the labels' shape, NaN where a token takes no part."""
        for name, value in stats.items():
            taking_part = ~torch.isnan(value)
            self._add(name, value.nansum(), taking_part.sum())
        if loss_sum is not None:
            self._add("loss", loss_sum.detach(), (~torch.isnan(stats["nll"])).sum())

    def _add(self, name: str, total: Tensor, count: Tensor) -> None:
        pair = (
            torch.stack([total.double().cpu(), count.double().cpu()])
            if total.device.type == "mps"
            else torch.stack([total.double(), count.double()])
        )
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def read(self, accelerator: Any) -> dict[str, float]:
        """Token-weighted means over all processes, with the number of tokens, and start again."""
        if not self._sums:
            return {}
        names = list(self._sums)
        pairs = torch.stack([self._sums[name] for name in names])
        pairs = accelerator.reduce(pairs, reduction="sum").cpu()
        self._sums = {}
        means = {name: float(total / count) for name, (total, count) in zip(names, pairs, strict=True) if count > 0}
        means["supervised_tokens"] = float(pairs[names.index("nll"), 1]) if "nll" in names else 0.0
        return means
