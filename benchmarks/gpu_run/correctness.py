"""Every published case on this device against the oracle, by several processes at once, and what needs its own size."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait

import torch

from gpu_run import large
from gpu_run.judged import Job, jobs, judge
from gpu_run.record import Settings, Talk

# Tokens, vocabulary and width: the vocabulary is odd, and no tile of 2048 columns fits it.
SHAPE, SMOKE_SHAPE = (300, 32003, 256), (12, 83, 8)
MOST_WORKERS = 8
# What a worker leaves of its time for the last messages.
MARGIN_SECONDS = 4.0
_fork = multiprocessing.get_context("fork")


@dataclass
class _Sum:
    """What is known of one form in one dtype."""

    jobs: int = 0
    done: int = 0
    errors: dict[str, float] = field(default_factory=dict)
    over_hand: float = 0.0
    worst: str = ""


def run(talk: Talk) -> None:
    """Judge all jobs that time allows; the seed is fresh each time and told, so that a failure can be repeated."""
    settings = talk.settings
    seed = int(os.environ.get("QTARGET_SEED", time.time_ns() % 1_000_000_000))
    todo = jobs(seed, settings.smoke)
    talk.row("seed", seed=seed, jobs=len(todo))
    sums: dict[tuple[str, str], _Sum] = {}
    for job in todo:
        sums.setdefault((job.form, job.dtype), _Sum()).jobs += 1
    if settings.smoke:
        _work(todo, settings, lambda message: _take(message, talk, sums), talk.left)
        large.run(settings, lambda message: _take(message, talk, sums), talk.left)
    else:
        _share_out(todo, settings, talk, sums)
    for (form, dtype), found in sums.items():
        talk.row(
            f"{form}, {dtype}",
            done=found.done,
            of=found.jobs,
            error=found.errors,
            over_hand=found.over_hand or None,
            worst=found.worst,
        )
    left = sum(found.jobs - found.done for found in sums.values())
    if left:
        talk.note(f"{left} of {len(todo)} cases were not reached")


def _share_out(todo: list[Job], settings: Settings, talk: Talk, sums: dict) -> None:
    """Processes that share the device, each with every so-many-th job; one more for what is large."""
    count = max(1, min(MOST_WORKERS, (os.cpu_count() or 2) // 2))
    until = time.monotonic() + talk.left - MARGIN_SECONDS
    pipes: list[Connection] = []
    tasks: list[Callable[[Callable, float], None]] = [
        lambda send, left, share=todo[i::count]: _work(share, settings, send, left) for i in range(count)
    ]
    tasks.append(lambda send, left: large.run(settings, send, left))
    children = {}
    for task in tasks:
        ours, theirs = _fork.Pipe(duplex=False)
        child = _fork.Process(target=_child, args=(task, theirs, until - time.monotonic()))
        child.start()
        theirs.close()
        pipes.append(ours)
        children[ours] = child
    at = dict.fromkeys(pipes, "its first case")
    while pipes and (left := until + MARGIN_SECONDS / 2 - time.monotonic()) > 0:
        for pipe in wait(pipes, timeout=left):
            try:
                message = pipe.recv()
            except EOFError:
                pipes.remove(pipe)
                children[pipe].join()
                if children[pipe].exitcode:
                    talk.fail(f"a process ended with {children[pipe].exitcode} in {at[pipe]}")
                continue
            at[pipe] = message.get("at", at[pipe])
            _take(message, talk, sums)
    for pipe in pipes:
        talk.note(f"a process was still in {at[pipe]} when time was up")
        children[pipe].kill()


def _child(task: Callable, pipe: Connection, left: float) -> None:
    torch.set_num_threads(1)
    try:
        task(pipe.send, left)
        code = 0
    except BaseException as error:
        pipe.send({"fail": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})
        code = 1
    pipe.close()
    os._exit(code)


def _work(todo: list[Job], settings: Settings, send: Callable[[dict], object], left: float) -> None:
    """Judge jobs until time is up; a job that raises is a failure and the next one goes on, unless the device is lost."""
    until = time.monotonic() + left
    shape = SMOKE_SHAPE if settings.smoke else SHAPE
    for job in todo:
        if time.monotonic() > until:
            return
        send({"at": job.name})
        try:
            verdict = judge(job, *shape, settings.device, settings.backend)
        except Exception as error:
            told = " ".join(str(error).split())[:300]
            send({"fail": f"{job.name} (seed {job.seed}): {type(error).__name__}: {told}"})
            if "CUDA error" in told:
                return
            continue
        for fault in verdict.faults:
            send({"fail": f"{job.name} (seed {job.seed}): {fault}"})
        over = max((verdict.errors[name] / max(1e-30, verdict.by_hand[name]) for name in verdict.by_hand), default=0.0)
        key = (job.form, job.dtype)
        send({"verdict": key, "errors": verdict.errors, "over_hand": over, "name": job.case.id})


def _take(message: dict, talk: Talk, sums: dict[tuple[str, str], _Sum]) -> None:
    if "fail" in message:
        talk.fail(message["fail"])
    elif "note" in message:
        talk.note(message["note"])
    elif "row" in message:
        talk.row(**message["row"])
    elif "verdict" in message:
        found = sums[message["verdict"]]
        found.done += 1
        found.over_hand = max(found.over_hand, message["over_hand"])
        for name, error in message["errors"].items():
            if error >= found.errors.get(name, 0.0):
                found.errors[name] = error
                found.worst = message["name"] if name == "weight" else found.worst
