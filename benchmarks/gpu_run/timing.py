"""Time of every method over that of the matmuls none can do without, all in one process, in turn; and peak memory.

R is a method's time over the bare matmuls of the same round, the median of the rounds; the bare ones are the fastest of
three ways to cut them.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch

from gpu_run.clock import free, milliseconds, peak_bytes
from gpu_run.inputs import TIMED, Inputs, Shape
from gpu_run.methods import Loss, Method, all_methods, bare_matmuls, under_autocast
from gpu_run.record import Talk

ROUNDS = 7
LAYOUTS = (1024, 4096, 1 << 30)
# Methods whose gradient is further than this from qtarget's compute something else: bf16 logits alone give some 1e-2.
FAR = 0.25


@dataclass(frozen=True)
class Stage:
    """A shape, whether inductor's methods take part, and the limits of R for a target without and with a teacher."""

    shape: Shape
    compiled: bool = False
    student: float | None = None
    teacher: float | None = None
    rounds: int = ROUNDS


STAGES = (
    Stage(Shape(8192, 2048, 151936), student=1.35, teacher=1.40),
    Stage(Shape(8192, 4096, 128256), student=1.25, teacher=1.30),
    Stage(Shape(8192, 2048, 151936), compiled=True),
    Stage(Shape(8192, 896, 151936)),
    Stage(Shape(1024, 2048, 151936)),
    Stage(Shape(32768, 2048, 151936), rounds=3),
)
SMOKE = (Stage(Shape(24, 16, 97), compiled=False, rounds=2),)


def run(talk: Talk) -> None:
    """Every stage while time is left."""
    settings = talk.settings
    stages = SMOKE if settings.smoke else STAGES
    for at, stage in enumerate(stages):
        if talk.left < 8:
            talk.note(f"no time was left for {', '.join(str(later.shape) for later in stages[at:])}")
            return
        try:
            _Stage(talk, stage).run()
        except torch.OutOfMemoryError:
            talk.note(f"{stage.shape}: out of memory")
        free(settings.device)


class _Stage:
    """One shape: warm-up and memory of each method, then the rounds."""

    def __init__(self, talk: Talk, stage: Stage):
        self.talk, self.stage, self.device = talk, stage, talk.settings.device
        dtype = torch.float32 if talk.settings.smoke else torch.bfloat16
        self.x = Inputs(stage.shape, self.device, dtype)
        self.losses: dict[str, Loss] = {}
        self.methods: dict[str, Method] = {}
        self.peak: dict[str, float] = {}
        self.differs: dict[str, float] = {}
        self._truth: dict[str, torch.Tensor] = {}

    def run(self) -> None:
        own = self.talk.settings.backend
        judged = f"qtarget {own}"
        methods = [m for m in all_methods(own) if self._takes_part(m, judged)]
        # A peer's compile must not eat the time of the rounds.
        share = 0.6 * self.talk.left
        for method in methods:
            if self.talk.left < share * 0.4:
                self.talk.note(f"{self.stage.shape}: no time was left to warm up {method.key}")
                continue
            self._prepare(method)
        if not self.stage.compiled:
            self._autocast(own)
        taken = self._rounds()
        for key, ratios in taken.items():
            self._tell(key, ratios, judged)

    def _takes_part(self, method: Method, judged: str) -> bool:
        if self.stage.compiled:  # beside them the one that is judged
            return method.compiles or (method.name == judged and method.target.name in ("dft", "target-sft"))
        return not method.compiles

    def _step(self, loss: Loss) -> None:
        loss(self.x).backward()

    def _prepare(self, method: Method) -> None:
        """Warm up, compare the gradient, measure memory; what fails is reported and left out."""
        x = self.x
        try:
            loss = method.make()
            self._step(loss)
            self._compare(method)
            x.clear()
            kept = x.hidden.numel() * x.hidden.element_size() + x.weight.numel() * x.weight.element_size()
            self.peak[method.key] = max(0.0, peak_bytes(lambda: self._step(loss), self.device) - kept) / 1e9
            self.losses[method.key], self.methods[method.key] = loss, method
        except torch.OutOfMemoryError:
            self.talk.note(f"{self.stage.shape}: {method.key}: out of memory")
            free(self.device)
        except Exception as error:
            first = (str(error).splitlines() or [""])[0][:200]
            self.talk.note(f"{self.stage.shape}: {method.key}: not available: {type(error).__name__}: {first}")
            if method.name == f"qtarget {self.talk.settings.backend}":
                self.talk.fail(f"{method.key} raised {type(error).__name__}: {first}")
        finally:
            x.clear()

    def _compare(self, method: Method) -> None:
        """How far dH is from that of the first method of its target, which is qtarget's own."""
        got = self.x.hidden.grad.float()
        truth = self._truth.setdefault(method.target.name, got)
        far = float((got - truth).norm() / truth.norm().clamp(min=1e-30))
        self.differs[method.key] = far
        if method.exact and not far <= FAR:
            self.talk.fail(f"{self.stage.shape}: dH of {method.key} differs from qtarget's by {far:.3g} of its size")

    def _autocast(self, own: str) -> None:
        """What a trainer does by default: a float32 head in mixed precision."""
        if self.talk.settings.smoke:
            return
        x = self.x
        wide = Inputs.__new__(Inputs)
        wide.__dict__ |= x.__dict__
        wide.weight = x.weight.detach().float().requires_grad_()
        for one in TIMED:
            if one.name in ("dft", "target-sft"):
                method = Method(f"qtarget {own}, float32 head under autocast", one, lambda: None, exact=False)

                def loss(_: Inputs, one=one) -> torch.Tensor:
                    wide.hidden.grad = wide.weight.grad = None
                    return under_autocast(wide, one, own)

                try:
                    loss(x).backward()
                except Exception as error:
                    first = (str(error).splitlines() or [""])[0][:200]
                    self.talk.note(f"{self.stage.shape}: {method.key}: {type(error).__name__}: {first}")
                    continue
                self.losses[method.key], self.methods[method.key] = loss, method

    def _rounds(self) -> dict[str, dict]:
        x, device = self.x, self.device
        taken: dict[str, list[float]] = {key: [] for key in self.losses}
        ratios: dict[str, list[float]] = {key: [] for key in self.losses}
        bare: dict[bool, list[float]] = {False: [], True: []}
        layouts = sorted({min(rows, self.stage.shape.tokens) for rows in LAYOUTS})
        for rows in layouts:
            bare_matmuls(x, True, rows)
        keys = list(self.losses)
        for turn in range(self.stage.rounds):
            if self.talk.left < 3 and turn:
                self.talk.note(f"{self.stage.shape}: {turn} rounds instead of {self.stage.rounds}: time was up")
                break
            now = {}
            for teacher in (False, True):
                of_layouts = [milliseconds(lambda t=teacher, r=rows: bare_matmuls(x, t, r), device) for rows in layouts]
                now[teacher] = min(of_layouts)
                bare[teacher].append(now[teacher])
            begin = turn % max(1, len(keys))  # nobody always runs after the same neighbour
            for key in keys[begin:] + keys[:begin]:
                taken[key].append(milliseconds(lambda k=key: self._step(self.losses[k]), device))
                x.clear()
                ratios[key].append(taken[key][-1] / now[self.methods[key].target.matmuls == 4])
        for teacher, name in ((False, "three bare matmuls"), (True, "four bare matmuls")):
            took = statistics.median(bare[teacher])
            flop = 2.0 * x.shape.tokens * x.shape.width * x.shape.vocab * (4 if teacher else 3)
            self.talk.row(f"{x.shape} {name}", R=1.0, ms=took, tflop_per_s=flop / took / 1e9)
        return {key: {"ms": statistics.median(taken[key]), "ratios": ratios[key]} for key in keys}

    def _tell(self, key: str, found: dict, judged: str) -> None:
        ratio = statistics.median(found["ratios"])
        spread = max(found["ratios"]) - min(found["ratios"])
        self.talk.row(
            f"{self.stage.shape} {key}",
            R=ratio,
            ms=found["ms"],
            spread=spread,
            peak_gb=self.peak.get(key),
            differs=self.differs.get(key),
        )
        method = self.methods[key]
        if method.name == judged and not self.talk.settings.smoke:
            most = self.stage.teacher if method.target.source else self.stage.student
            if most is not None:
                self.talk.limit(f"{self.stage.shape} {key}: R", ratio, most=most)
