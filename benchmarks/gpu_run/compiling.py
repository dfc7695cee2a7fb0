"""Every kernel compiled ahead, on all cores at once, and inductor's graphs for the times: later parts find them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from gpu_run import ahead
from gpu_run.record import Settings, Talk

ENTRY = Path(__file__).parent.parent


def run(talk: Talk) -> None:
    """For this device's compute capability; without one for 8.0 and 9.0."""
    settings = talk.settings
    if importlib.util.find_spec("triton") is None:
        talk.note("triton is not installed: no kernel was compiled")
        return
    if settings.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(settings.device)
        architectures = [10 * major + minor]
    else:
        architectures = [90] if settings.smoke else [80, 90]
    warmers = [] if settings.check or settings.device.type != "cuda" else _warm(settings)
    for architecture in architectures:
        compile_for(architecture, talk)
    for name, warmer in warmers:
        try:
            if warmer.wait(max(1.0, talk.left - 3)):
                talk.note(f"inductor's graphs for {name} were not compiled beforehand")
        except subprocess.TimeoutExpired:
            warmer.kill()
            talk.note(f"inductor was not ready with {name} in time")


def compile_for(architecture: int, talk: Talk) -> None:
    """In a process of its own: a compiler may crash, and TRITON_INTERPRET may be set here."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    folders = [str(ENTRY), *sys.path]
    environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(folder for folder in folders if folder))
    command = [sys.executable, "-m", "gpu_run.ahead", str(architecture), "--json"]
    if talk.settings.smoke:
        command.append("--only=sums student")
    child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stderr is not None
    count = 0
    for text in child.stdout:
        report = ahead.Report(**json.loads(text))
        count += 1
        talk.row(report.name, **_shown(report))
        for fault in report.faults:
            talk.fail(fault)
    said = child.stderr.read()
    if child.wait() not in (0, 1) or not count:
        talk.fail(
            f"sm_{architecture}: the compiler ended with {child.returncode} after {count} variants: {said[-600:]}"
        )


def _shown(report: ahead.Report) -> dict:
    fields = asdict(report)
    names = ("registers", "stack", "shared", "per_element", "instructions", "loads", "fault")
    return {name: fields[name] for name in names if fields[name] != ""}


def _warm(settings: Settings) -> list[tuple[str, subprocess.Popen]]:
    """A process for each method that inductor compiles: what it writes to disk is found by later parts."""
    from gpu_run.methods import all_methods

    names = [method.key for method in all_methods(settings.backend) if method.compiles]
    command = [sys.executable, str(ENTRY / "gpu.py"), "--warm"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return [(name, subprocess.Popen([*command, name], **quiet)) for name in names]


def warm(name: str) -> None:
    """One step of a method at the shape of the stage in which inductor takes part."""
    from gpu_run.inputs import Inputs
    from gpu_run.methods import all_methods
    from gpu_run.timing import STAGES

    (stage,) = [stage for stage in STAGES if stage.compiled]
    (method,) = [method for method in all_methods("triton") if method.key == name]
    method.make()(Inputs(stage.shape, torch.device("cuda"))).backward()
