"""The engine: a chunk of tokens at a time, logits in, gradient out; calls and backends."""

from __future__ import annotations

import importlib.util
import os
import shutil
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qtarget.errors import ConfigError, unknown
from qtarget.losses.heads import Head, TopK
from qtarget.losses.inputs import Checks, Tokens
from qtarget.targets import Target

BACKENDS = ("auto", "torch", "triton", "compiled")


@dataclass
class EngineCall:
    """One call of the engine: everything but the student's hidden states, head weight and bias."""

    targets: tuple[Target, ...]
    tokens: Tokens
    aux: dict[str, Head | TopK]
    vocab_size: int
    logit_scale: float
    logit_softcap: float | None
    z_loss: float
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


def choose(backend: str, device: torch.device, dtype: torch.dtype, field: str = "backend") -> str:
    """torch, triton or compiled, for ``backend``.

    "auto" takes Triton's kernels on NVIDIA's devices from compute capability 8.0 on, inductor's on other GPUs, and plain
    PyTorch on a CPU, where the others first have to be compiled for some ten seconds. ``torch`` runs everywhere.

    Raises:
        ConfigError: a name that is not one of ``BACKENDS``, or one that cannot run here.
    """
    if backend not in BACKENDS:
        raise unknown(field, backend, BACKENDS)
    if backend == "auto":
        if device.type in ("cpu", "mps", "meta") or dtype == torch.float64:
            return "torch"
        if no_triton(device) is None:
            return "triton"
        return "torch" if device.type == "cuda" and torch.version.hip is None else "compiled"
    reason = {"triton": no_triton, "compiled": no_compiler}.get(backend, lambda _: None)(device)
    if reason is not None:
        raise ConfigError(f"{field} is {backend!r}, which {reason}; use 'auto', which uses what runs here")
    return backend


def available(device: torch.device) -> list[str]:
    """Names of the backends that can run on a device."""
    reasons = {"torch": None, "triton": no_triton(device), "compiled": no_compiler(device)}
    return [name for name, reason in reasons.items() if reason is None]


def no_triton(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run, or None."""
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton"
    from qtarget.losses.engine.device import kernels

    return kernels.can_run(device)


def no_compiler(device: torch.device) -> str | None:
    """Why inductor cannot run, or None."""
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX") or "g++", "c++", "clang++"))):
        return "needs a C++ compiler on a CPU"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "needs the package triton"
    return None
