"""Checks a user's tensors and picks the supervised tokens, for oracle and engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from qtarget.errors import ConfigError, check_range, raise_together
from qtarget.targets import Target

REDUCTIONS = ("mean", "sum", "none")
_WHOLE = (torch.int64, torch.int32, torch.int16, torch.uint8)
# Requirement → what it is, and how to pass it.
_INPUTS = {
    "weight": ("weights", "weight=, one number per token or per row"),
    "critical": ("a critical mask", "critical=, a boolean per token"),
    "old_policy": (
        "the old policy's log-probabilities",
        "old_logps=, the label's log-probability under the old policy per token",
    ),
}
# The requirement of a target that a column serves, where the two have other names.
_SERVES = {"old_logps": "old_policy"}


def on_host(device: torch.device) -> bool:
    """Whether a number of a tensor can be read without waiting for a queue of kernels."""
    return device.type == "cpu"


class Checks:
    """Faults of what a user passed, each as one sentence.

    On a CPU a check is looked at when it is added. On a device reading a number waits for every kernel before it, so
    checks are gathered there and read together, once.
    """

    def __init__(self, device: torch.device):
        self._waits = not on_host(device)
        self._pending: list[tuple[int, Callable[..., str | None]]] = []
        self._numbers: list[Tensor] = []

    def add(self, numbers: Sequence[Tensor], fault: Callable[..., str | None]) -> None:
        """``fault(*numbers)`` says what is wrong, or None; the numbers are tensors of one element."""
        if not self._waits:
            _raise(fault(*(number.item() for number in numbers)))
            return
        self._numbers += numbers
        self._pending.append((len(numbers), fault))

    def read(self, *wanted: Tensor) -> list[float]:
        """Raise the first fault, if there is one, and return the ``wanted`` numbers: one host read for all."""
        numbers = [*wanted, *self._numbers]
        pending, self._numbers, self._pending = self._pending, [], []
        values = read_together(numbers)
        at = len(wanted)
        for count, fault in pending:
            _raise(fault(*values[at : at + count]))
            at += count
        return values[: len(wanted)]


def read_together(numbers: Sequence[Tensor]) -> list[float]:
    """Tensors of one element as numbers, in one host read."""
    if not numbers:
        return []
    wide = torch.float32 if numbers[0].device.type == "mps" else torch.float64  # which has no float64
    return torch.stack([number.reshape(()).to(wide) for number in numbers]).tolist()


def _raise(fault: str | None) -> None:
    if fault is not None:
        raise ConfigError(fault)


@dataclass
class Tokens:
    """The n supervised tokens of a batch, those of the first target first.

    Attributes:
        shape: the labels' shape.
        index: [n] their places in the flattened labels, or None where every position is supervised, by one target.
        labels: [n].
        columns: per-token inputs of the trust rules, [n] each.
        groups: each target's tokens among the n.
    """

    shape: torch.Size
    index: Tensor | None
    labels: Tensor
    columns: dict[str, Tensor]
    groups: tuple[slice, ...] = ()

    @property
    def count(self) -> int:
        return self.labels.numel()

    def select(self, per_position: Tensor) -> Tensor:
        """Rows [n, ...] of a tensor whose leading axes are the labels' shape."""
        flat = per_position.reshape(self.shape.numel(), *per_position.shape[len(self.shape) :])
        return flat if self.index is None else flat.index_select(0, self.index.to(flat.device))

    def read_by(self, targets: Sequence[Target], need: str, values: Tensor) -> Tensor:
        """The rows of ``values`` [n, ...] whose target asks for ``need``; all where none does."""
        groups = [group for group, target in zip(self.groups, targets, strict=True) if need in target.requires]
        if not groups or len(groups) == len(self.groups):
            return values
        return torch.cat([values[group] for group in groups])

    def scatter(self, per_token: Tensor, fill: float) -> Tensor:
        """[n] back to the labels' shape, ``fill`` at ignored positions."""
        if self.index is None:
            return per_token.view(self.shape)
        full = per_token.new_full((self.shape.numel(),), fill)
        return full.index_copy(0, self.index, per_token).view(self.shape)


def check_options(reduction: str, stats: str, z_loss: float) -> None:
    if reduction not in REDUCTIONS:
        raise ConfigError(f"reduction is {reduction!r}; use one of {', '.join(REDUCTIONS)}")
    if stats not in ("basic", "all"):
        raise ConfigError(f"stats is {stats!r}; use 'basic' or 'all'")
    check_range("z_loss", z_loss, 0)


def check_requirements(target: Target, models: dict[str, Any], columns: dict[str, Any], model: str) -> None:
    """Raise where the target needs an input that is None; ``model``: how one of a model's name is passed."""
    if not isinstance(target, Target):
        raise ConfigError(f"target is {target!r}; use qt.preset(name), qt.Target(...) or qt.Target.from_config(...)")
    given = models | {_SERVES.get(name, name): column for name, column in columns.items()}
    missing = [name for name in sorted(target.requires) if given.get(name) is None]
    known = [_INPUTS.get(name, (f"a {name}", model.format(name))) for name in missing]
    raise_together(f"target {target} needs {what} and got none; pass {how}" for what, how in known)


def supervised(
    labels: Tensor,
    leading_shape: torch.Size,
    what: str,
    vocab_size: int,
    ignore_index: int,
    dtype: torch.dtype,
    columns: dict[str, Tensor | None],
    targets: Sequence[Target],
    which: Tensor | None = None,
    checks: Checks | None = None,
) -> Tokens:
    """Drop ignored positions, order the others by their target, and check what is left.

    How many there are is needed to go on, so that is the one host read here.

    Args:
        which: of the labels' shape, the number of each position's target; None: all have the first one.
        checks: gathers the faults of columns on a device; None: they are read at once.

    Raises:
        ConfigError: labels of another shape, a label outside the vocabulary, a column of the wrong length, NaN or
            negative weights.
    """
    if labels.shape != leading_shape:
        raise ConfigError(
            f"labels has shape {list(labels.shape)}, but {what} requires {list(leading_shape)}; nothing is shifted "
            "here: labels[i] belongs to position i"
        )
    if labels.dtype not in _WHOLE:
        raise ConfigError(f"labels has dtype {labels.dtype}; use torch.int64")
    flat = labels.reshape(-1)
    keep = flat != ignore_index
    number = None if which is None else _numbers(which, labels)
    counts = _count(flat, keep, number, vocab_size, ignore_index, len(targets))
    n = sum(counts)
    index = None
    if n < flat.numel() or number is not None:
        key = torch.where(keep, torch.zeros_like(flat) if number is None else number, len(targets))
        index = key.argsort(stable=True).narrow(0, 0, n)  # not nonzero, which waits for the device
    kept = (flat if index is None else flat.index_select(0, index)).long()
    groups = tuple(slice(end - count, end) for end, count in zip(accumulate(counts), counts, strict=True))
    tokens = Tokens(labels.shape, index, kept, {}, groups)
    gathered = checks or Checks(labels.device)
    for name, column in columns.items():
        if column is not None:
            tokens.columns[name] = _column(name, column, tokens, dtype, targets, gathered)
    if checks is None:
        gathered.read()
    return tokens


def _numbers(which: Tensor, labels: Tensor) -> Tensor:
    if not isinstance(which, Tensor) or which.dtype not in _WHOLE:
        got = f"dtype {which.dtype}" if isinstance(which, Tensor) else f"type {type(which).__name__}"
        raise ConfigError(f"which has {got}; use a torch.int64 tensor of the labels' shape, the number of each target")
    if which.shape != labels.shape:
        raise ConfigError(f"which has shape {list(which.shape)}; labels require {list(labels.shape)}")
    return which.reshape(-1).to(labels.device).long()


def _count(
    flat: Tensor, keep: Tensor, number: Tensor | None, vocab_size: int, ignore_index: int, targets: int
) -> list[int]:
    """How many tokens each target has; labels and numbers checked with the same read."""
    if not flat.numel():
        return [0] * targets
    inside = [torch.where(keep, flat, 0)] if number is None else [torch.where(keep, x, 0) for x in (flat, number)]
    per_target = [keep] if number is None else [keep & (number == i) for i in range(targets)]
    wanted = [mask.sum() for mask in per_target]
    bounds = [bound for x in inside for bound in (x.min(), x.max())]
    values = [int(value) for value in read_together([*wanted, *bounds])]
    counts, (low, high, *numbers) = values[: len(wanted)], values[len(wanted) :]
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise ConfigError(
            f"labels holds {bad}, outside the vocabulary of {vocab_size}; use ids from 0 to {vocab_size - 1}, "
            f"or {ignore_index} for positions that are not trained"
        )
    if numbers and (numbers[0] < 0 or numbers[1] >= targets):
        bad = numbers[0] if numbers[0] < 0 else numbers[1]
        raise ConfigError(f"which holds {bad}; there are {targets} targets, use numbers from 0 to {targets - 1}")
    return counts


def _column(
    name: str, column: Tensor, tokens: Tokens, dtype: torch.dtype, targets: Sequence[Target], checks: Checks
) -> Tensor:
    """A column [n], checked where a target reads it: elsewhere there may be anything."""
    column = torch.as_tensor(column, device=tokens.labels.device)
    shape = tokens.shape
    per_row = name != "old_logps" and len(shape) > 1
    if per_row and column.shape in (shape[:-1], (*shape[:-1], 1)):
        column = column.reshape(*shape[:-1], 1).expand(shape)
    if column.shape != shape:
        rows = f", or one per row {list(shape[:-1])}" if per_row else ""
        raise ConfigError(f"{name} has shape {list(column.shape)}; labels require {list(shape)}{rows}")
    values = tokens.select(column).detach().to(dtype)
    read = tokens.read_by(targets, _SERVES.get(name, name), values)
    if not read.numel():
        return values

    def not_finite(some):
        return f"{name} holds NaN or infinity at a supervised token; every number must be finite" if some else None

    def negative(lowest):
        return f"weight holds {lowest:g}; weights must be 0 or more" if lowest < 0 else None

    def neither(some, value):
        return f"critical holds {value:g}; it is a mask of tokens, use 0 and 1" if some else None

    checks.add([~torch.isfinite(read).all()], not_finite)
    if name == "weight":
        checks.add([read.min()], negative)
    if name == "critical":
        wrong = (read != 0) & (read != 1)
        checks.add([wrong.any(), read.gather(0, wrong.long().argmax().reshape(1)).squeeze(0)], neither)
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


def check_top_k(k: int, vocab: int) -> None:
    if k > vocab:
        raise ConfigError(f"top_k is {k}, but the vocabulary has {vocab} tokens; use a smaller top_k")


def real_vocabulary(vocab_size: int | None, width: int) -> int:
    if vocab_size is None:
        return width
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or not 0 < vocab_size <= width:
        raise ConfigError(f"vocab_size is {vocab_size!r}; use a whole number from 1 to the head's {width} rows")
    return vocab_size
