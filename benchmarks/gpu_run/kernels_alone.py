"""The two kernels by themselves: bytes a second over those of a copy, for the tiles as they are and for others.

What is timed are the engine's own launches, recorded in a call and launched again.
"""

from __future__ import annotations

import statistics

import torch

from gpu_run.clock import milliseconds
from gpu_run.environment import copy_rate
from gpu_run.launches import KERNELS, Call, Launch, as_on_a_device, launches
from gpu_run.record import Talk

ROWS, WIDTH, VOCAB, SMOKE_VOCAB = 1024, 64, 151936, 300
LEAST_OF_COPY = 0.80
BLOCKS, WARPS = (1024, 2048, 4096), (4, 8, 16)
CALLS = (
    Call("student", (("dft", {}),)),
    Call("eaft", (("eaft", {}),)),
    Call("gem", (("gem", {}),)),
    Call("teacher", (("target-sft", {}),), "head"),
    Call("teacher, padded", (("target-sft", {}),), "head", real=VOCAB - 271),
    Call("kd T=2", (("kd", {"temperature": 2.0}),), "head"),
    Call("top-k", (("target-sft", {}),), "top-k"),
)
# Of these other tiles are tried.
TRIED = ("student", "teacher")


def recorded(call: Call, device: torch.device, smoke: bool) -> list[Launch]:
    """The passes of a call over one chunk, both of which have run once."""
    vocab = SMOKE_VOCAB if smoke else VOCAB
    call = Call(
        call.label,
        call.targets,
        call.source,
        call.dtype,
        vocab,
        None if call.real is None else call.real - VOCAB + vocab,
    )
    if device.type == "cuda":
        return launches(call, ROWS, WIDTH, device, execute=True)
    with as_on_a_device():  # in the interpreter
        return launches(call, 4, WIDTH, device, execute=True)


def run(talk: Talk) -> None:
    """Each call's passes; then other tiles for the student's and the teacher's."""
    settings = talk.settings
    device, smoke = settings.device, settings.smoke
    copy = copy_rate(device, 1 << 14 if smoke else 1 << 29)
    talk.row("copy", tb_per_s=copy)
    if settings.backend != "triton":
        talk.note("no kernel can run here; in the interpreter, with TRITON_INTERPRET=1, they do")
        return
    tried: dict[str, list[Launch]] = {}
    for call in CALLS:
        found = recorded(call, device, smoke)
        if call.label in TRIED:
            tried[call.label] = found
        for launch in found:
            rate = _rate(launch, device)
            name = f"{launch.kernel}, {call.label}"
            talk.row(name, tb_per_s=rate, of_copy=rate / copy)
            if not smoke:
                talk.limit(f"{name}: share of a copy's bytes a second", rate / copy, least=LEAST_OF_COPY)
    if device.type == "cuda":
        _as_run(talk)
    _other_tiles(talk, tried, copy)


def _rate(launch: Launch, device: torch.device, **options: int) -> float:
    """TB/s."""
    milliseconds(lambda: launch.run(**options), device, 2, 1)
    taken = [milliseconds(lambda: launch.run(**options), device, 0, 4) for _ in range(5)]
    return launch.bytes / statistics.median(taken) / 1e9


def _other_tiles(talk: Talk, tried: dict[str, list[Launch]], copy: float) -> None:
    device = talk.settings.device
    blocks, warps = ((128,), (4,)) if talk.settings.smoke else (BLOCKS, WARPS)
    for label, found in tried.items():
        for block in blocks:
            for count in warps:
                if talk.left < 3:
                    talk.note(f"no time was left for tiles of {block}, {count} warps, {label}")
                    continue
                shares = {
                    f"{launch.kernel}_of_copy": _rate(launch, device, BLOCK=block, num_warps=count) / copy
                    for launch in found
                }
                talk.row(f"tiles of {block}, {count} warps, {label}", **shares)


def _as_run(talk: Talk) -> None:
    """Registers and spills of the kernels that this process has launched, where this Triton tells them."""
    from qtarget.losses.engine.device import kernels

    for name in KERNELS:
        try:
            caches = getattr(kernels, f"_{name}").device_caches
            (cache, *_) = next(iter(caches.values()))
            launched = [(one.n_regs, one.n_spills) for one in cache.values()]
        except Exception as error:  # other versions keep them elsewhere
            talk.note(f"registers as run are not told: {type(error).__name__}: {error}")
            return
        talk.row(f"{name} as run", registers=[one[0] for one in launched], spills=[one[1] for one in launched])
        if any(spills for _, spills in launched):
            talk.fail(f"{name} spills registers as run: {launched}")
