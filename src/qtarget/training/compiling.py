"""Whether a run on a CPU is long enough for compiling the rows' mathematics to pay off.

Known before the first step from the settings and the rows alone, so that a run that is resumed computes as the one that
was not interrupted, bit for bit.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from datasets import Dataset

from qtarget.losses import engine
from qtarget.targets import Target

logger = logging.getLogger(__name__)

# Logits of a run from which on compiling pays: many times what benchmarks/engine.py measures, since a first
# compile on another machine takes several times longer, and nobody with a short run should wait for it.
PAYS_FROM = 4e10


def backend(targets: list[Target], device: torch.device, logits: float | None) -> str:
    """ "compiled" where it pays on a CPU, else "auto".

    A target whose residuals are all the student has nothing to gain: its few passes are in cache.

    Args:
        logits: supervised tokens of the whole run in this process times the vocabulary; None: not known.
    """
    pooled = any(target.residual_terms for target in targets)
    if device.type != "cpu" or not pooled or logits is None or logits < PAYS_FROM or engine.no_compiler(device):
        return "auto"
    logger.info("the run is long enough to compile the targets' row mathematics, which takes about ten seconds")
    return "compiled"


def logits_of_run(dataset: Any, rows: int, vocab_size: int) -> float | None:
    """Supervised tokens of ``rows`` rows of a prepared dataset, by the first few, times the vocabulary.

    None for a stream, whose rows are not read ahead for it.
    """
    if not isinstance(dataset, Dataset) or "labels" not in dataset.column_names or not len(dataset):
        return None
    sample = dataset.select(range(min(64, len(dataset))))["labels"]
    supervised = sum(sum(label != -100 for label in labels) for labels in sample)
    return supervised / len(sample) * rows * vocab_size
