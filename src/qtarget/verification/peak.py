"""The peak memory of a piece of work, on CUDA by allocator, on Linux by process."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass
class Peak:
    """bytes: the most at one time, less what was there before; None where it cannot be measured."""

    bytes: int | None = None


@contextmanager
def watched(device: torch.device) -> Iterator[Peak]:
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    resident = _of_process()
    yield peak
    if resident is not None:
        peak.bytes = max(0, _read("VmHWM") - resident)


def _of_process() -> int | None:
    """Resident bytes now, and the high-water mark set down to them; None where there is no /proc that can do so."""
    gc.collect()
    with suppress(OSError, AttributeError):  # what was freed would hide as much of what comes
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _read("VmRSS")
    except (OSError, KeyError, ValueError):
        return None


def _read(name: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return 1024 * int(lines[name].split()[0])
