"""Checks and shapes shared by the oracle and the engine: from what a user passes to supervised tokens only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qtarget.errors import ConfigError
from qtarget.targets import Target

REDUCTIONS = ("mean", "sum", "none")
_HOW_TO_GIVE = {
    "weight": "pass weight=, one number per token or per row",
    "critical": "pass critical=, a boolean per token",
    "old_policy": "pass old_logps=, the label's log-probability under the old policy per token",
}


@dataclass
class Tokens:
    """The n supervised tokens of a batch.

    Attributes:
        shape: the labels' shape.
        index: [n] their places in the flattened labels, or None where every position is supervised.
        labels: [n].
        columns: per-token inputs of the trust rules, [n] each.
    """

    shape: torch.Size
    index: Tensor | None
    labels: Tensor
    columns: dict[str, Tensor]

    @property
    def count(self) -> int:
        return self.labels.numel()

    def select(self, per_position: Tensor) -> Tensor:
        """Rows [n, ...] of a tensor whose leading axes are the labels' shape."""
        flat = per_position.reshape(self.shape.numel(), *per_position.shape[len(self.shape) :])
        return flat if self.index is None else flat.index_select(0, self.index.to(flat.device))

    def spread(self, per_token: Tensor, fill: float) -> Tensor:
        """[n] back to the labels' shape, ``fill`` at ignored positions."""
        if self.index is None:
            return per_token.view(self.shape)
        full = per_token.new_full((self.shape.numel(),), fill)
        return full.index_copy(0, self.index, per_token).view(self.shape)


def check_options(reduction: str, stats: str) -> None:
    if reduction not in REDUCTIONS:
        raise ConfigError(f"reduction is {reduction!r}; use one of {', '.join(REDUCTIONS)}")
    if stats not in ("basic", "all"):
        raise ConfigError(f"stats is {stats!r}; use 'basic' or 'all'")


def check_requirements(target: Target, given: dict[str, object], how_to_give: dict[str, str]) -> None:
    """Raise where the target needs an input that is None."""
    if not isinstance(target, Target):
        raise ConfigError(f"target is {target!r}; use qt.preset(name), qt.Target(...) or qt.Target.from_config(...)")
    how_to_give = {**_HOW_TO_GIVE, **how_to_give}
    missing = [name for name in sorted(target.requires) if given.get(name) is None]
    if missing:
        raise ConfigError([f"target {target} needs {_a(name)} and got none; {how_to_give[name]}" for name in missing])


def _a(name: str) -> str:
    words = {"old_policy": "the old policy's log-probabilities", "critical": "a critical mask", "weight": "weights"}
    return words.get(name, f"a {name}")


def supervised(
    labels: Tensor,
    leading_shape: torch.Size,
    what: str,
    vocab_size: int,
    ignore_index: int,
    dtype: torch.dtype,
    columns: dict[str, Tensor | None],
) -> Tokens:
    """Drop ignored positions and check what is left.

    Raises:
        ConfigError: labels of another shape, a label outside the vocabulary, a column of the wrong length, NaN or
            negative weights.
    """
    if labels.shape != leading_shape:
        raise ConfigError(
            f"labels has shape {list(labels.shape)}, {what} asks for {list(leading_shape)}; "
            "nothing is shifted here: labels[i] belongs to position i"
        )
    if labels.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        raise ConfigError(f"labels has dtype {labels.dtype}; use torch.int64")
    flat = labels.reshape(-1)
    keep = flat != ignore_index
    everything = bool(keep.all())
    index = None if everything else keep.nonzero().squeeze(1)
    kept = (flat if index is None else flat[index]).long()
    if kept.numel():
        low, high = int(kept.min()), int(kept.max())
        if low < 0 or high >= vocab_size:
            bad = low if low < 0 else high
            raise ConfigError(
                f"labels holds {bad}, outside the vocabulary of {vocab_size}; use ids from 0 to {vocab_size - 1}, "
                f"or {ignore_index} for positions that are not trained"
            )
    tokens = Tokens(labels.shape, index, kept, {})
    for name, column in columns.items():
        if column is not None:
            tokens.columns[name] = _column(name, column, tokens, dtype)
    return tokens


def _column(name: str, column: Tensor, tokens: Tokens, dtype: torch.dtype) -> Tensor:
    column = torch.as_tensor(column, device=tokens.labels.device)
    shape = tokens.shape
    per_row = name != "old_logps" and len(shape) > 1
    if per_row and column.shape in (shape[:-1], (*shape[:-1], 1)):
        column = column.reshape(*shape[:-1], 1).expand(shape)
    if column.shape != shape:
        rows = f", or one per row {list(shape[:-1])}" if per_row else ""
        raise ConfigError(f"{name} has shape {list(column.shape)}; labels ask for {list(shape)}{rows}")
    values = tokens.select(column).detach().to(dtype)
    if not torch.isfinite(values).all():
        raise ConfigError(f"{name} holds NaN or infinity at a supervised token; every number must be finite")
    if name == "weight" and bool((values < 0).any()):
        raise ConfigError(f"weight holds {float(values.min()):g}; weights must be 0 or more")
    if name == "critical":
        neither = values[(values != 0) & (values != 1)]
        if len(neither):
            raise ConfigError(f"critical holds {float(neither[0]):g}; it is a mask of tokens, use 0 and 1")
    return values


def denominator(reduction: str, tokens: Tokens, num_items: Tensor | float | None) -> Tensor | float:
    """What the summed loss is divided by: 1, ``num_items``, or the supervised labels (at least 1)."""
    if reduction != "mean":
        return 1
    if num_items is None:
        return max(1, tokens.count)
    if isinstance(num_items, Tensor):
        return num_items.detach().clamp(min=1)
    return max(1, num_items)


def real_vocabulary(vocab_size: int | None, width: int) -> int:
    if vocab_size is None:
        return width
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or not 0 < vocab_size <= width:
        raise ConfigError(f"vocab_size is {vocab_size!r}; use a whole number from 1 to the head's {width} rows")
    return vocab_size
