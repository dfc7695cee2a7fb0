"""One call of the engine judged against the oracle in float64 on the same device, from the same rounded inputs.

Allowed in float32: 1e-5 of dH, dW and the bias's gradient in the Frobenius norm. Where the head is multiplied in 16 bits:
1.2 times the error of a loss written by hand that has float32 logits and rounds its gradient g, dH and dW as any training
in 16 bits does. A second call must give every bit again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import qtarget as qt
from published import CASES, Case
from qtarget.losses.engine import matmuls
from qtarget.losses.output import LossOutput

FLOAT32_ERROR = 1e-5
TIMES_BY_HAND = 1.2
# Of per-token statistics and the loss, which come from float32 logits whatever the head's dtype.
STATISTICS_ERROR = 1e-4
NOT_SMOOTH = ("accuracy", "off_simplex_fraction")  # a tie, or an entry at zero, may fall on either side

FORMS = (
    "plain",
    "softcap and bias",
    "padded",
    "half ignored",
    "top-k, student's tail",
    "top-k, even tail",
    "skipped rows",
)
DTYPES = ("float32", "bfloat16", "float32 under autocast", "float16")
KEPT = 20


@dataclass(frozen=True)
class Job:
    """A published case in one form and dtype. ``chunks``: in chunks of a third of the rows, or as the engine cuts."""

    case: Case
    form: str
    dtype: str
    seed: int
    chunks: bool = False

    @property
    def name(self) -> str:
        return f"{self.case.id}, {self.form}, {self.dtype}"

    @property
    def target(self) -> qt.Target:
        return qt.preset(self.case.preset, **self.case.hyperparameters)


def jobs(seed: int, smoke: bool) -> list[Job]:
    """All that is to be judged, the defaults of each preset first; an abridged list for a smoke run."""
    found = []
    defaults = [case for case in CASES if ":" not in case.id]
    others = [case for case in CASES if ":" in case.id]
    for cases in (defaults, others):
        for form in FORMS:
            for case in cases:
                if not _fits(case, form):
                    continue
                for dtype in DTYPES:
                    found.append(Job(case, form, dtype, seed + len(found), chunks=len(found) % 2 == 1))
    if smoke:
        names = ("dft", "eaft", "gem", "kd:temperature=2.0", "target-sft", "cft")
        found = [job for job in found if job.case.id in names and job.dtype in DTYPES[:2]]
    return found


def _fits(case: Case, form: str) -> bool:
    if form.startswith("top-k"):
        return any(name.endswith("_logits") for name in case.needs)
    if form == "skipped rows":
        return qt.preset(case.preset, **case.hyperparameters).may_skip_tokens
    return True


@dataclass
class Batch:
    """The inputs of one job: leaves as a user has them, and what the engine rounds them to.

    Attributes:
        compute: what the head is multiplied in. others: teacher and reference as heads or top-k.
        dense: their logits [n, V] in float64 for the oracle; a top-k distribution written out.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    compute: torch.dtype
    autocast: bool
    columns: dict[str, Tensor] = field(default_factory=dict)
    others: dict[str, qt.Head | qt.TopK] = field(default_factory=dict)
    dense: dict[str, Tensor] = field(default_factory=dict)
    softcap: float | None = None
    vocab_size: int | None = None

    def rounded(self, x: Tensor) -> Tensor:
        return x.to(self.compute) if self.compute in matmuls.HALF else x

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        z = hidden @ weight.T if bias is None else hidden @ weight.T + bias
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


def make_batch(job: Job, n: int, v: int, d: int, device: torch.device) -> Batch:
    """Tokens of every temper, a near teacher and a reference further off, from the job's seed."""
    g = torch.Generator(device).manual_seed(job.seed)

    def randn(*size):
        return torch.randn(*size, device=device, generator=g)

    dtype = torch.float32 if job.dtype.startswith("float32") else getattr(torch, job.dtype)
    hidden = (randn(n, d) * (0.5 + 1.5 * torch.rand(n, 1, device=device, generator=g))).to(dtype)
    weight = (randn(v, d) * (2 * d**-0.5)).to(dtype)
    bias = (0.5 * randn(v)).to(dtype) if job.form == "softcap and bias" else None
    autocast = "autocast" in job.dtype
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        compute = matmuls.compute_dtype(hidden, weight)
    batch = Batch(hidden, weight, bias, torch.zeros(0), compute, autocast)
    batch.softcap = 20.0 if job.form == "softcap and bias" else None
    batch.vocab_size = v - v // 9 if job.form == "padded" else None
    real = batch.vocab_size or v
    z = _student(batch)
    likely = z[:, :real].argmax(-1)
    drawn = torch.randint(0, real, (n,), device=device, generator=g)
    batch.labels = torch.where(torch.rand(n, device=device, generator=g) < 0.5, likely, drawn)
    for name, away in (("teacher", 0.3), ("reference", 1.0)):
        _add_other(
            batch, name, job, (hidden + away * randn(n, d)).to(dtype), (weight + 0.02 * randn(v, d)).to(dtype), z
        )
    _add_columns(batch, z, g, skipped=job.form == "skipped rows")
    if job.form == "half ignored":
        batch.labels = batch.labels.masked_fill(torch.rand(n, device=device, generator=g) < 0.5, -100)
    return batch


def _student(batch: Batch) -> Tensor:
    """Logits [n, V] in float64 of the rounded inputs."""
    leaves = (batch.rounded(batch.hidden).double(), batch.rounded(batch.weight).double())
    return batch.logits(*leaves, None if batch.bias is None else batch.bias.double())


def _add_other(batch: Batch, name: str, job: Job, hidden: Tensor, weight: Tensor, z: Tensor) -> None:
    logits = batch.rounded(hidden).double() @ batch.rounded(weight).double().T
    if not job.form.startswith("top-k"):
        batch.others[name], batch.dense[name] = qt.Head(hidden, weight), logits
        return
    log_t = logits.log_softmax(-1)
    kept = log_t.topk(min(KEPT, log_t.shape[1] - 2))
    tail = "student" if "student" in job.form else "even"
    batch.others[name] = qt.TopK(kept.indices, kept.values.float(), tail=tail)
    # what it stands for: the rest of the mass in the student's shape, or even
    outside = torch.ones_like(log_t, dtype=torch.bool).scatter(1, kept.indices, False)
    shape = z.log_softmax(-1).masked_fill(~outside, float("-inf")).log_softmax(-1)
    if tail == "even":
        shape = -outside.sum(-1, keepdim=True).double().log().expand_as(log_t)
    values = kept.values.float().double()
    log_tail = torch.log1p(-values.exp().sum(-1, keepdim=True).clamp(max=1))
    batch.dense[name] = (log_tail + shape).scatter(1, kept.indices, values)


def _add_columns(batch: Batch, z: Tensor, g: torch.Generator, skipped: bool) -> None:
    n, device = len(batch.labels), z.device
    log_p_y = z.log_softmax(-1).gather(1, batch.labels[:, None]).squeeze(1)
    ratios = torch.tensor([0.0, 0.1, -0.1, 0.23, -0.4, 0.6, -3.0, 3.0], device=device)
    weights = torch.tensor([1, 0, 0.3, 16, 1, 2.5, 0.7, 0.01], device=device)
    keep = torch.rand(n, device=device, generator=g) < (0.2 if skipped else 0.7)
    weight = weights.repeat(n // 8 + 1)[:n]
    batch.columns = {
        "old_logps": (log_p_y - ratios.repeat(n // 8 + 1)[:n]).float(),
        "weight": weight * keep if skipped else weight,
        "critical": keep,
    }


# -- the three ways ----------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """Loss, statistics [n], and the gradients of hidden, weight and bias."""

    loss: Tensor
    stats: dict[str, Tensor]
    gradients: dict[str, Tensor | None]


def _columns(batch: Batch, target: qt.Target) -> dict[str, Tensor]:
    names = {"old_policy": "old_logps", "weight": "weight", "critical": "critical"}
    return {names[need]: batch.columns[names[need]] for need in target.requires if need in names}


def by_engine(batch: Batch, target: qt.Target, backend: str, **options: Any) -> Outcome:
    """The engine as a user calls it."""
    leaves = _leaves(batch.hidden, batch.weight, batch.bias)
    others = {name: other for name, other in batch.others.items() if name in target.requires}
    given = {**others, **_columns(batch, target), "logit_softcap": batch.softcap, "vocab_size": batch.vocab_size}
    with torch.autocast(batch.hidden.device.type, torch.bfloat16, enabled=batch.autocast):
        out = qt.linear_target_loss(
            leaves[0], leaves[1], batch.labels, target, head_bias=leaves[2], backend=backend, **given, **options
        )
    return _after(out, leaves)


def by_oracle(batch: Batch, target: qt.Target, **options: Any) -> Outcome:
    """Full logits in float64 from the inputs as they are multiplied."""
    leaves = _leaves(
        batch.rounded(batch.hidden).double(),
        batch.rounded(batch.weight).double(),
        None if batch.bias is None else batch.bias.double(),
    )
    return _after(_full(batch, target, batch.logits(*leaves), torch.float64, **options), leaves)


def by_hand(batch: Batch, target: qt.Target, scale: float) -> dict[str, Tensor | None]:
    """Gradients of a loss with float32 logits: g rounded to 16 bits before dH and dW, and both at the end.

    Many rows have much the same g at their labels, and so the same rounding error. Which one depends on what g was
    multiplied by: ``scale`` before it is rounded, undone after.
    """
    h, w = batch.rounded(batch.hidden).float(), batch.rounded(batch.weight).float()
    flat = h @ w.T if batch.bias is None else h @ w.T + batch.bias.float()
    flat = flat.requires_grad_()
    z = flat if batch.softcap is None else batch.softcap * torch.tanh(flat / batch.softcap)
    _full(batch, target, z, torch.float32).loss.backward()
    assert flat.grad is not None
    # float16 would lose what a loss scale keeps
    scale = scale * (1024.0 if batch.compute == torch.float16 else 1.0)
    g = batch.rounded(flat.grad * scale).float() / scale
    return {
        "hidden": (g @ w).to(batch.hidden.dtype),
        "weight": (g.T @ h).to(batch.weight.dtype),
        "bias": None if batch.bias is None else g.sum(0).to(batch.bias.dtype),
    }


def _full(batch: Batch, target: qt.Target, z: Tensor, dtype: torch.dtype, **options: Any) -> LossOutput:
    others = {f"{name}_logits": t.to(dtype) for name, t in batch.dense.items() if name in target.requires}
    columns = {name: x.to(dtype) if x.is_floating_point() else x for name, x in _columns(batch, target).items()}
    return qt.target_loss(z, batch.labels, target, vocab_size=batch.vocab_size, **others, **columns, **options)


def _leaves(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.detach().clone().requires_grad_() for x in tensors]


def _after(out: LossOutput, leaves: list[Tensor | None]) -> Outcome:
    out.loss.backward()
    names = ("hidden", "weight", "bias")
    gradients = {name: None if leaf is None else leaf.grad for name, leaf in zip(names, leaves, strict=True)}
    return Outcome(out.loss.detach(), out.stats, gradients)


# -- the verdict -------------------------------------------------------------------------------------------------------


@dataclass
class Verdict:
    """Errors of one job's gradients relative to the oracle, those of the loss by hand, and what is wrong."""

    job: Job
    errors: dict[str, float] = field(default_factory=dict)
    by_hand: dict[str, float] = field(default_factory=dict)
    statistics: float = 0.0
    faults: list[str] = field(default_factory=list)


def judge(job: Job, n: int, v: int, d: int, device: torch.device, backend: str) -> Verdict:
    batch = make_batch(job, n, v, d, device)
    target = job.target
    options: dict[str, Any] = {"stats": "all"}
    truth = by_oracle(batch, target, **options)
    if job.chunks:
        options["chunk_rows"] = max(1, n // 3)
    poison(device)
    got = by_engine(batch, target, backend, **options)
    poison(device)
    again = by_engine(batch, target, backend, **options)
    verdict = Verdict(job)
    scales = (1.0, float(n)) if batch.compute in matmuls.HALF else ()  # of a mean, and of a sum
    plain = [by_hand(batch, target, scale) for scale in scales]
    for name, gradient in got.gradients.items():
        if gradient is None:
            continue
        error = relative_error(gradient, truth.gradients[name])
        allowed = FLOAT32_ERROR
        if plain:
            errors = [relative_error(one[name], truth.gradients[name]) for one in plain]
            if not all(map(math.isfinite, errors)):  # float16 ends at 65504, for everybody
                continue
            verdict.by_hand[name] = max(errors)
            allowed += TIMES_BY_HAND * verdict.by_hand[name]
        elif gradient.dtype in matmuls.HALF:  # multiplied in float32 and rounded at the end, as on a CPU
            allowed += torch.finfo(gradient.dtype).eps
        verdict.errors[name] = error
        if not error <= allowed:
            verdict.faults.append(f"d_{name} is off by {error:.3g}; {allowed:.3g} is allowed")
        if not torch.equal(gradient, again.gradients[name]):
            verdict.faults.append(f"d_{name} differs between two calls with the same inputs")
    _judge_values(verdict, got, truth, again)
    return verdict


def _judge_values(verdict: Verdict, got: Outcome, truth: Outcome, again: Outcome) -> None:
    # A loss may be a sum of terms of both signs: compare it at the size of its tokens' values.
    size = 1 + float(truth.loss.abs())
    off = abs(float(got.loss) - float(truth.loss)) / size
    if not off <= STATISTICS_ERROR:
        verdict.faults.append(f"loss is off by {off:.3g}; {STATISTICS_ERROR:g} is allowed")
    if not torch.equal(got.loss, again.loss):
        verdict.faults.append("loss differs between two calls with the same inputs")
    for name, right in truth.stats.items():
        mine = got.stats[name]
        if name in NOT_SMOOTH:
            continue
        if name == "kl_q":  # NaN where Q leaves the simplex by more than the dtype's tolerance
            unknown = mine.isnan() | right.isnan()
            mine, right = mine.masked_fill(unknown, 0.0), right.masked_fill(unknown, 0.0)
        if not torch.equal(mine.isnan(), right.isnan()):
            verdict.faults.append(f"{name} is NaN in other places")
            continue
        error = float((mine.nan_to_num().double() - right.nan_to_num().double()).norm())
        error /= max(1.0, float(right.nan_to_num().double().norm()))
        verdict.statistics = max(verdict.statistics, error)
        if not error <= STATISTICS_ERROR:
            verdict.faults.append(f"{name} is off by {error:.3g}; {STATISTICS_ERROR:g} is allowed")


def relative_error(got: Tensor, truth: Tensor) -> float:
    """In the Frobenius norm; where the truth is zero, 0 or infinity."""
    size = float(truth.double().norm())
    error = float((got.double() - truth.double()).norm())
    if size == 0:
        return 0.0 if error == 0 else float("inf")
    return error / size


def poison(device: torch.device, bytes_: int = 1 << 28) -> None:
    """Leave NaN in the memory that the next buffers get, so that one that is read before it is written shows."""
    if device.type == "cuda":
        for size in (bytes_, bytes_ // 4, bytes_ // 64, 1 << 20, 1 << 19, 1 << 12):
            torch.full((size // 4,), float("nan"), device=device)
