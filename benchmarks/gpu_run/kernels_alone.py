"""The two kernels by themselves: bytes a second over those of a copy, for the tiles as they are and for others."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from gpu_run.clock import milliseconds
from gpu_run.environment import copy_rate
from gpu_run.record import Talk
from qtarget.losses.engine import buffers, row_functions
from qtarget.losses.engine.row_functions import Pass
from qtarget.losses.engine.row_plan import GIVEN

ROWS, VOCAB = 1024, 151936
LEAST_OF_COPY = 0.80
BLOCKS, WARPS = (1024, 2048, 4096), (4, 8, 16)
# Bytes of a logit that each pass moves: float32 logits of one model or two, and g in 16 bits.
COUNTED = {
    "sums": {"student": 4, "eaft": 4, "gem": 4, "teacher": 8, "kd T=2": 8, "top-k": 4},
    "gradient": {"student": 6, "eaft": 6, "gem": 6, "teacher": 10, "kd T=2": 10, "top-k": 6},
}


def forms(width: int) -> dict[str, tuple[Pass, Pass]]:
    """(first pass, second pass) of each form of a target."""
    student = Pass(width)
    gem = Pass(width, c_z=1 / 0.7, pooled=True)
    teacher = Pass(width, c_z=0.5, c_o=0.5, pooled=True, other=True)
    tempered = Pass(width, c_z=0.0, c_o=0.5, c_b=0.5, pooled=True, other=True, pair=True)
    return {
        "student": (student, student),
        "eaft": (Pass(width, groups=True), student),
        "gem": (gem, gem),
        "teacher": (teacher, teacher),
        "kd T=2": (tempered, tempered),
        "top-k": (student, Pass(width, one_shift=True)),
    }


class Block:
    """Logits, labels and what the second pass is given for some rows, as the engine has them."""

    def __init__(self, rows: int, width: int, device: torch.device):
        half = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.z = buffers.padded_rows(rows, width, torch.float32, device).normal_(0, 3)
        self.o = buffers.padded_rows(rows, width, torch.float32, device).copy_(self.z).add_(0.3)
        self.g = buffers.padded_rows(rows, width, half, device)
        self.y = torch.randint(0, width, (rows,), device=device)
        self.given = torch.zeros(len(GIVEN), rows, device=device)
        normaliser = self.z.logsumexp(1)
        numbers = {"log_s": normaliser, "log_s_u": normaliser, "log_s_b": normaliser, "a": 0.5, "b": 0.5, "factor": 1.0}
        for name, number in numbers.items():
            self.given[GIVEN.index(name)] = number

    def passes(self, first: Pass, second: Pass) -> dict[str, Callable[[], object]]:
        """The two passes as calls."""
        if self.z.device.type != "cuda":
            c = [torch.tensor(case.coefficients) for case in (first, second)]
            return {
                "sums": lambda: row_functions.sums(self.z, self.o, self.y, c[0], first.support, first.flags),
                "gradient": lambda: row_functions.gradient(
                    self.z, self.o, self.y, self.given, c[1], second.support, second.flags, False, False, self.g, True
                ),
            }
        from qtarget.losses.engine import kernels

        return {
            "sums": lambda: kernels.sums(self.z, self._other(first), self.y, first),
            "gradient": lambda: kernels.gradient(self.z, self._other(second), self.y, self.given, second, self.g, None),
        }

    def _other(self, case: Pass) -> Tensor:
        return self.o if case.other else self.z


def run(talk: Talk) -> None:
    """Each form's passes; then other tiles for the student's and the teacher's."""
    device, smoke = talk.settings.device, talk.settings.smoke
    rows, width = (4, 300) if smoke else (ROWS, VOCAB)
    copy = copy_rate(device, 1 << 14 if smoke else 1 << 29)
    talk.row("copy", tb_per_s=copy)
    block = Block(rows, width, device)
    for name, cases in forms(width).items():
        for which, call in block.passes(*cases).items():
            rate = _rate(call, rows * width * COUNTED[which][name], device)
            talk.row(f"{which}, {name}", tb_per_s=rate, of_copy=rate / copy)
            if not smoke:
                talk.limit(f"{which}, {name}: share of a copy's bytes a second", rate / copy, least=LEAST_OF_COPY)
    if device.type == "cuda":
        _as_run(talk)
        _other_tiles(talk, block, copy)


def _rate(call: Callable[[], object], bytes_: int, device: torch.device) -> float:
    """TB/s."""
    milliseconds(call, device, 2, 1)
    return bytes_ / statistics.median(milliseconds(call, device, 0, 4) for _ in range(5)) / 1e9


def _other_tiles(talk: Talk, block: Block, copy: float) -> None:
    from qtarget.losses.engine import kernels

    rows, width = block.z.shape
    before = kernels.BLOCK, kernels.WARPS
    try:
        for name in ("student", "teacher"):
            for kernels.BLOCK in BLOCKS:
                for kernels.WARPS in WARPS:
                    if talk.left < 3:
                        talk.note(f"no time was left for tiles of {kernels.BLOCK}, {kernels.WARPS} warps, {name}")
                        continue
                    shares = {}
                    for which, call in block.passes(*forms(width)[name]).items():
                        rate = _rate(call, rows * width * COUNTED[which][name], block.z.device)
                        shares[f"{which}_of_copy"] = rate / copy
                    talk.row(f"tiles of {kernels.BLOCK}, {kernels.WARPS} warps, {name}", **shares)
    finally:
        kernels.BLOCK, kernels.WARPS = before


def _as_run(talk: Talk) -> None:
    """Registers and spills of the kernels that this process has launched, where this Triton tells them."""
    from qtarget.losses.engine import kernels

    for name in ("_sums", "_gradient"):
        try:
            caches = getattr(kernels, name).device_caches
            (cache, *_) = next(iter(caches.values()))
            launched = [(one.n_regs, one.n_spills) for one in cache.values()]
        except Exception as error:  # other versions keep them elsewhere
            talk.note(f"registers as run are not told: {type(error).__name__}: {error}")
            return
        talk.row(f"{name} as run", registers=[one[0] for one in launched], spills=[one[1] for one in launched])
        if any(spills for _, spills in launched):
            talk.fail(f"{name} spills registers as run: {launched}")
