"""What the tests of the engine share: batches with hard tokens, the engine and the oracle side by side."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import published
import qtarget as qt
from published import CASES, Case

N, V, D = 29, 67, 12
# Hidden axis 0 is felt by two tokens only: it pushes one up and the other down, so that a row's label can be
# near certain or hopeless while everything else about the row is ordinary.
PUSHED_UP, PUSHED_DOWN = 3, 5


def case_named(name: str) -> Case:
    (case,) = [case for case in CASES if case.id == name]
    return case


# What float64 itself rounds away beside logits of some hundreds; processors differ in the last bit.
FLOOR = 2e-12


def floor_of(case: Case) -> float:
    """What the oracle rounds away: a score may be hundreds of nats, and some labels weigh several times."""
    return 1e-11 if "divergence" in case.id or case.preset in ("poly", "symmetric-ce", "todi") else FLOOR


def preset_of(case: Case) -> qt.Target:
    return qt.preset(case.preset, **case.hyperparameters)


def randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def project_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float = 1.0, softcap: float | None = None
):
    """The full logits of a head."""
    z = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    z = scale * z
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def as_head(logits: Tensor, **options) -> qt.Head:
    """Logits given outright: a head of unit vectors hands them on exactly."""
    return qt.Head(logits, torch.eye(logits.shape[-1], dtype=logits.dtype), **options)


@dataclass
class Batch:
    """A call of the engine. ``dense`` holds what the oracle gets for the teacher and the reference."""

    hidden: Tensor  # [n, d]; with input_ids, what is added to the embeddings
    weight: Tensor
    labels: Tensor
    bias: Tensor | None = None
    columns: dict[str, Tensor] = field(default_factory=dict)
    dense: dict[str, Tensor] = field(default_factory=dict)
    heads: dict[str, qt.Head | qt.TopK] | None = None  # by default the dense logits as heads
    scale: float = 1.0
    softcap: float | None = None
    vocab_size: int | None = None
    input_ids: Tensor | None = None  # tied head: hidden states start from the head's own rows

    def logits(self) -> Tensor:
        return project_logits(self.states(self.hidden, self.weight), self.weight, self.bias, self.scale, self.softcap)

    def states(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return hidden if self.input_ids is None else hidden + weight[self.input_ids]

    def to(self, dtype: torch.dtype) -> Batch:
        """The same numbers, rounded to ``dtype``. Heads are rebuilt from the dense logits."""
        assert self.heads is None
        return replace(
            self,
            hidden=self.hidden.to(dtype),
            weight=self.weight.to(dtype),
            bias=None if self.bias is None else self.bias.to(dtype),
            columns={name: _cast(column, dtype) for name, column in self.columns.items()},
            dense={name: logits.to(dtype) for name, logits in self.dense.items()},
        )

    def engine_inputs(self, target: qt.Target) -> dict[str, Any]:
        heads = self.heads or {name: as_head(logits) for name, logits in self.dense.items()}
        others = {name: heads[name] for name in heads if name in target.requires}
        options = {"logit_scale": self.scale, "logit_softcap": self.softcap, "vocab_size": self.vocab_size}
        return {**others, **self._columns(target), **options}

    def oracle_inputs(self, target: qt.Target) -> dict[str, Any]:
        others = {f"{name}_logits": z for name, z in self.dense.items() if name in target.requires}
        return {**others, **self._columns(target), "vocab_size": self.vocab_size}

    def _columns(self, target: qt.Target) -> dict[str, Tensor]:
        names = {"old_policy": "old_logps", "weight": "weight", "critical": "critical"}
        return {names[need]: self.columns[names[need]] for need in target.requires if need in names}


def _cast(column: Tensor, dtype: torch.dtype) -> Tensor:
    return column.to(dtype) if column.is_floating_point() else column


@dataclass
class Outcome:
    """Loss, per-token statistics, and the gradients of hidden, weight and bias (None where there is none)."""

    loss: Tensor
    stats: dict[str, Tensor]
    gradients: dict[str, Tensor | None]


def run_and_backward(batch: Batch, call, upstream: Tensor | float = 1.0) -> Outcome:
    """Run ``call(hidden, weight, bias)`` on fresh leaves and backward through its loss."""
    leaves = {"hidden": batch.hidden, "weight": batch.weight, "bias": batch.bias}
    leaves = {name: None if leaf is None else leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    out = call(batch.states(leaves["hidden"], leaves["weight"]), leaves["weight"], leaves["bias"])
    (out.loss * upstream).sum().backward()
    gradients = {name: None if leaf is None else leaf.grad for name, leaf in leaves.items()}
    return Outcome(out.loss.detach(), out.stats, gradients)


def run_oracle(batch: Batch, target: qt.Target, upstream: Tensor | float = 1.0, **options) -> Outcome:
    def call(hidden, weight, bias):
        logits = project_logits(hidden, weight, bias, batch.scale, batch.softcap)
        return qt.target_loss(logits, batch.labels, target, **batch.oracle_inputs(target), **options)

    return run_and_backward(batch, call, upstream)


def run_engine(batch: Batch, target: qt.Target, upstream: Tensor | float = 1.0, **options) -> Outcome:
    def call(hidden, weight, bias):
        inputs = batch.engine_inputs(target)
        return qt.linear_target_loss(hidden, weight, batch.labels, target, head_bias=bias, **inputs, **options)

    return run_and_backward(batch, call, upstream)


def assert_rows_agree(got: Tensor, expected: Tensor, what: str, rtol: float, floor: float) -> None:
    """Each row on its own scale; ``floor`` is what the oracle itself rounds away. NaN agrees with NaN."""
    assert got.shape == expected.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    missing = expected.isnan()
    assert torch.equal(got.isnan(), missing), f"{what} is NaN in other places"
    got, expected = (x.masked_fill(missing, 0).double().unsqueeze(-1).flatten(1) for x in (got, expected))
    error = (got - expected).abs().amax(-1)
    allowed = rtol * expected.abs().amax(-1) + floor
    wrong = (error > allowed).nonzero().flatten().tolist()
    lines = [f"row {i}: error {error[i]:.3e}, allowed {allowed[i]:.3e}" for i in wrong[:10]]
    assert not wrong, f"{what} differs\n" + "\n".join(lines)


def assert_same(got: Outcome, expected: Outcome, rtol: float = 1e-10, floor: float = FLOOR) -> None:
    """Gradients first, then the loss, then every statistic with its NaN pattern."""
    for name, gradient in expected.gradients.items():
        mine = got.gradients[name]
        assert (mine is None) == (gradient is None), f"d_{name}: one has a gradient and the other has none"
        if gradient is not None:
            assert_rows_agree(mine, gradient, f"d_{name}", rtol, floor)
    assert_rows_agree(got.loss.reshape(-1), expected.loss.reshape(-1), "loss", rtol, floor)
    assert list(got.stats) == list(expected.stats), f"statistics {list(got.stats)}, expected {list(expected.stats)}"
    for name, statistic in expected.stats.items():
        assert_rows_agree(got.stats[name].reshape(-1), statistic.reshape(-1), name, rtol, floor)


def assert_engine_is_oracle(batch: Batch, target: qt.Target, rtol: float = 1e-10, floor: float = FLOOR, **options):
    assert_same(
        run_engine(batch, target, stats="all", reduction="sum", **options),
        run_oracle(batch, target, stats="all", reduction="sum"),
        rtol,
        floor,
    )


def relative_error(got: Tensor, truth: Tensor) -> float:
    """In the Frobenius norm."""
    return float((got.double() - truth).norm() / truth.norm().clamp(min=1e-300))


# ---- batches


def with_columns(batch: Batch, seed: int = 3) -> Batch:
    """Weights, a mask, and old log-probabilities with ratios on all sides of every clip in CASES."""
    g = torch.Generator().manual_seed(seed)
    n = len(batch.labels)
    log_ratio = torch.tensor([0.0, 0.1, -0.1, 0.23, -0.4, 0.6, -3.0, 3.0], dtype=torch.float64)
    log_ratio = log_ratio.repeat(math.ceil(n / 8))[:n] + 0.001 * torch.rand(n, dtype=torch.float64, generator=g)
    weight = torch.tensor([1, 0, 0.3, 16, 1, 2.5, 0.7, 0.01], dtype=torch.float64).repeat(math.ceil(n / 8))[:n]
    y = batch.labels.clamp(min=0)
    columns = {
        "old_logps": published.label_log_p(batch.logits(), y) - log_ratio,
        "weight": weight,
        "critical": torch.arange(n) % 3 != 1,
    }
    return replace(batch, columns=columns)


def ordinary_batch(n: int = N, v: int = V, d: int = D, seed: int = 0, **options) -> Batch:
    """Tokens with logits of a few nats, a teacher and a reference that differ as much."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight = randn(g, n, d), randn(g, v, d) * (2.0 / math.sqrt(d))
    labels = torch.randint(0, options.get("vocab_size") or v, (n,), generator=g)
    bias = 0.5 * randn(g, v) if options.pop("with_bias", False) else None
    batch = Batch(hidden, weight, labels, bias, **options)
    batch.dense = {"teacher": 1.5 * randn(g, n, v), "reference": 1.5 * randn(g, n, v)}
    return with_columns(batch)


def hard_batch(tied: bool = False, with_bias: bool = False, **options) -> Batch:
    """Tokens of every temper: certain and hopeless labels; a teacher equal, nearly equal, far away."""
    g = torch.Generator().manual_seed(1)
    hidden, weight = randn(g, N, D), 0.6 * randn(g, V, D)
    labels = torch.randint(6, V - 6, (N,), generator=g)
    weight[:, 0] = 0
    weight[PUSHED_UP, 0], weight[PUSHED_DOWN, 0] = 1, -1
    hidden[:, 0] = 0
    hidden[0, 0], labels[0] = 50, PUSHED_UP  # p_y = 1 as far as float64 can tell
    hidden[1, 0], labels[1] = 8, PUSHED_UP
    hidden[2, 0], labels[2] = 25, PUSHED_DOWN  # hopeless, and another token is sure
    hidden[3, 0], labels[3] = -45, PUSHED_UP  # hopeless by 90
    bias = 0.5 * randn(g, V) if with_bias else None
    input_ids = torch.randint(6, V, (N,), generator=g) if tied else None
    batch = Batch(hidden, weight, labels, bias, input_ids=input_ids, **options)
    student = batch.logits()
    for name in ("teacher", "reference"):
        other = 1.5 * randn(g, N, V)
        other[4] = student[4] + 1e-7 * randn(g, V)
        other[5] = student[5]
        other[6, (labels[6] + 2) % V] += 120
        other[7] += 40 * randn(g, V)
        other[2, labels[2]] += 120  # sure of the label that the student rules out
        other[0] = student[0]
        batch.dense[name] = other
    return with_columns(batch)


def with_ignored_labels(batch: Batch, share: str) -> Batch:
    """Some or all labels ignored, the columns and hidden states there full of rubbish."""
    if share == "none ignored":
        return batch
    ignored = torch.arange(len(batch.labels)) % 3 == 2
    ignored[2] = False  # keep the hopeless label
    if share == "all ignored":
        ignored[:] = True
    columns = {name: column.clone() for name, column in batch.columns.items()}
    columns["weight"][ignored] = -1.0
    columns["old_logps"][ignored] = math.nan
    return replace(batch, labels=batch.labels.masked_fill(ignored, -100), columns=columns)
