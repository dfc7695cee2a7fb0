"""Statistics as (sum, count) over tokens, micro-batches and processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Σ (1 − p_y), what plain SFT would ask for on the same tokens; read out as the ratio of the updates.
_SFT_UPDATE = "sft_update"


class TokenSums:
    """Sums of per-token statistics since they were last read, kept on the device so that no step waits for them.

    Args:
        sources: data sources, in the order of their numbers; each gets the same figures as ``source/name``.
    """

    def __init__(self, sources: Sequence[str] = ()) -> None:
        self._sources = sources
        self._sums: dict[str, Tensor] = {}

    def add(self, stats: dict[str, Tensor], source: Tensor | None = None, loss_sum: Tensor | None = None) -> None:
        """Add a micro-batch: tensors of the labels' shape, NaN where a token takes no part."""
        stats = {**stats, _SFT_UPDATE: -torch.expm1(-stats["nll"])}
        for name, value in stats.items():
            taking_part = ~torch.isnan(value)
            self._add(name, value.nansum(), taking_part.sum())
            for number, source_name in enumerate(self._sources if source is not None else ()):
                mine = taking_part & (source == number)
                self._add(f"{source_name}/{name}", value.masked_fill(~mine, 0).sum(), mine.sum())
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
        for prefix in ("", *(f"{source}/" for source in self._sources)):
            if f"{prefix}nll" in names:
                means[f"{prefix}supervised_tokens"] = float(pairs[names.index(f"{prefix}nll"), 1])
            sft_update = means.pop(prefix + _SFT_UPDATE, 0.0)
            if sft_update > 0 and f"{prefix}update" in means:
                means[f"{prefix}update_vs_sft"] = means[f"{prefix}update"] / sft_update
        return means


def update_against_sft(share: float, learning_rate: float) -> str:
    """The sentence a run prints at its first log line."""
    return (
        f"the update is {share:.3g} of plain SFT's on the same tokens; at this learning rate of {learning_rate:.3g} the "
        f"step of {learning_rate / share:.3g} would match it under SGD (Adam divides a constant factor out again, so "
        "there it tells how the steps compare with weight decay and clipping)"
    )
