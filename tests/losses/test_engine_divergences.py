"""Divergences in the engine's plain PyTorch, against the oracle, the printed formula and a lumped tail."""

import functools
import math
from dataclasses import replace

import pytest
import torch

import qtarget as qt
from engine_and_oracle import (
    V,
    as_head,
    assert_engine_is_oracle,
    assert_rows_agree,
    hard_batch,
    ordinary_batch,
    relative_error,
    run_engine,
    run_oracle,
)
from published import DIVERGENCES
from qtarget.targets.divergence import as_divergence
from qtarget.targets.presets.printed import divergence_from

pytestmark = pytest.mark.usefixtures("one_thread")

REAL = 59


def leaning(d):
    """One of a user's own: bounded, so that no token may be ruled out."""
    return torch.tanh(d / 2) + torch.tanh(d)


def unbounded(d):
    return d + d * torch.sigmoid(d)


ALL = {str(divergence): divergence for divergence in map(as_divergence, [*DIVERGENCES, leaning, unbounded])}
PRINTED = [divergence for divergence in ALL.values() if divergence.name]
FINITE = [divergence for divergence in ALL.values() if not divergence.needs_full_support]
INFINITE = [divergence for divergence in ALL.values() if divergence.needs_full_support]
TERMS = {
    "teacher": lambda D: [(1, qt.residual.teacher(), D)],
    "reference": lambda D: [(0.4, qt.residual.reference(), D)],
    "guided": lambda D: [
        (1, qt.residual.guided(0.5), D)
    ],  # halves add up without rounding: a sign of d can be compared
    "uniform": lambda D: [(1, qt.residual.uniform(), D)],
    "tempered": lambda D: [(-1, qt.residual.sharpened(0.5, "logsigmoid"), D)],
    "teacher and reference": lambda D: [(1, qt.residual.pool(teacher=0.75, reference=0.25), D)],
    "several": lambda D: [
        (0.5, qt.residual.teacher(), D),
        (0.3, qt.residual.uniform()),
        (0.2, qt.residual.reference(), qt.divergence.jsd()),
    ],
}
every_divergence = pytest.mark.parametrize("divergence", ALL.values(), ids=ALL)
every_pool = pytest.mark.parametrize("pool", TERMS)


def divergences(some):
    return pytest.mark.parametrize("divergence", some, ids=str)


def target_of(divergence, pool="teacher", trust=0.3, **options):
    return qt.Target(trust, TERMS[pool](divergence), **options)


@functools.cache
def batch_of(name):
    return {
        "ordinary": ordinary_batch,
        "hard": hard_batch,
        "softcapped": lambda: hard_batch(softcap=40.0, with_bias=True),
        "padded": lambda: ordinary_batch(vocab_size=REAL),
        "narrower models": lambda: narrower(ordinary_batch(vocab_size=REAL)),
    }[name]()


def narrower(batch):
    """A teacher and a reference without the student's last tokens, some of which are labels."""
    return replace(batch, dense={name: logits[:, : REAL - 9] for name, logits in batch.dense.items()})


@pytest.mark.parametrize("name", ["ordinary", "hard", "softcapped", "padded", "narrower models"])
@every_pool
@every_divergence
def test_engine_is_the_oracle(divergence, pool, name):
    assert_engine_is_oracle(batch_of(name), target_of(divergence, pool), chunk_rows=10)


@pytest.mark.parametrize("value", ["kl", "ce"])
@every_divergence
def test_scale_and_share(divergence, value):
    target = target_of(divergence, "several", qt.trust.probability(), scale=qt.trust.entropy(5), value=value, share=0.4)
    assert_engine_is_oracle(batch_of("ordinary"), target)


@divergences(PRINTED)
@pytest.mark.parametrize("vocab_size", [None, REAL])
def test_gradient_of_the_printed_formula(divergence, vocab_size):
    batch = batch_of("ordinary" if vocab_size is None else "padded")
    teacher = batch.dense["teacher"]
    leaf = batch.hidden.clone().requires_grad_()
    value = divergence_from(teacher, leaf @ batch.weight.T, divergence, vocab_size)
    (printed,) = torch.autograd.grad(value.sum(), leaf)
    got = run_engine(batch, qt.preset("kd", divergence=divergence), reduction="sum")
    assert relative_error(got.gradients["hidden"], printed) <= 1e-12
    per_token = run_engine(batch, qt.preset("kd", divergence=divergence), torch.ones(len(value)), reduction="none").loss
    if not divergence.is_forward_kl and divergence != qt.divergence.alpha(1.0):
        assert_rows_agree(per_token, value.detach(), "value", 1e-12, 1e-14)


# ---- float32


@pytest.mark.parametrize("name", ["ordinary", "hard", "softcapped", "padded"])
@divergences(PRINTED)
def test_single_precision(divergence, name):
    if divergence == qt.divergence.total_variation() and name in ("hard", "softcapped"):
        pytest.skip("teachers nearer than logits are rounded: on which side of p a token is cannot be told")
    batch = batch_of(name).to(torch.float32)
    target = qt.preset("kd-hybrid", divergence=divergence)
    truth, got = run_oracle(batch.to(torch.float64), target), run_engine(batch, target, chunk_rows=40)
    assert relative_error(got.gradients["hidden"], truth.gradients["hidden"]) <= 1e-5
    assert relative_error(got.loss, truth.loss) <= 1e-5


@divergences(PRINTED)
def test_near_the_teacher_a_gradient_keeps_its_digits(divergence):
    """1e-4 apart in logits that float32 holds exactly, a head of unit vectors handing them on."""
    g = torch.Generator().manual_seed(7)
    student = torch.randn(24, 3000, generator=g) * 3
    teacher = student + 1e-4 * torch.randn(24, 3000, generator=g)
    labels = torch.randint(0, 3000, (24,), generator=g)
    exact = student.double().requires_grad_()
    target = qt.preset("kd", divergence=divergence)
    truth = qt.target_loss(exact, labels, target, teacher_logits=teacher.double()).loss
    truth.backward()
    leaf = student.clone().requires_grad_()
    qt.linear_target_loss(leaf, torch.eye(3000), labels, target, teacher=as_head(teacher)).loss.backward()
    assert relative_error(leaf.grad, exact.grad) <= 1e-5


@divergences(PRINTED)
def test_far_apart_stays_finite(divergence):
    """120 logits apart both ways: e^120 is beyond float32, e^(−120) beneath it."""
    student = torch.zeros(2, 8)
    student[0, 1], student[1, 2] = 120, -120
    labels, teacher = torch.tensor([2, 2]), student.flip(0)
    target = qt.preset("kd", divergence=divergence)
    exact, leaf = student.double().requires_grad_(), student.clone().requires_grad_()
    truth = qt.target_loss(exact, labels, target, teacher_logits=teacher.double()).loss
    got = qt.linear_target_loss(leaf, torch.eye(8), labels, target, teacher=as_head(teacher)).loss
    for loss in (truth, got):
        loss.backward()
    assert relative_error(got.detach(), truth.detach()) <= 1e-5
    assert relative_error(leaf.grad, exact.grad) <= 1e-5


@divergences(PRINTED)
def test_a_teacher_equal_to_the_student_asks_for_nothing(divergence):
    batch = ordinary_batch().to(torch.float32)
    batch = replace(batch, heads={"teacher": qt.Head(batch.hidden, batch.weight)})
    assert float(run_engine(batch, qt.preset("kd", divergence=divergence)).stats["update"].max()) <= 1e-6


# ---- tokens that are ruled out


def ruling_out(batch, tokens):
    """The batch with a teacher whose head has a bias of −inf at some tokens."""
    bias = torch.zeros(V, dtype=torch.float64)
    bias[tokens] = -math.inf
    heads = {name: as_head(logits) for name, logits in batch.dense.items()}
    heads["teacher"] = qt.Head(heads["teacher"].hidden, heads["teacher"].weight, bias)
    return replace(batch, dense=batch.dense | {"teacher": batch.dense["teacher"] + bias}, heads=heads)


@pytest.mark.parametrize("pool", ["teacher", "guided", "several"])
@divergences(FINITE)
def test_a_token_may_be_ruled_out(divergence, pool):
    batch = batch_of("ordinary")
    assert_engine_is_oracle(ruling_out(batch, [2, 5, int(batch.labels[7])]), target_of(divergence, pool))


@pytest.mark.parametrize("run", [run_engine, run_oracle])
@pytest.mark.parametrize("pool", ["teacher", "guided", "several"])
@divergences(INFINITE)
def test_a_token_ruled_out_is_refused_where_the_divergence_is_infinite(divergence, pool, run):
    batch = ruling_out(batch_of("ordinary"), [2])
    with pytest.raises(qt.NonFiniteLogits, match=r"teacher.* row 0; divergence .* is infinite where a model") as error:
        run(batch, target_of(divergence, pool))
    assert f"divergence {divergence} is" in str(error.value)


@divergences(INFINITE)
def test_padding_may_be_ruled_out(divergence):
    assert_engine_is_oracle(ruling_out(batch_of("padded"), slice(REAL, None)), target_of(divergence))


# ---- off the simplex


@pytest.mark.parametrize("weight", [0.5, 1.0, 3.0])
@divergences(PRINTED)
def test_the_simplex_is_left_only_where_the_reach_lets_it(divergence, weight):
    batch = batch_of("hard")
    target = qt.Target(0.0, [(weight, qt.residual.teacher(), divergence)])
    found = run_engine(batch, target).stats["off_simplex_fraction"]
    if divergence.reach is not None and weight * divergence.reach <= 1:
        assert not found.any()
    assert torch.equal(found, run_oracle(batch, target).stats["off_simplex_fraction"])


@divergences([qt.divergence.jsd(), qt.divergence.total_variation()])
def test_a_renormalised_student_is_looked_at_whatever_the_reach(divergence):
    """Half the head is no tokens, so p̂ is more than p: within the reach and off the simplex all the same."""
    logits = torch.zeros(1, 8, dtype=torch.float64)
    logits[0, 4:] = 6.0
    teacher = torch.tensor([[9.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    target = qt.Target(0.0, [(1.0, qt.residual.teacher(), divergence)])
    got = qt.linear_target_loss(
        logits, torch.eye(8).double(), torch.tensor([1]), target, teacher=as_head(teacher), vocab_size=4
    )
    assert float(got.stats["off_simplex_fraction"]) == 1


# ---- a teacher kept as its k likeliest tokens


@divergences(PRINTED)
def test_a_tail_is_one_outcome(divergence):
    """Value and gradient are those of k + 1 outcomes, the student's tail lumped into the last."""
    g = torch.Generator().manual_seed(3)
    z = torch.randn(6, 40, dtype=torch.float64, generator=g).requires_grad_()
    log_t = torch.randn(6, 40, dtype=torch.float64, generator=g).log_softmax(-1)
    kept = log_t.topk(4)
    log_tail = torch.log1p(-kept.values.exp().sum(-1))
    log_p = z.log_softmax(-1)
    outside = log_p.scatter(1, kept.indices, -math.inf).logsumexp(-1)
    lumped = torch.cat([log_p.gather(1, kept.indices), outside[:, None]], 1)
    other = torch.cat([kept.values, log_tail[:, None]], 1)
    value = divergence_from(other, lumped, divergence).sum()
    (gradient,) = torch.autograd.grad(value, z)
    leaf = z.detach().clone().requires_grad_()
    teacher = qt.TopK(kept.indices, kept.values, log_tail)
    target = qt.Target(0.0, [(1, qt.residual.teacher(), divergence)])
    labels = torch.arange(6)
    got = qt.linear_target_loss(leaf, torch.eye(40).double(), labels, target, teacher=teacher, reduction="sum").loss
    got.backward()
    assert abs(float(got - value)) <= 1e-12
    assert relative_error(leaf.grad, gradient) <= 1e-12
