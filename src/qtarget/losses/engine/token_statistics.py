"""Statistics that trust rules read off whole rows, in blocks of rows.

Written without slices by ``[:, None]`` and without host reads, so that it runs on a device and on tensors without data.

Shape suffixes: r rows of the block, v vocabulary, s columns that another model covers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from qtarget.losses.engine.buffers import PerRow, Rows
from qtarget.losses.engine.sizes import block_rows

OF_STUDENT = frozenset({"sum_sq", "rank", "lower_mass"})
# By the other model's name.
OF_OTHERS = {
    name: frozenset({f"{name}_log_p_y", f"{name}_entropy", f"{name}_lower_mass", f"kl_{name}"})
    for name in ("teacher", "reference")
}


def of_rows(
    rows: Rows, needs: Collection[str], vocab_size: int, dense: Callable[[Rows, str], Tensor]
) -> dict[str, Tensor]:
    """The statistics among ``needs`` that take all of a row, [r] each.

    Args:
        rows: their logits as the first pass finds them, nothing taken out. dense: gives another model's logits.
    """
    wanted = OF_STUDENT.union(*OF_OTHERS.values()).intersection(needs)
    if not wanted:
        return {}
    r, v = rows.z.shape
    height = block_rows(r, v, rows.z.element_size(), rows.z.device)
    cuts = [slice(begin, min(begin + height, r)) for begin in range(0, r, height)]
    blocks = [_of_block(rows[cut], wanted, vocab_size, dense) for cut in cuts]
    return {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}


def _of_block(rows: Rows, wanted: frozenset[str], vocab_size: int, dense: Callable[[Rows, str], Tensor]) -> PerRow:
    found = _of_student(rows.z, rows.labels, wanted & OF_STUDENT)
    for name, statistics in OF_OTHERS.items():
        if wanted & statistics:
            other = dense(rows, name)
            other = other.narrow(1, 0, min(vocab_size, other.shape[1]))
            found |= _of_other(name, other, rows.z, rows.labels, wanted & statistics)
    return found


def _of_student(z: Tensor, y: Tensor, wanted: frozenset[str]) -> PerRow:
    found, z_y = {}, z.gather(1, y.unsqueeze(1))
    if "rank" in wanted:
        found["rank"] = (z > z_y).sum(1).to(z.dtype) + 1
    if wanted & {"sum_sq", "lower_mass"}:
        p = z.softmax(1)
        if "lower_mass" in wanted:
            found["lower_mass"] = torch.where(z < z_y, p, 0.0).sum(1)
        if "sum_sq" in wanted:
            found["sum_sq"] = p.square_().sum(1)
    return found


def _of_other(name: str, other: Tensor, z: Tensor, y: Tensor, wanted: frozenset[str]) -> PerRow:
    """Of another model's logits [r, s]. A label that it does not have has a probability of 0."""
    found, s = {}, other.shape[1]
    log_o = _log_softmax(other)
    known, unknown = y.clamp(max=s - 1).unsqueeze(1), y >= s
    if f"{name}_log_p_y" in wanted:
        found[f"{name}_log_p_y"] = log_o.gather(1, known).squeeze(1).masked_fill(unknown, float("-inf"))
    if f"{name}_entropy" in wanted:
        o = log_o.exp()
        found[f"{name}_entropy"] = -torch.where(o > 0, o * log_o, 0.0).sum(1)
    if f"{name}_lower_mass" in wanted:
        lower = torch.where(other < other.gather(1, known), log_o.exp(), 0.0).sum(1)
        found[f"{name}_lower_mass"] = lower.masked_fill(unknown, 0.0)
    if f"kl_{name}" in wanted:
        found[f"kl_{name}"] = _kl(_log_softmax(z.narrow(1, 0, s)), log_o)
    return found


def _log_softmax(x: Tensor) -> Tensor:
    """torch's own makes a copy of columns that are not contiguous."""
    x = x - x.amax(1, keepdim=True)
    return x - x.exp().sum(1, keepdim=True).log()


def _kl(log_p: Tensor, log_o: Tensor) -> Tensor:
    """KL(p ‖ o), [r], as Σ (p d + o − p) with d = log p − log o: no term is negative, so that models that are near keep
    their digits, and what the normalisers are off by drops out."""
    p, d = log_p.exp(), log_p - log_o
    near = p * (d + torch.expm1(-d))
    far = torch.where(p > 0, p * d, 0.0) + (log_o.exp() - p)
    return torch.where(d.abs() < 1, near, far).sum(1)
