"""The matmuls for logits, dH and dW: in which dtype they multiply, where they round.

On a device 16-bit inputs give float32 logits, and the gradient g is rounded to 16 bits once, before dH and dW: that
loses about as much as bf16 weights do (1e-3 of dH and dW), where bf16 logits would lose two to a thousand times as
much near a teacher. A CPU has no such matmul: without bf16 units it is many times slower, and with them results are
rounded. There a 16-bit head is a way to store, cast up a tile at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qtarget.losses import inputs
from qtarget.losses.heads import Head

HALF = (torch.bfloat16, torch.float16)
# Vocabulary rows of a half-precision head cast up at a time.
_CAST_ROWS = 4096
# g is multiplied by this before it is rounded to float16, whose smallest number is 6e-8; bfloat16 needs no such factor.
_FLOAT16_FACTOR = 1024.0
# A gradient beyond this is infinite then: float16 ends at 65504.
FLOAT16_MOST = 60.0


def compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What the head is multiplied in: autocast's dtype where it is on for the device, else the weight's if it has 16
    bits, else float32; float64 where an input is. On a CPU float32 in place of 16 bits."""
    if torch.float64 in (hidden.dtype, weight.dtype):
        return torch.float64
    device = weight.device
    if inputs.on_host(device):
        return torch.float32
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return weight.dtype if weight.dtype in HALF else torch.float32


def result_dtype(compute: torch.dtype) -> torch.dtype:
    """Of logits, and of everything a row's mathematics is done in."""
    return torch.float64 if compute == torch.float64 else torch.float32


def gradient_factor(compute: torch.dtype) -> float:
    """What g is multiplied by when it is written in the compute dtype, and dH and dW are divided by."""
    return _FLOAT16_FACTOR if compute == torch.float16 else 1.0


@dataclass(frozen=True)
class HeadMatmuls:
    """A head as it is multiplied in one call.

    Args:
        weight: [V, d] in the compute dtype; on a CPU also a 16-bit one as it is stored.
        bias: [V] or None. scale, softcap: logits = softcap(scale · (h Wᵀ + bias)).
        compute: dtype of the products' inputs.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None
    compute: torch.dtype

    @classmethod
    def of(cls, head: Head, compute: torch.dtype) -> HeadMatmuls:
        """A float32 head that is multiplied in 16 bits is cast once a call, here."""
        weight = head.weight.to(compute) if compute in HALF else head.weight
        bias = None if head.bias is None else head.bias.detach()
        return cls(weight.detach(), bias, head.logit_scale, head.logit_softcap, compute)

    def logits(self, h: Tensor, out: Tensor) -> None:
        """Write [r, V] logits of h [r, d] to ``out``, float32 or float64."""
        if self.compute in HALF:
            wide_mm(h.to(self.compute), self.weight.t(), out=out)
        else:
            h = h.to(out.dtype)
            for rows, piece in _cast_up(self.weight, out.dtype):
                torch.mm(h, piece.t(), out=out[:, rows] if piece is not self.weight else out)
        if self.bias is not None:
            out.add_(self.bias.to(out.dtype))
        if self.scale != 1:
            out.mul_(self.scale)
        if self.softcap is not None:
            out.div_(self.softcap).tanh_().mul_(self.softcap)

    def d_hidden(self, g: Tensor) -> Tensor:
        """g W, [r, d] in float32 or float64, for g in the compute dtype."""
        if self.compute in HALF:
            return wide_mm(g, self.weight)
        out = None
        for rows, piece in _cast_up(self.weight, g.dtype):
            part = g[:, rows] if piece is not self.weight else g
            out = part @ piece if out is None else out.addmm_(part, piece)
        assert out is not None
        return out


@dataclass
class WeightGradient:
    """gᵀ H over all chunks of a call.

    Args:
        out: [V, d], not yet written; in 16 bits only where all of g comes at once, so that the product goes straight to
            its dtype: one rounding, and no float32 accumulator to fill, add to and cast.
    """

    out: Tensor
    written: bool = False

    def add(self, g: Tensor, h: Tensor, alpha: float) -> None:
        """out += alpha · gᵀ h; the first product writes, so that no pass fills ``out`` with zeros."""
        h, beta = h.to(g.dtype), 1.0 if self.written else 0.0
        if self.out.dtype == g.dtype:  # in 16 bits too: accumulated and scaled in float32 inside the product
            self.out.addmm_(g.t(), h, beta=beta, alpha=alpha)
        else:
            wide_addmm(self.out, g.t(), h, beta=beta, alpha=alpha)
        self.written = True

    def finish(self) -> Tensor:
        """The gradient; zeros where no row had one."""
        return self.out if self.written else self.out.zero_()


def wide_mm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a b in float32 from 16-bit inputs, whatever the device offers."""
    if not _multiplies_wide(a.device):
        return torch.mm(a.float(), b.float(), out=out)
    if out is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


def wide_addmm(acc: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> None:
    """acc = beta · acc + alpha · a b in float32 from 16-bit inputs; ``addmm_`` refuses mixed dtypes."""
    if _multiplies_wide(a.device):
        torch.addmm(acc, a, b, out_dtype=torch.float32, beta=beta, alpha=alpha, out=acc)
    else:
        acc.addmm_(a.float(), b.float(), beta=beta, alpha=alpha)


@functools.cache
def _multiplies_wide(device: torch.device) -> bool:
    """Whether torch multiplies 16-bit inputs to float32 results here: on CUDA since 2.8. Asked once, by doing it."""
    if device.type != "cuda":
        return False
    try:
        a = torch.zeros(16, 16, dtype=torch.bfloat16, device=device)
        torch.mm(a, a, out_dtype=torch.float32)
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return True


def _cast_up(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """(rows, weight[rows] in dtype): the whole at once where no cast is needed, else a tile at a time."""
    if weight.dtype == dtype:
        yield slice(0, weight.shape[0]), weight
        return
    for begin in range(0, weight.shape[0], _CAST_ROWS):
        rows = slice(begin, min(begin + _CAST_ROWS, weight.shape[0]))
        yield rows, weight[rows].to(dtype)
