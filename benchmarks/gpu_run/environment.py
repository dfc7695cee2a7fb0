"""Versions, and the ceilings of this device that everything else is measured against."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import subprocess
from collections.abc import Callable
from datetime import date
from typing import Any

import torch

from gpu_run.clock import milliseconds
from gpu_run.record import Talk

PACKAGES = (
    "qtarget",
    "torch",
    "triton",
    "transformers",
    "trl",
    "accelerate",
    "datasets",
    "liger-kernel",
    "cut-cross-entropy",
)


def versions() -> dict[str, str]:
    """Of what takes part; "not installed" is told, too."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    found["torch"] = torch.__version__
    if found["qtarget"] == "not installed":
        import qtarget

        found["qtarget"] = f"{qtarget.__version__} (source tree)"
    return found


def about(cuda: bool) -> dict[str, Any]:
    """Date, versions and the device's name, without touching the device from this process."""
    found: dict[str, Any] = {"date": date.today().isoformat(), "versions": versions(), "cpus": os.cpu_count()}
    found["device"] = _nvidia("name,driver_version,memory.total,compute_cap") if cuda else platform.machine()
    found["cuda"] = torch.version.cuda
    return found


def _nvidia(fields: str) -> str:
    try:
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.splitlines()[0].strip()
    except (OSError, subprocess.TimeoutExpired, IndexError):
        return "a CUDA device"


def run(talk: Talk) -> None:
    """Copy bandwidth and matmul rates, 16 and 32 bits wide."""
    device, smoke = talk.settings.device, talk.settings.smoke
    for name, version in versions().items():
        if version == "not installed":
            talk.note(f"{name} is not installed: what needs it is left out")
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        talk.row(
            properties.name,
            processors=properties.multi_processor_count,
            memory_gb=properties.total_memory / 1e9,
            l2_mb=getattr(properties, "L2_cache_size", 0) / 2**20,
            capability=f"{properties.major}.{properties.minor}",
        )
    talk.row("copy", tb_per_s=copy_rate(device, 1 << 14 if smoke else 1 << 29))
    n, wide = (64, 96) if smoke else (4096, 65536)
    for name, make in MATMULS.items():
        try:
            product = make(n, n, wide, device)
            flop = 2 * n * n * wide
            talk.row(name, tflop_per_s=flop / milliseconds(product, device, 2, 5) / 1e9)
        except (RuntimeError, TypeError, NotImplementedError) as error:
            talk.note(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:200]}")


def copy_rate(device: torch.device, bytes_: int) -> float:
    """TB/s of a copy on the device, bytes read and written."""
    a = torch.empty(bytes_ // 4, device=device)
    b = torch.empty_like(a)
    a.fill_(1.0)
    taken = [milliseconds(lambda: b.copy_(a), device, 1, 1) for _ in range(7)]
    return 2 * bytes_ / statistics.median(taken) / 1e9


def _pair(m: int, k: int, n: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(m, k, device=device).to(dtype), torch.randn(n, k, device=device).to(dtype)


def _half(m, k, n, device):
    a, b = _pair(m, k, n, device, torch.bfloat16)
    return lambda: a @ b.T


def _wide(m, k, n, device):
    a, b = _pair(m, k, n, device, torch.bfloat16)
    out = torch.empty(m, n, device=device)
    return lambda: torch.mm(a, b.T, out_dtype=torch.float32, out=out)


def _strided(m, k, n, device):
    """As the engine's buffers for a vocabulary that 64 does not divide: rows apart by more than they are long."""
    a, b = _pair(m, k, n - 47, device, torch.bfloat16)
    out = torch.empty(m, n, device=device).narrow(1, 0, n - 47)
    return lambda: torch.mm(a, b.T, out_dtype=torch.float32, out=out)


def _accumulated(m, k, n, device):
    """As dW: gᵀ h added to float32."""
    g, h = torch.randn(m, n, device=device).bfloat16(), torch.randn(m, k, device=device).bfloat16()
    out = torch.zeros(n, k, device=device)
    return lambda: torch.addmm(out, g.T, h, out_dtype=torch.float32, beta=1.0, alpha=0.5, out=out)


def _single(tf32: bool) -> Callable:
    def make(m, k, n, device):
        a, b = _pair(m, k, n // 4, device, torch.float32)  # a quarter, counted as one

        def product():
            before = torch.backends.cuda.matmul.allow_tf32
            torch.backends.cuda.matmul.allow_tf32 = tf32
            for _ in range(4):
                a @ b.T
            torch.backends.cuda.matmul.allow_tf32 = before

        return product

    return make


MATMULS: dict[str, Callable] = {
    "mm, bf16 to bf16": _half,
    "mm, bf16 to float32": _wide,
    "mm, bf16 to float32, rows apart": _strided,
    "addmm, bf16 onto float32": _accumulated,
    "mm, float32": _single(False),
    "mm, float32 in TF32": _single(True),
}
