"""How often a call waits for the device, and what NVIDIA's memory and race checkers say of the kernels.

PyTorch warns of each read of a number from the device. Two are allowed in a call with its backward: one before the
chunks, that counts the supervised tokens, and one after them, for faults.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch

import qtarget as qt
from gpu_run.clock import synchronize
from gpu_run.inputs import TIMED, Inputs, Shape
from gpu_run.record import Settings, Talk

MOST_READS = 2
SHAPE, SMOKE_SHAPE = Shape(9000, 256, 32003), Shape(40, 16, 97)
TOOLS = {"memcheck": ["--leak-check", "no"], "racecheck": []}


def run(talk: Talk) -> None:
    """Count the reads of each timed target, of one that drops tokens, and of a batch with several; then the checkers."""
    settings = talk.settings
    device, backend = settings.device, settings.backend
    x = Inputs(SMOKE_SHAPE if settings.smoke else SHAPE, device, torch.float32 if settings.smoke else torch.bfloat16)
    calls = {one.name: (lambda one=one: (one.target, one.teacher(x))) for one in TIMED}
    calls["profit, drops tokens"] = lambda: (qt.preset("profit"), {})
    some = torch.arange(x.shape.tokens, device=device) % 2
    both = [qt.preset("dft"), qt.preset("target-sft")]
    calls["two targets"] = lambda: (both, {"which": some, "teacher": x.teacher})
    for name, make in calls.items():
        for labels in ("all supervised", "half ignored"):
            target, given = make()
            reads = _reads(x, target, given, backend, half=labels == "half ignored", device=device)
            talk.row(f"{name}, {labels}", host_reads=reads)
            if device.type == "cuda":
                talk.limit(f"{name}, {labels}: host reads of a call", reads, most=MOST_READS)
    if device.type == "cuda":
        _checkers(talk)


def _reads(x: Inputs, target, given: dict, backend: str, half: bool, device: torch.device) -> int:
    labels = x.labels
    if half:
        labels = labels.masked_fill(torch.arange(len(labels), device=device) % 2 == 0, -100)

    def call() -> None:
        qt.linear_target_loss(x.hidden, x.weight, labels, target, backend=backend, **given).loss.backward()

    call()  # warm up: what is compiled or asked once
    x.clear()
    synchronize(device)
    if device.type != "cuda":
        call()
        x.clear()
        return 0
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    x.clear()
    # not the sentence that says that this mode is a prototype
    return sum("called a synchronizing" in str(warning.message) for warning in told)


# -- checkers ----------------------------------------------------------------------------------------------------------


def start_checkers(settings: Settings) -> list[subprocess.Popen]:
    """Start the checkers on a tiny run, each with a file of what it printed and one of how it ended."""
    tool = shutil.which("compute-sanitizer") or _beside_nvcc()
    if settings.device.type != "cuda" or tool is None:
        return []
    started = []
    # Each tensor an allocation of its own, so that a step beyond one is noticed.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for name, options in TOOLS.items():
        only = [f"--kernel-name=kernel_substring={kernel}" for kernel in ("_sums", "_gradient")]
        program = [sys.executable, str(Path(__file__).parent.parent / "gpu.py"), "--tiny"]
        command = [tool, "--tool", name, *options, *only, "--error-exitcode", "9", *program]
        log, rc = settings.folder / f"{name}.log", settings.folder / f"{name}.rc"
        script = 'out=$1 rc=$2; shift 2; "$@" >"$out" 2>&1; echo $? >"$rc"'
        started.append(
            subprocess.Popen(
                ["sh", "-c", script, "sh", str(log), str(rc), *command], env=environment, start_new_session=True
            )
        )
    return started


def _beside_nvcc() -> str | None:
    path = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "compute-sanitizer"
    return str(path) if path.exists() else None


def _checkers(talk: Talk) -> None:
    """Wait for the checkers that were started with an earlier part."""
    if not list(talk.settings.folder.glob("*check.log")):
        talk.note("compute-sanitizer is not there: memory and races were not checked")
        return
    for name in TOOLS:
        log, rc = talk.settings.folder / f"{name}.log", talk.settings.folder / f"{name}.rc"
        while not rc.exists() and talk.left > 1:
            time.sleep(0.2)
        if not rc.exists():
            talk.note(f"{name} was not ready in time")
            continue
        code, text = int(rc.read_text().strip() or -1), log.read_text(errors="replace")
        last = [line.strip("= ") for line in text.splitlines() if line.strip()][-1:] or [""]
        talk.row(name, status=code, says=last[0][:120])
        if code == 9 or (code == 0 and "ERROR SUMMARY: 0" not in text and "0 hazards" not in text):
            talk.fail(f"{name}: {last[0][:200]}; the whole of it: {text[-2000:]}")
        elif code:
            talk.note(f"{name} could not run: {text[-600:]}")


def tiny(device: torch.device) -> None:
    """What the checkers look at: each kind of pass once, rows that no tile fits, a few tokens."""
    x = Inputs(Shape(7, 64, 5003), device)
    x.labels.clamp_(max=4998)
    for one in TIMED:
        for stats in ("basic", "all"):
            loss = qt.linear_target_loss(
                x.hidden,
                x.weight,
                x.labels,
                one.target,
                backend="triton",
                logit_softcap=30.0,
                vocab_size=None if one.source == "top-k" else 4999,
                stats=stats,
                **one.teacher(x),
            ).loss
            loss.backward()
            x.clear()
    for name, options in (("gem", {"h": "logsigmoid"}), ("label-smoothing", {}), ("profit", {})):
        target = qt.preset(name, **options)
        qt.linear_target_loss(x.hidden, x.weight, x.labels, target, backend="triton").loss.backward()
        x.clear()
    synchronize(device)
