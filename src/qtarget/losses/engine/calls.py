"""The arguments and the result of one call of the engine."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from qtarget.losses.heads import Head, TopK
from qtarget.losses.inputs import Checks, Tokens
from qtarget.targets import Target


@dataclass
class EngineCall:
    """One call of the engine: everything but the student's hidden states, head weight and bias."""

    targets: tuple[Target, ...]
    tokens: Tokens
    aux: dict[str, Head | TopK]
    vocab_size: int
    logit_scale: float
    logit_softcap: float | None
    with_kl: bool
    backend: str
    compute: torch.dtype
    aux_compute: dict[str, torch.dtype]
    checks: Checks
    rows_per_chunk: int | None = None
    statistics: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Result:
    """Per-token loss and statistics [n], and the summed loss's gradients where they were asked for.

    Attributes:
        factor: what the gradients are still to be multiplied by: where that takes a pass over dW, it is the same pass
            that multiplies by the incoming gradient.
    """

    loss: Tensor
    stats: dict[str, Tensor]
    d_hidden: Tensor | None = None
    d_weight: Tensor | None = None
    d_bias: Tensor | None = None
    factor: Tensor | float = 1.0
