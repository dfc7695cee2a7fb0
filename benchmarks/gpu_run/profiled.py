"""One step under PyTorch's profiler: where the device's time goes and how long it stands idle; and bytes that NVIDIA's
profiler counts in each kernel beside those that are derived for it."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from gpu_run.clock import synchronize
from gpu_run.inputs import Inputs, Shape, timed
from gpu_run.kernels_alone import CALLS, recorded
from gpu_run.methods import qtarget_loss
from gpu_run.record import Talk

SHAPE, SMOKE_SHAPE = Shape(8192, 2048, 151936), Shape(24, 16, 97)
BYTES_AGREE = 0.10
COUNTED = "COUNTED "
MOST_KERNELS = 12
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


def run(talk: Talk) -> None:
    """dft, then target-sft."""
    settings = talk.settings
    x = Inputs(
        SMOKE_SHAPE if settings.smoke else SHAPE,
        settings.device,
        torch.float32 if settings.smoke else torch.bfloat16,
    )
    for name in ("dft", "target-sft"):
        _profile(talk, x, name)


def _profile(talk: Talk, x: Inputs, name: str) -> None:
    from torch.profiler import ProfilerActivity, profile

    device, one = talk.settings.device, timed(name)

    def step() -> None:
        qtarget_loss(x, one, talk.settings.backend).backward()
        x.clear()

    step()
    synchronize(device)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as found:
        step()
        synchronize(device)
    events = found.events() or []
    on_device = [event for event in events if str(event.device_type).endswith("CUDA")]
    on_device = on_device or [event for event in events if device.type == "cpu" and event.cpu_parent is None]
    spans = sorted((event.time_range.start, event.time_range.end) for event in on_device)
    busy, idle, end = 0.0, 0.0, None
    for start, stop in spans:
        if end is not None:
            idle += max(0.0, start - end)
        busy += max(0.0, stop - max(start, end or start))
        end = stop if end is None else max(end, stop)
    waits = {wait: sum(event.name.startswith(wait) for event in events) for wait in WAITS}
    talk.row(
        f"{name}, a step",
        busy_ms=busy / 1e3,
        idle_ms=idle / 1e3,
        kernels=len(on_device),
        waits={k: n for k, n in waits.items() if n},
    )
    by_name: dict[str, list[float]] = {}
    for event in on_device:
        by_name.setdefault(event.name, []).append(event.time_range.end - event.time_range.start)
    for kernel, times in sorted(by_name.items(), key=lambda item: -sum(item[1]))[:MOST_KERNELS]:
        talk.row(f"{name}, {kernel[:46]}", ms=sum(times) / 1e3, calls=len(times))


# -- bytes -------------------------------------------------------------------------------------------------------------


def counted(device: torch.device) -> None:
    """What NVIDIA's profiler looks at: each call's passes, once; and a line of what was launched, in that order."""
    found = [launch for call in CALLS for launch in recorded(call, device, smoke=device.type == "cpu")]
    synchronize(device)
    print(COUNTED + json.dumps([[f"{launch.kernel}, {launch.label}", launch.bytes] for launch in found]))


def count_bytes(talk: Talk) -> None:
    """What ncu counts in each kernel over what is derived for it."""
    tool = shutil.which("ncu")
    if talk.settings.device.type != "cuda":
        return
    if tool is None:
        talk.note("ncu is not there: bytes were not counted")
        return
    program = [sys.executable, str(Path(__file__).parent.parent / "gpu.py"), "--counted"]
    command = [
        tool,
        "--clock-control",
        "none",
        "--csv",
        "--print-units",
        "base",
        "--kernel-name",
        "regex:_sums|_gradient",
    ]
    command += ["--metrics", "dram__bytes_read.sum,dram__bytes_write.sum", *program]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=max(2.0, talk.left - 1.5), env=os.environ
        )
    except subprocess.TimeoutExpired:
        talk.note("ncu was not ready in time: bytes were not counted")
        return
    moved = list(parse(done.stdout).values())
    told = [line.removeprefix(COUNTED) for line in done.stdout.splitlines() if line.startswith(COUNTED)]
    launched = json.loads(told[0]) if told else []
    if len(moved) != len(launched) or not moved:
        talk.note(f"ncu told of {len(moved)} kernels, {len(launched)} were run: {(done.stdout + done.stderr)[-400:]}")
        return
    for (name, bytes_), got in zip(launched, moved, strict=True):
        talk.row(f"{name}: bytes over those derived", ratio=got / bytes_)
        talk.limit(f"{name}: bytes over those derived", got / bytes_, most=1 + BYTES_AGREE, least=1 - BYTES_AGREE)


def parse(text: str) -> dict[str, float]:
    """Bytes by launch from ncu's table, in the order of the launches."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    found: dict[str, float] = {}
    for row in csv.DictReader(lines):
        if (row.get("Metric Name") or "").startswith("dram__bytes"):
            found[row["ID"]] = found.get(row["ID"], 0.0) + float(row["Metric Value"].replace(",", ""))
    return found
