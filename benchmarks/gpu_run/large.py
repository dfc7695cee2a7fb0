"""What has to be right at a size of its own: several targets, other tiles, 262,144 tokens, more than 2³¹ logits."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

import qtarget as qt
from gpu_run.inputs import Inputs, Shape
from gpu_run.judged import Job, judge, poison, relative_error
from gpu_run.record import Settings
from published import CASES

TILES = ((1024, 4), (1024, 8), (4096, 8), (4096, 16))
# dH in 16 bits of a bf16 head, relative to the oracle: about 3e-3 as a rule.
HALF_ERROR = 6e-3
# N, d, V with N ≤ 2 d, so that all of g is there at once: 8200 · 262144 > 2³¹.
HUGE = Shape(8200, 4160, 262144)
HUGE_BYTES = 40 << 30


def run(settings: Settings, send: Callable[[dict], object], left: float) -> None:
    """Each in turn while time is left."""
    until = time.monotonic() + left
    for name, check in CHECKS.items():
        send({"at": name})
        if time.monotonic() > until:
            send({"note": f"{name}: no time was left"})
            continue
        try:
            check(settings, send)
        except torch.OutOfMemoryError:
            send({"note": f"{name}: out of memory"})


def several_targets(settings: Settings, send: Callable[[dict], object]) -> None:
    """A batch with three targets, one of which drops tokens, against each target's own call."""
    shape = Shape(40, 16, 99) if settings.smoke else Shape(1000, 256, 32003)
    x = Inputs(shape, settings.device, torch.float32)
    targets = [qt.preset("dft"), qt.preset("target-sft"), qt.preset("profit")]
    which = torch.arange(shape.tokens, device=settings.device) % 3
    out = qt.linear_target_loss(
        x.hidden, x.weight, x.labels, targets, which=which, teacher=x.teacher, backend=settings.backend, reduction="sum"
    )
    out.loss.backward()
    got = x.hidden.grad, x.weight.grad
    x.clear()
    z = x.hidden.double() @ x.weight.double().T
    t = (x.teacher_hidden.double() @ x.teacher_weight.double().T).detach()
    total = torch.zeros((), dtype=torch.float64, device=settings.device)
    for number, target in enumerate(targets):
        mine = which == number
        teacher = {"teacher_logits": t[mine]} if "teacher" in target.requires else {}
        total = total + qt.target_loss(z[mine], x.labels[mine], target, reduction="sum", **teacher).loss
    total.backward()
    _tell("three targets in a batch", got, (x.hidden.grad, x.weight.grad), 1e-5, send)


def other_tiles(settings: Settings, send: Callable[[dict], object]) -> None:
    """Other widths of a tile and numbers of warps give the same numbers."""
    if settings.device.type != "cuda":
        return
    from qtarget.losses.engine.device import kernels

    before = kernels.BLOCK, kernels.WARPS
    cases = [case for case in CASES if case.id in ("dft", "eaft", "gem", "target-sft", "kd:temperature=2.0")]
    try:
        for kernels.BLOCK, kernels.WARPS in TILES:
            for case in cases:
                job = Job(case, "plain", "bfloat16", seed=17)
                for fault in judge(job, 64, 32003, 256, settings.device, settings.backend).faults:
                    send({"fail": f"tiles of {kernels.BLOCK}, {kernels.WARPS} warps: {job.name}: {fault}"})
    finally:
        kernels.BLOCK, kernels.WARPS = before
    send({"row": {"what": "other tiles", "tiles": [list(tile) for tile in TILES], "cases": len(cases)}})


def large_vocabulary(settings: Settings, send: Callable[[dict], object]) -> None:
    """262,144 tokens of vocabulary, as Gemma has."""
    v = 300 if settings.smoke else 262144
    for case in CASES:
        if case.id in ("dft", "target-sft"):
            job = Job(case, "plain", "bfloat16", seed=23)
            verdict = judge(job, 64, v, 128, settings.device, settings.backend)
            for fault in verdict.faults:
                send({"fail": f"V={v}: {job.name}: {fault}"})
            send({"row": {"what": f"V={v}, {case.id}", "error": verdict.errors}})


def many_logits(settings: Settings, send: Callable[[dict], object]) -> None:
    """More than 2³¹ entries in g: dH of the last rows against the oracle, and dW against one in two halves."""
    shape, device = (Shape(40, 16, 99) if settings.smoke else HUGE), settings.device
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < HUGE_BYTES:
        send({"note": f"more than 2^31 logits: {HUGE_BYTES >> 30} GB of free memory are needed"})
        return
    dtype = torch.float32 if settings.smoke else torch.bfloat16
    x = Inputs(shape, device, dtype, seed=29)
    target = qt.preset("dft")
    poison(device)
    qt.linear_target_loss(
        x.hidden, x.weight, x.labels, target, backend=settings.backend, reduction="sum"
    ).loss.backward()
    d_hidden, d_weight = x.hidden.grad, x.weight.grad
    last = slice(shape.tokens - 16, shape.tokens)
    h = x.hidden.detach()[last].double().requires_grad_()
    w = x.weight.detach()
    # The head in float64 would be large: dH = g W from g alone.
    z = (h.detach().float() @ w.float().T).double().requires_grad_()
    qt.target_loss(z, x.labels[last], target, reduction="sum").loss.backward()
    right = z.grad.float() @ w.float()
    error = relative_error(d_hidden[last], right)
    send({"row": {"what": f"{shape}, the last rows", "error": error}})
    if not error <= HALF_ERROR:
        send({"fail": f"{shape}: dH of the last rows is off by {error:.3g}; {HALF_ERROR:g} is allowed"})
    halves = torch.zeros_like(d_weight, dtype=torch.float32)
    for half in (slice(0, shape.tokens // 2), slice(shape.tokens // 2, shape.tokens)):
        x.clear()
        part = x.hidden.detach()[half]
        qt.linear_target_loss(
            part, x.weight, x.labels[half], target, backend=settings.backend, reduction="sum"
        ).loss.backward()
        halves += x.weight.grad
    error = relative_error(d_weight.float(), halves)
    if not error <= HALF_ERROR:
        send({"fail": f"{shape}: dW differs from that of two halves by {error:.3g}; {HALF_ERROR:g} is allowed"})


def _tell(what: str, got: tuple[Tensor, ...], truth: tuple[Tensor, ...], allowed: float, send: Callable) -> None:
    for name, mine, right in zip(("d_hidden", "d_weight"), got, truth, strict=True):
        error = relative_error(mine, right)
        send({"row": {"what": f"{what}, {name}", "error": error}})
        if not error <= allowed:
            send({"fail": f"{what}: {name} is off by {error:.3g}; {allowed:g} is allowed"})


CHECKS = {
    "three targets in a batch": several_targets,
    "a vocabulary of 262144": large_vocabulary,
    "other tiles": other_tiles,
    "more than 2^31 logits": many_logits,
}
