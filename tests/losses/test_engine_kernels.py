"""The Triton kernels in Triton's interpreter against the oracle in float64: every preset and option."""

import contextlib
import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_engine_topk import REAL, padded, with_topk

import qtarget as qt
from engine_and_oracle import (
    FLOOR,
    assert_same,
    floor_of,
    hard_batch,
    ordinary_batch,
    preset_of,
    run_engine,
    run_oracle,
    with_ignored_labels,
)
from published import KINDS

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs the package triton", allow_module_level=True)

from triton.runtime.errors import OutOfResources

from device_path import small_tiles
from qtarget.losses.engine import who
from qtarget.losses.engine.device import kernels, passes
from qtarget.losses.engine.device.row_plan import RowPlan

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("one_thread", "tiles")]
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
every_case = pytest.mark.parametrize("case", KINDS, ids=lambda case: case.id)


@pytest.fixture
def tiles():
    with small_tiles():
        yield


@pytest.fixture
def on_kernels(monkeypatch):
    """Nothing falls back to PyTorch."""

    def refuse(call, target, place):
        raise AssertionError(f"{target} fell back to torch")

    monkeypatch.setattr(who, "computes_in_torch", refuse)


def assert_kernels_are_the_oracle(batch, target, stats="all", floor=FLOOR, **options):
    got = run_engine(batch, target, stats=stats, reduction="sum", backend="triton", **options)
    assert_same(got, run_oracle(batch, target, stats=stats, reduction="sum"), floor=floor)


@every_case
def test_every_preset_and_option(case, on_kernels):
    """Certain and hopeless labels, a bias, a softcap, a padded vocabulary, ignored labels, a teacher near and far."""
    batch = with_ignored_labels(hard_batch(with_bias=True, softcap=40.0, vocab_size=61), "some ignored")
    batch = replace(batch, labels=batch.labels.clamp(max=60))
    assert_kernels_are_the_oracle(batch, preset_of(case), floor=floor_of(case), chunk_rows=16)


@pytest.mark.full
@every_case
def test_plain_logits(case, on_kernels):
    assert_kernels_are_the_oracle(hard_batch(), preset_of(case), floor=floor_of(case))


@pytest.mark.parametrize("vocab_size", [None, REAL], ids=["all rows", "padded"])
@pytest.mark.parametrize("tail", ["student", "even"])
@pytest.mark.parametrize("name", ["kd", "kd at T = 2", "target-sft", "eaft beside a teacher"])
def test_top_k_with_either_tail(name, tail, vocab_size, on_kernels):
    target = {
        "kd at T = 2": qt.preset("kd", temperature=2.0),
        "eaft beside a teacher": qt.Target(qt.trust.entropy(top_k=5), qt.residual.teacher()),
    }.get(name) or qt.preset(name)
    batch = with_topk(ordinary_batch() if vocab_size is None else padded(ordinary_batch()), 5, tail=tail)
    assert_kernels_are_the_oracle(replace(batch, softcap=None), target)


@pytest.mark.parametrize("mass", [1e-12, 1e-45])
def test_a_student_sure_of_the_k(mass):
    from test_engine_topk import sure_student

    _, batch = sure_student(mass, torch.float64)
    assert_kernels_are_the_oracle(batch, qt.preset("target-sft", eta=0.3))


def test_a_rule_of_one_s_own_on_the_teacher(on_kernels):
    rule = qt.trust.needs("teacher_log_p_y", "entropy")(lambda s: s.teacher_log_p_y.exp() / (1 + s.entropy))
    assert_kernels_are_the_oracle(ordinary_batch(), qt.Target(rule, qt.residual.guided(0.4)))


@pytest.mark.parametrize("name", ["cft", "profit", "psft"])
def test_rows_without_a_gradient(name, on_kernels):
    assert_kernels_are_the_oracle(hard_batch(softcap=40.0), qt.preset(name), chunk_rows=10)


def test_several_targets_in_one_pass(on_kernels):
    batch = hard_batch(with_bias=True)
    targets = [qt.preset("dft"), qt.preset("target-sft"), qt.preset("kd", temperature=2.0)]
    which = torch.arange(len(batch.labels)) % 3
    inputs = batch.engine_inputs(targets[1])
    hidden, weight = batch.hidden.clone().requires_grad_(), batch.weight.clone().requires_grad_()
    options = {"head_bias": batch.bias, "reduction": "sum", "backend": "triton", "chunk_rows": 10}
    qt.linear_target_loss(hidden, weight, batch.labels, targets, which=which, **inputs, **options).loss.backward()
    expected = [
        run_oracle(replace(batch, labels=batch.labels.masked_fill(which != i, -100)), target, reduction="sum")
        for i, target in enumerate(targets)
    ]
    for leaf, name in ((hidden, "hidden"), (weight, "weight")):
        truth = sum(one.gradients[name] for one in expected)
        assert torch.allclose(leaf.grad, truth, rtol=1e-10, atol=1e-12), name


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_evaluation(guard):
    batch, target = hard_batch(), qt.preset("target-sft")
    expected = run_oracle(batch, target, stats="all")
    with guard():
        inputs = batch.engine_inputs(target)
        out = qt.linear_target_loss(
            batch.hidden, batch.weight, batch.labels, target, stats="all", backend="triton", **inputs
        )
    assert torch.allclose(out.loss, expected.loss, rtol=1e-10)
    assert torch.allclose(out.stats["kl_q"], expected.stats["kl_q"], rtol=1e-9, equal_nan=True)


def test_several_residuals_fall_back_once(caplog, monkeypatch):
    monkeypatch.setattr(who, "_told", set())
    target = qt.Target(0.3, [(0.6, qt.residual.teacher()), (0.4, qt.residual.guided(0.2))])
    assert RowPlan.of(target) is None
    for _ in range(2):
        assert_kernels_are_the_oracle(ordinary_batch(), target)
    lines = [record.getMessage() for record in caplog.records if "several residuals" in record.getMessage()]
    assert len(lines) == 1


# ---- a kernel that does not compile


def test_a_kernel_that_cannot_be_compiled_falls_back_once(monkeypatch, caplog):
    calls = []

    def refuses(*arguments):
        calls.append(1)
        raise OutOfResources(300000, 232448, "shared memory")

    monkeypatch.setattr(kernels, "gradient", refuses)
    monkeypatch.setattr(who, "_told", set())
    batch = with_topk(hard_batch(), 5)
    got = run_engine(batch, qt.preset("target-sft"), reduction="sum", backend="triton", chunk_rows=10)
    assert_same(got, run_oracle(batch, qt.preset("target-sft"), reduction="sum"))
    (line,) = [record.getMessage() for record in caplog.records if "cannot be compiled" in record.getMessage()]
    assert "backend 'triton'" in line and "so 'torch' is used" in line
    assert len(calls) == 1


# ---- the comparison can fail


MUTANTS = {
    "none": ("", "", "target-sft"),
    "the label's column": ("g = tl.where(v == y, label, g)", "g = tl.where(v == y + 1, label, g)", "dft"),
    "the label's column in the sums": ("others = tl.where(v == y, _NEVER, z)", "others = z", "dft"),
    "no rescaling of a running sum": ("rest = rest * shrink + e", "rest = rest + e", "dft"),
    "no rescaling of the pool's": ("s_u = s_u * tl.exp2((m_u - m_next) * _LOG2E) +", "s_u = s_u +", "target-sft"),
    "a dropped tail": ("in tl.range(0, width, BLOCK):", "in tl.range(0, width // BLOCK * BLOCK, BLOCK):", "sft"),
    "no support": ("R = tl.where(v < support, R, 0.0)", "R = R", "label-smoothing"),
    "no softcap": ("g *= 1 - share * share", "g *= 1", "sft"),
    "a residual of the wrong sign": ("g += b * difference", "g -= b * difference", "kd"),
    "a tail that stays": ("difference = pull * tl", "difference = 0 * tl", "kd from top-k"),
    "a mean score of 0": ("difference = pulled - base * mean", "difference = pulled", "kd by jsd"),
    "a student over all rows": (
        "base = base if FORWARD else tl.where(v < support, base, 0.0)",
        "base = base",
        "kd by jsd",
    ),
    "its sum over all rows": ("inside = tl.where(v < support, z - m_new, _NEVER)", "inside = z - m_new", "kd by jsd"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_noticed(mutant, tmp_path, monkeypatch):
    """Without the pass that corrects a normaliser, which a 16-bit gradient does without, too."""
    monkeypatch.setattr(passes.TritonPasses, "drifts", lambda self, z: False)
    old, new, name = MUTANTS[mutant]
    source = Path(kernels.__file__).read_text()
    assert old in source
    path = tmp_path / "mutated_kernels.py"
    path.write_text(source.replace(old, new) if old else source)
    spec = importlib.util.spec_from_file_location("mutated_kernels", path)
    mutated = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mutated_kernels", mutated)
    spec.loader.exec_module(mutated)
    monkeypatch.setattr(kernels, "_sums", mutated._sums)
    monkeypatch.setattr(kernels, "_gradient", mutated._gradient)
    batch = ordinary_batch(softcap=30.0, vocab_size=61)
    if name == "kd from top-k":
        batch, name = with_topk(padded(ordinary_batch()), 5), "kd"
    preset, _, divergence = name.partition(" by ")
    target = qt.preset(preset, divergence=divergence) if divergence else qt.preset(preset)
    expected = contextlib.nullcontext() if mutant == "none" else pytest.raises((AssertionError, qt.ConfigError))
    with expected:
        assert_kernels_are_the_oracle(batch, target, stats="basic")


# ---- compiled ahead of time


@pytest.mark.parametrize("arch", [pytest.param(80, marks=pytest.mark.full), 90])
def test_kernels_compiled_for_a_gpu_that_is_not_there(arch):
    """No spills, at most 128 registers, logits in 16-byte loads, for every variant that the engine launches."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(BENCHMARKS), *sys.path])
    command = [sys.executable, "-m", "gpu_run.ahead", str(arch)]
    done = subprocess.run(command, cwd=BENCHMARKS, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if f"sm_{arch}" in line]
    assert len(lines) > 40 and all(" stack 0 " in line and "LDG.E.128" in line for line in lines)
