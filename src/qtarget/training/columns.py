"""Per-token columns beside input_ids: weight, critical, old_logps. They are aligned with labels, before the shift."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Number
from typing import Any

import torch

from qtarget.errors import ConfigError
from qtarget.targets import Target

# What a target requires → the dataset column that carries it.
COLUMN_OF = {"weight": "weight", "critical": "critical", "old_policy": "old_logps"}


def columns_of(*targets: Target) -> list[str]:
    """Dataset columns the targets read."""
    required = frozenset().union(*(target.requires for target in targets))
    return [column for need, column in COLUMN_OF.items() if need in required]


class ColumnCollator:
    """A collator that also pads the columns: a number per row is spread over its tokens, a list is taken as it is.

    Args:
        inner: the collator of everything else.
        names: columns to carry.
        max_length: where rows are cut, so that a longer column can be told from a misaligned one.
    """

    def __init__(self, inner: Callable[[list], dict], names: Sequence[str], max_length: int | None):
        self.inner = inner
        self.names = list(names)
        self.max_length = max_length

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.inner([{k: v for k, v in row.items() if k not in self.names} for row in examples])
        for name in self.names:
            if all(name in row for row in examples):
                padded = torch.zeros(batch["labels"].shape, dtype=torch.float32)
                for row, ids, example in zip(padded, batch["input_ids"].tolist(), examples, strict=True):
                    length = len(example["input_ids"])
                    if ids[:length] != list(example["input_ids"]):
                        raise ConfigError(
                            f"the data collator moved or changed the tokens of a row, and column {name} would no "
                            "longer lie on them; pad on the right, one row per example"
                        )
                    row[:length] = self._values(name, example[name], length)
                batch[name] = padded
        return batch

    def _values(self, name: str, value: Any, length: int) -> torch.Tensor:
        if isinstance(value, (Number, bool)):
            if name == "old_logps":
                raise ConfigError(f"column old_logps holds {value!r} for a whole row; it needs one number per token")
            return torch.full((length,), float(value))  # type: ignore[arg-type]
        cut = length == self.max_length and len(value) > length
        if len(value) != length and not cut:
            raise ConfigError(
                f"column {name} has {len(value)} numbers for a row of {length} tokens; "
                "give one per input_id (pre-tokenised rows), or one number per row"
            )
        return torch.as_tensor(value[:length], dtype=torch.float32)
