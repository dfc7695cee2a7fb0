"""How a call is best cut: rows of logits, rows of g, and dW in one product or added up chunk by chunk."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator

import torch

from gpu_run.clock import free, milliseconds, peak_bytes
from gpu_run.inputs import Inputs, Shape, timed
from gpu_run.methods import bare_matmuls, qtarget_loss
from gpu_run.record import Talk
from qtarget.losses.engine import chunks
from qtarget.losses.engine.sizes import Sizes

SHAPE, SMOKE_SHAPE = Shape(8192, 2048, 151936), Shape(24, 16, 97)
LOGITS = (512, 1024, 2048, 4096)
GRADIENT = (2048, 4096, 8192)
TARGETS = ("dft", "target-sft")


def run(talk: Talk) -> None:
    """The default cut, then each other one; R is the time over the bare matmuls just before."""
    settings = talk.settings
    device = settings.device
    shape = SMOKE_SHAPE if settings.smoke else SHAPE
    x = Inputs(shape, device, torch.float32 if settings.smoke else torch.bfloat16)
    n = shape.tokens
    logits, gradient = ((4, 8), (8, n)) if settings.smoke else (LOGITS, GRADIENT)
    cuts: list[Sizes | None] = [None]
    cuts += [Sizes(z, g, z, whole) for g in gradient for whole in ({g == n, False}) for z in logits if z <= g]
    for cut in cuts:
        for name in TARGETS:
            if talk.left < 2:
                talk.note(f"no time was left for {_name(cut)}")
                break
            one = timed(name)

            def step(one=one) -> None:
                qtarget_loss(x, one, settings.backend).backward()
                x.clear()

            try:
                with _cut_by(cut):
                    peak = peak_bytes(step, device)
                    ratios = [_ratio(step, x, one.matmuls == 4) for _ in range(3)]
            except torch.OutOfMemoryError:
                talk.note(f"{name}, {_name(cut)}: out of memory")
                free(device)
                continue
            talk.row(f"{name}, {_name(cut)}", R=statistics.median(ratios), peak_gb=peak / 1e9)


def _ratio(step, x: Inputs, teacher: bool) -> float:
    bare = milliseconds(lambda: bare_matmuls(x, teacher, 4096), x.device)
    return milliseconds(step, x.device) / bare


def _name(cut: Sizes | None) -> str:
    if cut is None:
        return "as the engine cuts"
    return f"{cut.logits} rows of logits, {cut.gradient} of g, dW {'in one product' if cut.whole else 'added up'}"


@contextlib.contextmanager
def _cut_by(cut: Sizes | None) -> Iterator[None]:
    """The engine with this cut in place of its own."""
    own = chunks.device_sizes, chunks.chunk_rows
    if cut is not None:
        chunks.device_sizes = lambda *_, **__: cut
        chunks.chunk_rows = lambda *_, **__: cut.logits  # where g is written over the logits
    try:
        yield
    finally:
        chunks.device_sizes, chunks.chunk_rows = own
