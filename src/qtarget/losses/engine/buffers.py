"""What a block of rows is made of: logits, other models' logits, reused buffers.

Shape suffixes: r rows of the block, v vocabulary, k kept ids of a top-k distribution.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from qtarget.targets import Target

_kept = threading.local()
# Numbers of a block's rows by name, [r] each.
PerRow = dict[str, Tensor]
# tanh(d/2) is ±1 beyond, in float64 too.
_FAR = 40.0


@dataclass
class TopKRows:
    """Rows of a top-k distribution: ids [r, k], log-probabilities [r, k], log of the tail's mass [r], tail's shape."""

    ids: Tensor
    logprobs: Tensor
    log_tail: Tensor
    tail: str

    def __getitem__(self, rows: slice) -> TopKRows:
        return TopKRows(_some(self.ids, rows), _some(self.logprobs, rows), _some(self.log_tail, rows), self.tail)


@dataclass
class Rows:
    """One block of one target's rows.

    Attributes:
        z: logits [r, v]. aux: other models' logits [r, v_m] or top-k rows, by name. labels: [r]. columns: [r] each.
        g: where the gradient goes, [r', v] in the dtype it is multiplied in; None: over the logits.
        places: hands out rows of g to the rows that have a gradient, which only the target's weights tell; None: row i is
            g's row i.
        factor: what each row's gradient is multiplied by, [r], or None for 1.
    """

    z: Tensor
    aux: dict[str, Tensor | TopKRows]
    labels: Tensor
    columns: PerRow
    g: Tensor | None = None
    places: Places | None = None
    factor: Tensor | None = None

    def __getitem__(self, rows: slice) -> Rows:
        """Some of the rows; with ``places`` all of g stays."""
        g = self.g if self.g is None or self.places is not None else _some(self.g, rows)
        return Rows(
            _some(self.z, rows),
            {name: _some(x, rows) if isinstance(x, Tensor) else x[rows] for name, x in self.aux.items()},
            _some(self.labels, rows),
            {name: _some(column, rows) for name, column in self.columns.items()},
            g,
            self.places,
            None if self.factor is None else _some(self.factor, rows),
        )


def _some(x: Tensor, rows: slice) -> Tensor:
    """``x[rows]``, also of a tensor without data."""
    return x.narrow(0, rows.start, rows.stop - rows.start)


@dataclass
class RowResult:
    """Published loss [r], statistics [r] each, and whether each row has a gradient [r]."""

    loss: Tensor
    stats: PerRow
    active: Tensor


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
class TermValues:
    """What the reported values need of one residual, [r] each."""

    ce: Tensor  # CE(R, p), under another divergence than forward KL of p − p ⊙ (s − E_p[s]) for R
    value: Tensor  # D(R, p)
    size: Tensor | None = None  # Σ |g| without the label, where it is known without another pass


class Places:
    """Hands out rows of a gradient's buffer to the rows that have a gradient, one after another, without a host read."""

    def __init__(self, device: torch.device):
        self._active: list[Tensor] = []
        self.count = torch.zeros((), dtype=torch.int64, device=device)  # of places taken

    def take(self, active: Tensor) -> Tensor:
        """Places of the next rows, [r] int64: −1 where ``active`` is False."""
        self._active.append(active)
        places = torch.where(active, active.long().cumsum(0) + (self.count - 1), -1)
        self.count = self.count + active.sum()
        return places

    def takers(self, count: int) -> Tensor:
        """Numbers of the rows that took the ``count`` places, in order, [count] int64."""
        return (~torch.cat(self._active)).long().argsort(stable=True).narrow(0, 0, count)


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
        return flat.narrow(0, 0, rows * width).view(rows, width)

    def tanh_half_(self, d: Tensor) -> Tensor:
        """tanh(d/2) in place, as t/(t + 2) with t = e^d − 1: every digit of a small d, and on a CPU cheaper than tanh."""
        d.clamp_(-_FAR, _FAR).expm1_()
        return d.div_(torch.add(d, 2, out=self.get("product", *d.shape)))

    def dot(self, x: Tensor, y: Tensor) -> Tensor:
        """Σ_v x y, [r]; ``torch.linalg.vecdot`` would allocate a block each time."""
        return torch.mul(x, y, out=self.get("product", *x.shape)).sum(-1)


@dataclass(frozen=True, kw_only=True)
class RowCode:
    """Base of what computes blocks of rows, for one target.

    Args:
        vocab_size: real tokens. scratch: buffers for a block.
        gradient: write the gradient. with_kl: also kl_q.
        softcap: cap of the logits already applied, whose derivative the gradient must carry.
    """

    target: Target
    vocab_size: int
    scratch: Scratch
    gradient: bool = True
    with_kl: bool = False
    softcap: float | None = None

    def _dense(self, rows: Rows, name: str) -> Tensor:
        """A model's logits [r, v_m]; log-probabilities [r, vocab_size] of a top-k distribution, its tail filled in."""
        other = rows.aux[name]
        if isinstance(other, Tensor):
            return other
        out = self.scratch.get(f"dense_{name}", *rows.z.shape).narrow(1, 0, self.vocab_size)
        if other.tail == "even":
            outside = max(1, self.vocab_size - other.ids.shape[1])
            torch.sub(other.log_tail.unsqueeze(1).expand_as(out), math.log(outside), out=out)
        else:
            student = rows.z.narrow(1, 0, self.vocab_size)
            outside_lse = student.scatter(1, other.ids, float("-inf")).logsumexp(1)
            torch.add(student, (other.log_tail - outside_lse).unsqueeze(1), out=out)
        return out.scatter_(1, other.ids, other.logprobs)


def workspace(dtype: torch.dtype, device: torch.device) -> Scratch:
    """Buffers of the chunks. On a CPU they are kept between calls, which spares each call fresh pages."""
    if device.type != "cpu":
        return Scratch(dtype, device)
    kept: dict[torch.dtype, Scratch] = _kept.__dict__.setdefault("by_dtype", {})
    return kept.setdefault(dtype, Scratch(dtype, device))


def forget() -> None:
    """Free the buffers that are kept for this thread."""
    _kept.__dict__.clear()


# Elements to which a row of a device's buffer is rounded up: every row then begins on 128 bytes or more, so that an odd
# vocabulary is read and multiplied in vectors, too.
_STRIDE = 64


def padded_rows(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty [rows, width] whose rows are aligned."""
    stride = -(-width // _STRIDE) * _STRIDE
    whole = torch.empty(rows, stride, dtype=dtype, device=device)
    return whole if stride == width else whole.narrow(1, 0, width)
