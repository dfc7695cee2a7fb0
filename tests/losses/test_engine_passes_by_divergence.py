"""The two passes by every divergence: the pure functions, and the kernels in Triton's interpreter, against the oracle."""

import contextlib
import importlib.util
from dataclasses import replace

import pytest
import torch
from test_engine_topk import padded, with_topk

import qtarget as qt
from divergence_cases import DIVERGENCES, RESIDUALS, given_logits, hard_rows, ruling_out, toward
from engine_and_oracle import assert_same, ordinary_batch, randn, relative_error, run_engine, run_oracle
from qtarget.losses.engine import who
from qtarget.losses.engine.device import passes
from qtarget.losses.engine.device.row_plan import RowPlan

pytestmark = pytest.mark.usefixtures("one_thread")
NO_TRITON = importlib.util.find_spec("triton") is None
KERNELS = pytest.param("triton", marks=[pytest.mark.triton, pytest.mark.skipif(NO_TRITON, reason="needs triton")])
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)


@pytest.fixture(params=["compiled", KERNELS], ids=["functions", "kernels"])
def backend(request, monkeypatch):
    """Functions as they are, kernels with tiles smaller than a test's vocabulary; nothing falls back to PyTorch."""
    monkeypatch.setattr(who, "FunctionPasses", lambda: passes.FunctionPasses(compiled=False))
    monkeypatch.setattr(who, "computes_in_torch", None)
    small = contextlib.nullcontext()
    if request.param == "triton":
        from device_path import small_tiles

        small = small_tiles()
    with small:
        yield request.param


def assert_passes_are_the_oracle(batch, target, backend):
    assert RowPlan.of(target) is not None
    got = run_engine(batch, target, stats="all", reduction="sum", backend=backend)
    assert_same(got, run_oracle(batch, target, stats="all", reduction="sum"))


@pytest.mark.parametrize("vocab_size, softcap", [(None, None), (61, 40.0)], ids=["plain", "padded and capped"])
@every_divergence
def test_every_residual(divergence, vocab_size, softcap, backend):
    residuals = list(RESIDUALS)
    if backend == "triton":  # the interpreter takes a second for each, so they take turns
        turn = list(DIVERGENCES).index(divergence) + (vocab_size is None)
        residuals = [residuals[turn % len(residuals)]]
    batch = hard_rows(with_bias=True, softcap=softcap, vocab_size=vocab_size)
    batch = replace(batch, labels=batch.labels.clamp(max=60)) if vocab_size else batch
    for residual in residuals:
        assert_passes_are_the_oracle(batch, toward(residual, divergence), backend)


@pytest.mark.parametrize("residual, cut", [("guided", lambda batch: batch), ("teacher", padded)], ids=["all", "padded"])
@every_divergence
def test_top_k(divergence, residual, cut, backend):
    for tail in ("student",) if backend == "triton" else ("student", "even"):  # an even tail is a dense teacher
        batch = with_topk(cut(ordinary_batch(n=3)), 5, tail=tail)
        assert_passes_are_the_oracle(batch, toward(residual, divergence), backend)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter, of ∞ − ∞
@every_divergence
def test_a_token_that_the_teacher_rules_out(divergence, backend):
    """Some divergences are infinite there, which is told; the others are finite."""
    batch, target = ruling_out(ordinary_batch(n=3), token=7), toward("teacher", divergence)
    if not target.needs_full_support:
        assert_passes_are_the_oracle(batch, target, backend)
        return
    with pytest.raises(qt.errors.NonFiniteLogits, match="teacher logits are NaN or infinite at row 0"):
        run_engine(batch, target, backend=backend)


@pytest.mark.parametrize("distance", [1e-4, 120.0])
@every_divergence
def test_digits_in_single_precision(divergence, distance, backend):
    """A teacher near the student leaves a small gradient with all its digits; one far away overflows nothing."""
    g = torch.Generator().manual_seed(5)
    student = (2 * randn(g, 3, 80)).float()
    teacher = (student + distance * randn(g, 3, 80).sin()).float()
    batch = given_logits(student, teacher)
    target = qt.Target(0.0, [(1.0, RESIDUALS["teacher"], DIVERGENCES[divergence])])
    got = run_engine(batch, target, reduction="sum", backend=backend)
    exact = run_oracle(batch.to(torch.float64), target, reduction="sum")
    assert relative_error(got.gradients["hidden"], exact.gradients["hidden"]) <= 1e-5
    assert relative_error(got.loss, exact.loss) <= (2e-3 if distance < 1 else 1e-5)  # of second order in the distance


def test_one_s_own_divergence_is_left_to_pytorch():
    assert RowPlan.of(qt.Target(0.5, [(1.0, qt.residual.teacher(), torch.tanh)])) is None
