"""Other models beside the student: heads of every kind, padded vocabularies, targets of one's own."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

import qtarget as qt
from engine_and_oracle import (
    N,
    V,
    assert_engine_is_oracle,
    assert_rows_agree,
    floor_of,
    hard_batch,
    ordinary_batch,
    preset_of,
    project_logits,
    randn,
    run_engine,
    with_columns,
)
from published import KINDS

pytestmark = pytest.mark.usefixtures("one_thread")

REAL = 59
every_case = pytest.mark.parametrize("case", KINDS, ids=lambda case: case.id)
BESIDE_ANOTHER = [case for case in KINDS if {"teacher_logits", "reference_logits"} & set(case.needs)]
beside_another = pytest.mark.parametrize("case", BESIDE_ANOTHER, ids=lambda case: case.id)


def with_heads(batch, rows=V, width=20, with_bias=False, seed=11, **options):
    """The batch with real heads for teacher and reference, and their logits for the oracle."""
    g = torch.Generator().manual_seed(seed)
    heads, dense = {}, {}
    for name in batch.dense:
        hidden, weight = randn(g, len(batch.labels), width), 0.5 * randn(g, rows, width)
        bias = 0.5 * randn(g, rows) if with_bias else None
        head = heads[name] = qt.Head(hidden, weight, bias, **options)
        logits = project_logits(hidden, weight, bias, head.logit_scale, head.logit_softcap)
        dense[name] = logits[:, : head.vocab_size]
    return replace(batch, heads=heads, dense=dense)


def padded(batch, real=REAL):
    """The last rows of the student's head are no tokens, though their logits are as large as any."""
    return with_columns(replace(batch, labels=batch.labels.clamp(max=real - 1), vocab_size=real))


# ---- what a head may be

HEADS = {
    "another width": {},
    "bias": {"with_bias": True},
    "scale": {"logit_scale": 0.6},
    "softcap": {"logit_softcap": 3.0},
    "bias, scale and softcap": {"with_bias": True, "logit_scale": 1.7, "logit_softcap": 5.0},
    "padded further than the student": {"rows": V + 13},
    "padded further, and saying so": {"rows": V + 13, "vocab_size": V},
}


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
@beside_another
def test_head(case, options):
    assert_engine_is_oracle(
        with_heads(ordinary_batch(softcap=30.0), **options), preset_of(case), chunk_rows=10, floor=floor_of(case)
    )


@beside_another
def test_head_of_few_units(case):
    """Narrower than the student, one unit."""
    assert_engine_is_oracle(with_heads(ordinary_batch(), width=1), preset_of(case), floor=floor_of(case))


@beside_another
def test_the_student_beside_its_own_head(case):
    """A reference that shares the student's weight learns nothing from the loss."""
    batch = ordinary_batch()
    frozen = {name: batch.hidden + 0.1 * batch.dense[name][:, :12] for name in batch.dense}
    batch = replace(batch, dense={name: hidden @ batch.weight.T for name, hidden in frozen.items()})
    weight = batch.weight.clone().requires_grad_()
    heads = {name: qt.Head(hidden.requires_grad_(), weight) for name, hidden in frozen.items()}
    assert_engine_is_oracle(replace(batch, heads=heads), preset_of(case), floor=floor_of(case))
    assert weight.grad is None and all(hidden.grad is None for hidden in frozen.values())


@pytest.mark.parametrize(
    "case", [c for c in BESIDE_ANOTHER if not preset_of(c).needs_full_support], ids=lambda case: case.id
)
def test_tokens_that_the_other_model_rules_out(case):
    """A bias of −inf: labels among them, and tokens the student likes."""
    batch = with_heads(ordinary_batch())
    bias = torch.zeros(V, dtype=torch.float64)
    bias[[2, 7, 11, int(batch.labels[0]), int(batch.labels[1])]] = -math.inf
    batch.dense = {name: logits + bias for name, logits in batch.dense.items()}
    batch.heads = {name: replace(head, bias=bias) for name, head in batch.heads.items()}
    assert_engine_is_oracle(batch, preset_of(case), floor=floor_of(case))


# ---- padded vocabularies


@pytest.mark.parametrize("make", [ordinary_batch, hard_batch], ids=["ordinary", "hard"])
@every_case
def test_padded_student(case, make):
    assert_engine_is_oracle(padded(make()), preset_of(case), chunk_rows=10, floor=floor_of(case))


PADDED = {
    "as the student": {"rows": V},
    "without padding": {"rows": REAL},
    "padded further": {"rows": V + 13},
    "padded further, and saying so": {"rows": V + 13, "vocab_size": REAL},
    "knows fewer tokens": {"rows": V, "vocab_size": REAL - 9},
}


@pytest.mark.parametrize("options", PADDED.values(), ids=PADDED)
@beside_another
def test_padded_student_beside_a_head(case, options):
    assert_engine_is_oracle(
        with_heads(padded(ordinary_batch()), **options), preset_of(case), chunk_rows=10, floor=floor_of(case)
    )


@beside_another
def test_head_with_fewer_rows_than_the_student(case):
    """The student's padding shows only in the teacher's width."""
    assert_engine_is_oracle(with_heads(ordinary_batch(), rows=REAL), preset_of(case), floor=floor_of(case))


@every_case
def test_vocab_size_of_all_rows_changes_nothing(case):
    batch = ordinary_batch()
    plain, said = (run_engine(replace(batch, vocab_size=size), preset_of(case)) for size in (None, V))
    assert torch.equal(plain.loss, said.loss)
    assert torch.equal(plain.gradients["weight"], said.gradients["weight"])


# ---- targets of one's own


@qt.trust.needs("teacher_log_p_y", "reference_log_p_y")
def teacher_beats_reference(stats):
    return (stats.teacher_log_p_y > stats.reference_log_p_y).to(stats.log_p_y.dtype)


@qt.trust.needs("entropy", "rest_mass", "top_k_entropy", "weight")
def all_sorts(stats):
    return (stats.entropy - stats.top_k_entropy(5)) * stats.rest_mass * stats.weight


def unlikely(stats):
    return -stats.log_p_y


@dataclass(frozen=True)
class Both(qt.trust.Rule):
    """Weights that are not γ and 1 − γ."""

    needs: ClassVar[frozenset[str]] = frozenset({"log_p_y", "teacher_log_p_y"})

    def weights(self, stats):
        return stats.teacher_log_p_y.exp(), stats.log_p_y.exp()


pool, residual, trust = qt.residual.pool, qt.residual, qt.trust
COMPOSED = {
    "entropy, tempered": qt.Target(trust.entropy(top_k=7), residual.tempered(2.0)),
    "half, uniform": qt.Target(0.5, residual.uniform(), value="ce"),
    "three models in one pool": qt.Target(trust.probability(), pool(student=0.3, teacher=0.4, reference=0.3)),
    "a pool that does not sum to 1": qt.Target(0.3, pool(student=0.9, teacher=0.7, reference=-0.2)),
    "away from the reference": qt.Target(trust.probability(), pool(teacher=1.5, reference=-0.5)),
    "two residuals": qt.Target(0.2, [(0.5, residual.teacher()), (0.5, residual.reference())]),
    "three residuals": qt.Target(
        trust.probability(),
        [(0.5, residual.teacher()), (-0.3, residual.uniform()), (0.8, residual.guided(0.4))],
    ),
    "a student among the residuals": qt.Target(0.1, [(0.7, residual.student()), (0.3, residual.teacher(2.0))]),
    "anchored, pushing away": qt.Target(trust.anchored(trust.entropy(5), -0.4), residual.reference()),
    "anchored on weights": qt.Target(trust.anchored(trust.trajectory_weight(), 0.3), residual.reference()),
    "scaled": qt.Target(trust.probability(), residual.guided(0.3), scale=trust.trajectory_weight()),
    "scaled by a number": qt.Target(trust.probability(), residual.teacher(), scale=2.5),
    "masked, the teacher elsewhere": qt.Target(trust.token_mask(), residual.teacher()),
    "sharpened with an offset beside another": qt.Target(
        0.4, [(1.0, residual.sharpened(0.8, h="logsigmoid")), (-1.0, residual.teacher(0.5))], value="ce"
    ),
    "rule on the other models": qt.Target(teacher_beats_reference, residual.teacher()),
    "rule on the other models alone": qt.Target(teacher_beats_reference),
    "rule on statistics": qt.Target(all_sorts, residual.guided(0.5)),
    "rule above 1": qt.Target(unlikely),
    "rule below 0": qt.Target(-0.5),
    "rule with two weights": qt.Target(Both(), residual.reference()),
}


@pytest.mark.parametrize("make", [ordinary_batch, hard_batch], ids=["ordinary", "hard"])
@pytest.mark.parametrize("target", COMPOSED.values(), ids=COMPOSED)
def test_composed_target(target, make):
    assert_engine_is_oracle(make(), target, chunk_rows=10)


@pytest.mark.parametrize("target", COMPOSED.values(), ids=COMPOSED)
def test_composed_target_with_padded_heads(target):
    batch = with_heads(padded(ordinary_batch()), rows=V + 5, vocab_size=REAL)
    assert_engine_is_oracle(batch, target, chunk_rows=10)


@pytest.mark.parametrize("target", COMPOSED.values(), ids=COMPOSED)
def test_composed_target_beside_a_head_with_fewer_tokens(target):
    batch = ordinary_batch()
    batch = with_columns(replace(batch, labels=batch.labels.clamp(max=REAL - 1)))
    assert_engine_is_oracle(with_heads(batch, rows=V + 5, vocab_size=REAL), target)


# ---- shapes


@pytest.mark.parametrize("shape", [(), (1,), (6,), (2, 3), (2, 1, 3), (6, 1)], ids=str)
@pytest.mark.parametrize("name", ["dft", "iw-sft", "target-sft", "kd"])
def test_any_leading_axes(name, shape):
    n = math.prod(shape)
    flat = ordinary_batch(n=n)
    target = qt.preset(name)

    def shaped(x):
        return x.reshape((*shape, *x.shape[1:]))

    batch = replace(
        flat,
        hidden=shaped(flat.hidden),
        labels=shaped(flat.labels),
        columns={key: shaped(column) for key, column in flat.columns.items()},
        dense={key: shaped(logits) for key, logits in flat.dense.items()},
    )
    got, expected = run_engine(batch, target, reduction="none"), run_engine(flat, target, reduction="none")
    assert got.loss.shape == shape
    assert all(statistic.shape == shape for statistic in got.stats.values())
    assert torch.equal(got.loss.flatten(), expected.loss)
    assert_rows_agree(got.gradients["hidden"].reshape(n, -1), expected.gradients["hidden"], "d_hidden", 1e-12, 0)


@pytest.mark.parametrize("shape", [(3,), (3, 1)], ids=["[rows]", "[rows, 1]"])
def test_one_weight_per_row(shape):
    batch = ordinary_batch(n=12)
    labels = batch.labels.reshape(3, 4)
    batch = replace(batch, hidden=batch.hidden.reshape(3, 4, -1), labels=labels)
    weight = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    one, all_ = (
        run_engine(replace(batch, columns={"weight": given}), qt.preset("iw-sft"))
        for given in (weight.reshape(shape), weight[:, None].expand(3, 4))
    )
    assert torch.equal(one.loss, all_.loss)
    assert torch.equal(one.gradients["hidden"], all_.gradients["hidden"])


def test_views_and_other_memory_layouts():
    batch = ordinary_batch()
    wide = torch.randn(N, 2 * 12, dtype=torch.float64)
    wide[:, ::2] = batch.hidden
    target = qt.preset("target-sft")
    expected = run_engine(batch, target)
    got = run_engine(replace(batch, hidden=wide[:, ::2], weight=batch.weight.T.contiguous().T), target)
    assert_rows_agree(got.gradients["weight"], expected.gradients["weight"], "d_weight", 1e-12, 1e-15)
