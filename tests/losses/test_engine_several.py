"""Several targets in one pass: each token by its own, as if the others were ignored, and one dW for all."""

from dataclasses import replace

import pytest
import torch

import qtarget as qt
from engine_and_oracle import (
    N,
    Outcome,
    assert_same,
    hard_batch,
    preset_of,
    run_and_backward,
    run_engine,
    run_oracle,
    with_ignored_labels,
)
from published import CASES
from qtarget.losses.engine import chunks, who
from qtarget.losses.engine.device.passes import FunctionPasses

pytestmark = pytest.mark.usefixtures("one_thread")

MIXTURES = {
    "two students": [qt.preset("sft"), qt.preset("eaft")],
    "with and without a teacher": [qt.preset("dft"), qt.preset("target-sft"), qt.preset("sft")],
    "teacher and reference": [qt.preset("kd", temperature=2.0), qt.preset("asft"), qt.preset("gem", h="logsigmoid")],
    "columns": [qt.preset("cft"), qt.preset("iw-sft"), qt.preset("psft"), qt.preset("profit")],
    "the same twice": [qt.preset("target-sft"), qt.preset("target-sft")],
    "all presets": [qt.preset(name) for name in qt.presets.names()],
}
REDUCED = {"reduction": "sum", "stats": "all"}


def mixed(batch, targets, which, **options) -> Outcome:
    inputs = {}
    for target in targets:
        inputs |= batch.engine_inputs(target)

    def call(hidden, weight, bias):
        return qt.linear_target_loss(
            hidden, weight, batch.labels, targets, which=which, head_bias=bias, **inputs, **options
        )

    return run_and_backward(batch, call)


def one_by_one(batch, targets, which) -> Outcome:
    """The oracle of each target on its own tokens, added up."""
    parts = [
        run_oracle(replace(batch, labels=batch.labels.masked_fill(which != number, -100)), target, **REDUCED)
        for number, target in enumerate(targets)
    ]
    stats = {}
    for number, part in enumerate(parts):
        mine = (which == number) & (batch.labels != -100)
        stats = {name: torch.where(mine, value, stats.get(name, value)) for name, value in part.stats.items()}
    gradients = {
        name: None if one is None else sum(part.gradients[name] for part in parts)
        for name, one in parts[0].gradients.items()
    }
    return Outcome(sum(part.loss for part in parts), stats, gradients)


def numbers(count: int, how: str) -> torch.Tensor:
    if how == "in turn":
        return torch.arange(N) % count
    if how == "in stretches":
        return torch.arange(N) * count // N
    return torch.randint(0, count, (N,), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("chunk", [4, 10, None], ids=["chunks of 4", "of 10", "one chunk"])
@pytest.mark.parametrize("how", ["in turn", "in stretches", "at random"])
@pytest.mark.parametrize("targets", MIXTURES.values(), ids=MIXTURES)
def test_each_token_by_its_own_target(targets, how, chunk):
    batch = with_ignored_labels(hard_batch(with_bias=True, softcap=40.0), "some ignored")
    which = numbers(len(targets), how)
    got = mixed(batch, targets, which, chunk_rows=chunk, **REDUCED)
    assert_same(got, one_by_one(batch, targets, which))


@pytest.mark.parametrize("targets", MIXTURES.values(), ids=MIXTURES)
def test_in_two_passes_over_the_logits(targets, monkeypatch):
    """The pure functions, as they are compiled."""
    monkeypatch.setattr(who, "FunctionPasses", lambda: FunctionPasses(compiled=False))
    batch, which = hard_batch(), numbers(len(targets), "at random")
    got = mixed(batch, targets, which, backend="compiled", chunk_rows=10, **REDUCED)
    assert_same(got, one_by_one(batch, targets, which))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_list_of_one_is_that_one(case):
    batch, target = hard_batch(), preset_of(case)
    got = mixed(batch, [target], torch.zeros(N, dtype=torch.int64), reduction="sum")
    assert_same(got, run_engine(batch, target, reduction="sum"), rtol=1e-13, floor=1e-14)


def test_the_unreduced_loss():
    targets, which = MIXTURES["with and without a teacher"], numbers(3, "in turn")
    batch = hard_batch()
    upstream = torch.linspace(-2, 3, N, dtype=torch.float64)
    inputs = batch.engine_inputs(targets[1])

    def call(hidden, weight, bias):
        return qt.linear_target_loss(
            hidden, weight, batch.labels, targets, which=which, reduction="none", chunk_rows=10, **inputs
        )

    got = run_and_backward(batch, call, upstream)
    for name in ("hidden", "weight"):
        parts = [
            run_oracle(
                replace(batch, labels=batch.labels.masked_fill(which != i, -100)),
                t,
                upstream=upstream,
                reduction="none",
            )
            for i, t in enumerate(targets)
        ]
        truth = sum(part.gradients[name] for part in parts)
        assert torch.allclose(got.gradients[name], truth, rtol=1e-10, atol=1e-12)


def test_a_column_is_read_where_its_target_asks():
    """NaN elsewhere, as data of another source has it."""
    batch = hard_batch()
    which = numbers(2, "in turn")
    weight = batch.columns["weight"].masked_fill(which == 1, float("nan"))
    targets = [qt.preset("iw-sft"), qt.preset("sft")]
    spoilt = replace(batch, columns=batch.columns | {"weight": weight})
    got = mixed(spoilt, targets, which, reduction="sum")
    assert torch.isfinite(got.loss) and torch.isfinite(got.gradients["hidden"]).all()
    wrong = replace(
        batch, columns=batch.columns | {"weight": batch.columns["weight"].masked_fill(which == 0, float("nan"))}
    )
    with pytest.raises(qt.ConfigError, match="weight holds NaN"):
        mixed(wrong, targets, which)


def test_a_fault_is_named_by_its_place_in_the_batch():
    batch = hard_batch()
    which = numbers(2, "in turn")
    batch.hidden[9] = float("nan")
    with pytest.raises(qt.ConfigError, match="NaN or infinite at row 9"):
        mixed(batch, [qt.preset("sft"), qt.preset("dft")], which)


def test_the_same_memory_as_one_target():
    """What waits for backward: one dH, one dW."""

    def kept(target, **options):
        hidden, weight = torch.randn(N, 12, requires_grad=True), torch.randn(67, 12, requires_grad=True)
        out = qt.linear_target_loss(hidden, weight, torch.arange(N), target, **options)
        result = out.loss.grad_fn.result
        return result.d_hidden.numel() + result.d_weight.numel()

    both = [qt.preset("sft"), qt.preset("dft")]
    assert kept(both, which=numbers(2, "in turn")) == kept(both[0]) == N * 12 + 67 * 12


# ---- the comparison can fail


def test_a_target_for_its_neighbour_is_noticed(monkeypatch):
    targets, which = MIXTURES["with and without a teacher"], numbers(3, "in turn")
    real = chunks._Run._segments
    monkeypatch.setattr(
        chunks._Run, "_segments", lambda self, chunk: ((s, (number + 1) % 3) for s, number in real(self, chunk))
    )
    with pytest.raises(AssertionError):
        assert_same(mixed(hard_batch(), targets, which, **REDUCED), one_by_one(hard_batch(), targets, which))


def test_one_target_s_gradient_alone_is_noticed(monkeypatch):
    targets, which = MIXTURES["two students"], numbers(2, "in stretches")
    real = chunks._Run._multiply
    monkeypatch.setattr(chunks._Run, "_multiply", lambda self, g, tokens: real(self, g[: N // 2], tokens[: N // 2]))
    with pytest.raises(AssertionError, match="d_hidden differs"):
        assert_same(mixed(hard_batch(), targets, which, **REDUCED), one_by_one(hard_batch(), targets, which))
