"""Runs the parts one after another, each in a process of its own that is ended at its deadline.

A part may crash the process, hang in a kernel, or leave the device's context unusable: the next one starts from a fresh
fork of this process, which has imported everything and has not touched the device. Results come through a pipe and are
written as they come.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from multiprocessing.connection import Connection

import torch

from gpu_run.record import CRASHED, CUT, DONE, Found, Part, Record, Settings, Talk

_fork = multiprocessing.get_context("fork")
# After its deadline a part has so long to end by itself.
GRACE_SECONDS = 2.0
_PR_SET_PDEATHSIG = 1


def run_parts(parts: list[Part], settings: Settings, record: Record, seconds: float) -> None:
    """Fill ``record`` part by part, in ``seconds`` in all."""
    until = time.monotonic() + seconds
    record.write()
    beside: list[subprocess.Popen] = []
    try:
        for part, found in zip(parts, record.parts, strict=True):
            left = until - time.monotonic()
            if left < 1:
                continue  # it stays "not reached"
            print(f"-- {part.name}, at most {min(part.seconds, left):.0f} s", flush=True)
            started = part.background(settings) if part.background else []
            run_part(part, settings, found, min(part.seconds, left), record)
            record.write()
            _stop(beside)
            beside = started
    finally:
        _stop(beside)


def run_part(part: Part, settings: Settings, found: Found, seconds: float, record: Record | None = None) -> None:
    """Run one part in a child; whatever it sends before it ends, or is ended, is kept."""
    ours, theirs = _fork.Pipe(duplex=False)
    start = time.monotonic()
    child = _fork.Process(target=_child, args=(part, settings, theirs, seconds))
    child.start()
    theirs.close()
    ended = False
    while True:
        left = start + seconds - time.monotonic()
        if not ours.poll(max(0.0, left)):
            break  # the deadline
        try:
            message = ours.recv()
        except EOFError:
            ended = True
            break
        if message.get("done"):
            found.state = DONE
        found.take(message)
        if record is not None and "row" not in message:
            record.write()
    if not ended:
        found.state = CUT
    _end(child, 10.0 if ended else 0.0)
    while not ended and ours.poll(0):  # what was on its way
        try:
            found.take(ours.recv())
        except (EOFError, OSError):
            break
    ours.close()
    found.seconds = round(time.monotonic() - start, 1)
    if ended and found.state != DONE:
        found.state = CRASHED
        found.error = found.error or f"its process ended with {_ending(child.exitcode)}"


def _end(child, patience: float) -> None:
    """Wait so long for a child, then end it with everything it started."""
    child.join(patience)
    if child.is_alive():
        _signal_group(child.pid, signal.SIGTERM)
        child.join(GRACE_SECONDS)
    _signal_group(child.pid, signal.SIGKILL)  # and what it left behind
    child.join()


def _stop(programs: list[subprocess.Popen]) -> None:
    """End what is still running of programs that lead a group each."""
    for program in programs:
        _signal_group(program.pid, signal.SIGKILL)
        program.wait()


def _signal_group(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def _end_with_parent() -> None:
    """On Linux a process may ask to be ended when the one that started it is."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"signal {signal.Signals(-code).name}"
    return f"exit status {code}"


def _child(part: Part, settings: Settings, pipe: Connection, seconds: float) -> None:
    os.setsid()  # a group of its own, so that it ends with all it started
    _end_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    faulthandler.enable()
    torch.set_num_threads(1 if settings.device.type == "cpu" else max(1, (os.cpu_count() or 2) // 2))
    try:
        part.run(Talk(settings, pipe.send, seconds))
        pipe.send({"done": True})
        code = 0
    except BaseException as error:
        traceback.print_exc()
        where = traceback.extract_tb(error.__traceback__)[-1]
        told = " ".join(str(error).split())[:400]
        pipe.send({"error": f"{type(error).__name__}: {told} ({os.path.basename(where.filename)}:{where.lineno})"})
        code = 1
    pipe.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the parent's own clean-up is not the child's
