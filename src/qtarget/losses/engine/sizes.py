"""How many tokens one chunk holds: from arithmetic intensity first, then capped by memory."""

from __future__ import annotations

import logging

import torch

logger = logging.getLogger(__name__)

# Rows at which the three matmuls stop being bound by reading the head's weight, measured on CPU; derived for GPUs.
_ENOUGH_ROWS = {"cpu": 768, "gpu": 2048}
_FEWEST_ROWS = {"cpu": 128, "gpu": 512}
_BUDGET_BYTES = {"cpu": 512 << 20, "gpu": 2 << 30}
# Kernels count the elements of a chunk in 32 bits.
_MOST_ELEMENTS = 2**31
# Scratch for the row-wise mathematics: on a CPU what stays in cache, on a GPU what fills the device.
_SCRATCH_BYTES = {"cpu": 6 << 20, "gpu": 128 << 20}


def chunk_rows(tokens: int, vocab: int, buffers: int, itemsize: int, device: torch.device) -> int:
    """Rows of one chunk, equal chunks, for ``buffers`` logits buffers of [rows, vocab].

    Never derived from tokens·width/vocab: with a small width and a large vocabulary that rule gives a few rows and
    several times the time (torch 2.13's own op: 16 rows at width 576, vocabulary 49152).
    """
    kind = "cpu" if device.type == "cpu" else "gpu"
    rows = _ENOUGH_ROWS[kind]
    while rows > _FEWEST_ROWS[kind] and buffers * rows * vocab * itemsize > _BUDGET_BYTES[kind]:
        rows = max(_FEWEST_ROWS[kind], rows // 2)
    if buffers * rows * vocab * itemsize > _BUDGET_BYTES[kind]:
        needed = buffers * rows * vocab * itemsize / 2**20
        logger.warning(
            "a vocabulary of %d needs %.0f MB of logits buffers even at %d rows a chunk", vocab, needed, rows
        )
    rows = max(1, min(rows, tokens, (_MOST_ELEMENTS - 1) // vocab))
    chunks = -(-tokens // rows) if tokens else 1
    return max(1, -(-tokens // chunks))


def block_rows(rows: int, vocab: int, itemsize: int, device: torch.device) -> int:
    """Rows of one block of the elementwise passes, so that its scratch stays in cache."""
    kind = "cpu" if device.type == "cpu" else "gpu"
    return max(1, min(rows, _SCRATCH_BYTES[kind] // (vocab * itemsize)))
