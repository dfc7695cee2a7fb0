"""The engine in float32 and below, against the float64 oracle of the same numbers."""

import functools
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import qtarget as qt
from engine_and_oracle import (
    PUSHED_DOWN,
    PUSHED_UP,
    assert_rows_agree,
    hard_batch,
    ordinary_batch,
    preset_of,
    randn,
    relative_error,
    run_engine,
    run_oracle,
    with_columns,
)
from published import KINDS
from qtarget.losses.engine import matmuls

pytestmark = pytest.mark.usefixtures("one_thread")

BOUND = 1e-5
HALF = [torch.bfloat16, torch.float16]
BESIDE_ANOTHER = [case for case in KINDS if {"teacher_logits", "reference_logits"} & set(case.needs)]
every_case = pytest.mark.parametrize("case", KINDS, ids=lambda case: case.id)
half = pytest.mark.parametrize("dtype", HALF, ids=["bf16", "fp16"])


@functools.cache
def single(name):
    """A batch in float32, and the same numbers in float64."""
    batch = {
        "ordinary": lambda: ordinary_batch(with_bias=True, scale=1.3),
        "softcapped": lambda: ordinary_batch(seed=1, softcap=5.0),
        "realistic": lambda: ordinary_batch(n=96, v=2000, d=64, seed=2),
        "hard": hard_batch,
        "hard and softcapped": lambda: hard_batch(softcap=40.0, with_bias=True),
    }[name]()
    rounded = batch.to(torch.float32)
    return rounded, rounded.to(torch.float64)


def errors(got, truth):
    """Gradients relative in the Frobenius norm; the loss too, but below one nat in nats."""
    named = {
        f"d_{name}": relative_error(got.gradients[name], gradient)
        for name, gradient in truth.gradients.items()
        if gradient is not None
    }
    named["loss"] = float((got.loss.double() - truth.loss).abs() / truth.loss.abs().clamp(min=1))
    return named


def assert_no_worse_than_full_logits(batch, exact, target, **options):
    truth = run_oracle(exact, target)
    found, plain = errors(run_engine(batch, target, **options), truth), errors(run_oracle(batch, target), truth)
    # Two ways to round differ by luck; more so where neither has a digit left.
    allowed = {key: (1.25 if error < 1 else 2) * error + BOUND for key, error in plain.items()}
    worse = {key: (found[key], plain[key]) for key in found if not found[key] <= allowed[key]}
    assert not worse, f"(engine, full logits): {worse}"


@pytest.mark.parametrize("name", ["ordinary", "softcapped", "realistic", "hard", "hard and softcapped"])
@every_case
def test_single_precision(case, name):
    if "total_variation" in case.id and "hard" in name:
        pytest.skip("a teacher nearer than logits are rounded: on which side of p a token is cannot be told")
    batch, exact = single(name)
    target = preset_of(case)
    found = errors(run_engine(batch, target, chunk_rows=40), run_oracle(exact, target))
    assert max(found.values()) <= BOUND, found


# Logits near 10 carry 1e-6 in float32: nobody can tell a teacher nearer than that from the student.
@pytest.mark.parametrize("distance", [1e-7, 1e-5, 1e-3, 1e-1])
@pytest.mark.parametrize("case", BESIDE_ANOTHER, ids=lambda case: case.id)
def test_teacher_nearly_equal_is_no_worse_than_full_logits(case, distance):
    batch = ordinary_batch(n=48, v=1000, d=32, seed=4)
    student = batch.logits()
    batch.dense = {name: student + distance * other for name, other in batch.dense.items()}
    batch = batch.to(torch.float32)
    assert_no_worse_than_full_logits(batch, batch.to(torch.float64), preset_of(case), chunk_rows=48)


@pytest.mark.parametrize("case", [c for c in KINDS if c.preset == "kd"], ids=lambda case: case.id)
def test_teacher_equal_to_the_student_asks_for_nothing(case):
    """The same head on the same states: no token moves."""
    batch, _ = single("realistic")
    target = preset_of(case)
    batch = replace(batch, heads={"teacher": qt.Head(batch.hidden, batch.weight)})
    got = run_engine(batch, target, reduction="sum")
    assert float(got.gradients["hidden"].abs().max()) <= 2e-6
    assert float(got.stats["update"].max()) <= 2e-6


def label_only(*presets):
    return pytest.mark.parametrize(
        "case",
        [c for c in KINDS if c.preset in presets and preset_of(c).residual_terms == ()],
        ids=lambda c: c.id,
    )


@label_only("sft", "dft", "beyond-log", "iw-sft", "cft", "psft", "eaft")
def test_confident_labels_keep_their_digits_in_single_precision(case):
    """1 − p_y from 1e-2 to 1e-8: each token's gradient on its own scale, though p_y itself rounds to 1."""
    batch = hard_batch()
    labels = torch.full_like(batch.labels, PUSHED_UP)
    batch.hidden[:, 0] = torch.linspace(8, 22, len(labels), dtype=torch.float64)
    batch = with_columns(replace(batch, labels=labels)).to(torch.float32)
    truth = run_oracle(batch.to(torch.float64), preset_of(case), reduction="sum")
    got = run_engine(batch, preset_of(case), reduction="sum")
    assert_rows_agree(got.gradients["hidden"], truth.gradients["hidden"], "d_hidden", rtol=2e-5, floor=0.0)
    assert_rows_agree(got.stats["nll"], truth.stats["nll"], "nll", rtol=2e-5, floor=0.0)


@pytest.mark.parametrize("case", [c for c in KINDS if c.preset != "eaft"], ids=lambda case: case.id)
def test_hopeless_labels_keep_relative_precision(case):
    """Labels near e^-60: nothing cancels there, so agreement in float64 is purely relative."""
    batch = hard_batch()
    batch.weight[PUSHED_UP, 0] = 0  # nor is the student sure of another token
    batch.hidden[:, 0] = torch.linspace(40, 60, len(batch.labels), dtype=torch.float64)
    labels = torch.full_like(batch.labels, PUSHED_DOWN)
    batch = with_columns(replace(batch, labels=labels, dense=ordinary_batch().dense))
    target = preset_of(case)
    got, truth = run_engine(batch, target, reduction="sum"), run_oracle(batch, target, reduction="sum")
    assert_rows_agree(got.gradients["hidden"], truth.gradients["hidden"], "d_hidden", rtol=1e-10, floor=0.0)


# ---- half precision


def in_half(dtype, **options):
    """Hidden states and heads in half precision, and the float64 batch of the same numbers."""
    batch = ordinary_batch(n=24, v=80, d=16, seed=6, with_bias=True, **options)
    g = torch.Generator().manual_seed(7)
    states = {name: (randn(g, 24, 20).to(dtype), (randn(g, 80, 20) / 2).to(dtype)) for name in batch.dense}
    low = replace(batch, hidden=batch.hidden.to(dtype), weight=batch.weight.to(dtype), bias=batch.bias.to(dtype))
    up = replace(
        low,
        hidden=low.hidden.double(),
        weight=low.weight.double(),
        bias=low.bias.double(),
        dense={name: hidden.double() @ weight.double().T for name, (hidden, weight) in states.items()},
    )
    up = with_columns(up)
    columns = {name: c.float() if c.is_floating_point() else c for name, c in up.columns.items()}
    up.columns = {name: c.double() if c.is_floating_point() else c for name, c in columns.items()}
    return replace(low, heads={name: qt.Head(*pair) for name, pair in states.items()}, columns=columns), up


class MatmulDtypes(TorchDispatchMode):
    """Notes the dtypes that are multiplied while it is on."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm", "matmul", "linear"):
            self.seen |= {x.dtype for x in args if isinstance(x, torch.Tensor)}
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows_cast_up", [4096, 16], ids=["whole head cast up", "in tiles"])
@half
@every_case
def test_half_precision_is_only_a_way_to_store(case, dtype, rows_cast_up, monkeypatch):
    monkeypatch.setattr(matmuls, "_CAST_ROWS", rows_cast_up)
    batch, exact = in_half(dtype, scale=1.3)
    target = preset_of(case)
    truth = run_oracle(exact, target, reduction="sum")
    with MatmulDtypes() as dtypes:
        got = run_engine(batch, target, reduction="sum", chunk_rows=10)
    assert dtypes.seen == {torch.float32}
    assert got.loss.dtype == torch.float32
    assert all(gradient.dtype == dtype for gradient in got.gradients.values())
    assert errors(got, truth)["loss"] <= BOUND
    for (
        name,
        gradient,
    ) in truth.gradients.items():  # one rounding, whose steps are even below the smallest normal
        step = torch.finfo(dtype).eps * gradient.abs().clamp(min=torch.finfo(dtype).smallest_normal)
        assert ((got.gradients[name].double() - gradient).abs() <= 0.51 * step + BOUND * gradient.norm()).all(), name


@half
def test_mixed_dtypes_give_each_input_its_own(dtype):
    batch, exact = in_half(dtype)
    target = qt.preset("target-sft")
    wide = replace(batch, hidden=batch.hidden.float())
    got, truth = run_engine(wide, target, reduction="sum"), run_oracle(exact, target, reduction="sum")
    assert [got.gradients[name].dtype for name in ("hidden", "weight", "bias")] == [
        torch.float32,
        dtype,
        dtype,
    ]
    assert relative_error(got.gradients["hidden"], truth.gradients["hidden"]) <= BOUND


def test_a_float64_weight_makes_everything_float64():
    batch, exact = single("ordinary")
    target = qt.preset("target-sft")
    got = run_engine(replace(exact, hidden=batch.hidden), target)
    assert got.loss.dtype == torch.float64
    assert relative_error(got.gradients["weight"], run_oracle(exact, target).gradients["weight"]) <= 1e-12


def test_autocast_does_not_reach_the_engine():
    batch, exact = single("ordinary")
    target = qt.preset("target-sft")
    with torch.autocast("cpu", torch.bfloat16):
        got = run_engine(batch, target)
    assert max(errors(got, run_oracle(exact, target)).values()) <= BOUND


@pytest.mark.parametrize("name", ["kd", "target-sft"])
def test_a_large_vocabulary_and_logits_far_from_zero(name):
    """A float32 softmax of 49,152 entries sums to 1 within 1e-5, which counts times logits of 40."""
    torch.manual_seed(0)
    vocab, tokens, width = 49152, 48, 64
    weight, hidden = torch.randn(vocab, width), 1.2 * torch.randn(tokens, width)
    teacher_weight, teacher_hidden = (
        weight + 0.05 * torch.randn(vocab, width),
        hidden + 0.05 * torch.randn(tokens, width),
    )
    z, z_teacher = hidden.double() @ weight.double().T, teacher_hidden.double() @ teacher_weight.double().T
    labels = z.softmax(-1).multinomial(1).squeeze(1)
    target = qt.preset(name)
    truth = qt.target_loss(z, labels, target, teacher_logits=z_teacher, reduction="none").loss
    ids = torch.arange(vocab, dtype=torch.int32).expand(tokens, vocab)
    whole = qt.TopK(ids, z_teacher.log_softmax(-1).float(), torch.full((tokens,), -6e4))
    for teacher in (qt.Head(teacher_hidden, teacher_weight), whole):
        got = qt.linear_target_loss(hidden, weight, labels, target, teacher=teacher, reduction="none").loss
        # Uncorrected it would be 1e-5 · 40; what float32 products leave, 2e-6, differs between processors.
        assert abs(float((got - truth).mean())) < 4e-6, type(teacher).__name__
        assert float((got - truth).abs().max()) < 3e-5


@pytest.mark.parametrize("distance", [5e-6, 5e-3])
def test_distillation_at_a_temperature_keeps_the_digits_of_a_near_teacher(distance):
    """As one difference of two tempered distributions; as two terms the error was 1.8e-3 at 5e-3 nats."""
    torch.manual_seed(0)
    z = 4 * torch.randn(64, 4096)
    other = z + distance * torch.randn_like(z)
    labels = torch.where(torch.rand(64) < 0.5, z.argmax(-1), torch.randint(0, 4096, (64,)))
    target = qt.preset("kd", temperature=2.0)

    def gradient(call, z, other):
        leaf = z.clone().requires_grad_()
        call(leaf, other).loss.backward()
        return leaf.grad

    def fused(z, other):
        eye = torch.eye(4096, dtype=z.dtype)
        return qt.linear_target_loss(z, eye, labels, target, teacher=qt.Head(other, eye), reduction="sum")

    def full(z, other):
        return qt.target_loss(z, labels, target, teacher_logits=other, reduction="sum")

    truth = gradient(full, z.double(), other.double())
    assert relative_error(gradient(fused, z, other), truth) <= 1e-6
    assert relative_error(gradient(full, z, other), truth) > 1e-4
