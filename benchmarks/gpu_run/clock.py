"""Time and memory of a call on a device."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import torch


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(function: Callable[[], object], device: torch.device, warm_up: int = 0, calls: int = 1) -> float:
    """Of one call, the mean of ``calls`` after ``warm_up``; the device's queue is empty before and after."""
    for _ in range(warm_up):
        function()
    synchronize(device)
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - start) * 1e3 / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / calls


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """What a call takes at its peak above what was there before it; 0 where the device does not tell."""
    if device.type != "cuda":
        function()
        return 0
    gc.collect()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def free(device: torch.device) -> None:
    """Give back what the allocator keeps."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
