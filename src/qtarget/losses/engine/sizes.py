"""How many tokens one chunk holds: from arithmetic intensity first, then capped by memory."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from qtarget.errors import ConfigError

logger = logging.getLogger(__name__)

# On a CPU: rows at which the three matmuls stop being bound by reading the head's weight, measured.
_ENOUGH_ROWS = 768
_FEWEST_ROWS = 128
_BUDGET_BYTES = 512 << 20
# Scratch for the row-wise mathematics of a CPU: what stays in cache.
_SCRATCH_BYTES = 6 << 20

# On a GPU, derived: logits of so many rows, of all models together, fill the matmuls and the torch operations between two
# kernels weigh little; a float32 dW that is read and written again for each product costs 12 per cent of the matmuls at
# 2048 rows of g and half of that at 4096.
_DEVICE_LOGITS_ROWS = 2048
_DEVICE_GRADIENT_ROWS = 4096
_DEVICE_FEWEST_ROWS = 256
_DEVICE_BUDGET_BYTES = 2 << 30
_LARGE_DEVICE_BYTES = 40 << 30
# Where blocks of rows are worked on by torch's own kernels: what fills the device.
_DEVICE_SCRATCH_BYTES = 128 << 20
# torch's kernels count the elements of a block in 32 bits.
_MOST_ELEMENTS = 2**31 - 1


@dataclass(frozen=True)
class Sizes:
    """How one call is cut.

    Attributes:
        logits: rows whose logits are there at one time. gradient: rows whose gradient is, before dH and dW are
            multiplied; where it is written over the logits, the same. block: rows the row mathematics takes at a time.
        whole: whether dW comes in one product.
    """

    logits: int
    gradient: int
    block: int
    whole: bool = False


def chunk_rows(tokens: int, vocab: int, models: int, itemsize: int, device: torch.device) -> int:
    """Rows of one chunk on a CPU, and wherever the gradient is written over float32 logits: equal chunks, for logits
    buffers [rows, vocab] of ``models``.

    Never derived from tokens·width/vocab: with a small width and a large vocabulary that rule gives a few rows and
    several times the time (torch 2.13's own op: 16 rows at width 576, vocabulary 49152).
    """
    host = device.type == "cpu"
    rows, fewest = (_ENOUGH_ROWS, _FEWEST_ROWS) if host else (_DEVICE_LOGITS_ROWS, 2 * _DEVICE_FEWEST_ROWS)
    budget = _BUDGET_BYTES if host else _DEVICE_BUDGET_BYTES
    row = models * vocab * itemsize
    while rows > fewest and rows * row > budget:
        rows = max(fewest, rows // 2)
    _say_if_over(rows, rows * row, budget, vocab)
    return _equal(tokens, max(1, min(rows, _MOST_ELEMENTS // vocab)))


def block_rows(rows: int, vocab: int, itemsize: int, device: torch.device) -> int:
    """Rows of one block of the elementwise passes, so that its scratch stays in cache."""
    scratch = _SCRATCH_BYTES if device.type == "cpu" else _DEVICE_SCRATCH_BYTES
    return max(1, min(rows, scratch // (vocab * itemsize)))


def device_sizes(
    tokens: int, vocab: int, models: int, itemsize: int, accumulator: int, memory: int, skips: bool
) -> Sizes:
    """The cut where kernels write g in 16 bits beside float32 logits.

    dW is one product where the whole of g takes no more memory than the float32 accumulator it spares; also where tokens
    are skipped and the whole fits the budget, since only then they can be counted without a host read for each part.

    Args:
        models: logits buffers. itemsize: bytes of a number of g. accumulator: bytes of a float32 dW that one product
            would spare, 0 where none would. memory: bytes of the device. skips: whether some tokens may have no gradient.
    """
    budget = _DEVICE_BUDGET_BYTES * (2 if memory >= _LARGE_DEVICE_BYTES else 1)
    logits_row, gradient_row = models * vocab * 4, vocab * itemsize
    logits = min(max(_DEVICE_FEWEST_ROWS, _DEVICE_LOGITS_ROWS // models), tokens)
    while logits > _DEVICE_FEWEST_ROWS and logits * (logits_row + gradient_row) > budget:
        logits //= 2
    left = budget - logits * logits_row
    whole = tokens * gradient_row <= max(accumulator, left if skips else 0)
    gradient = tokens
    if not whole:
        gradient = min(_DEVICE_GRADIENT_ROWS, tokens)
        while gradient > logits and gradient * gradient_row > left:
            gradient = max(logits, gradient // 2)
        _say_if_over(gradient, logits * logits_row + gradient * gradient_row, budget, vocab)
        gradient = _equal(tokens, gradient)
    return Sizes(max(1, min(logits, gradient)), max(1, gradient), max(1, logits), whole)


def check_chunk(rows: int | None, vocab: int) -> None:
    """Refuse a chunk whose logits torch's kernels cannot count."""
    if rows is None:
        return
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
        raise ConfigError(f"chunk_rows is {rows!r}; use a whole number from 1, or None")
    if rows * vocab > _MOST_ELEMENTS:
        raise ConfigError(
            f"chunk_rows is {rows}, which makes {rows} × {vocab} logits, more than 2^31 − 1; "
            f"use at most {_MOST_ELEMENTS // vocab}, or None"
        )


def device_memory(device: torch.device) -> int:
    """Bytes of a device, 0 where it does not say."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


def _equal(tokens: int, rows: int) -> int:
    """The rows of chunks that are all about as large, none larger than ``rows``."""
    chunks = -(-tokens // max(1, rows)) if tokens else 1
    return max(1, -(-tokens // chunks))


def _say_if_over(rows: int, needed: int, budget: int, vocab: int) -> None:
    if needed > budget:
        logger.warning(
            "a vocabulary of %d needs %.0f MB of logits buffers even at %d rows a chunk", vocab, needed / 2**20, rows
        )
