"""A teacher or reference kept as its k likeliest tokens: the oracle gets the distribution that stands for."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import qtarget as qt
from engine_and_oracle import (
    PUSHED_UP,
    Batch,
    V,
    assert_engine_is_oracle,
    assert_rows_agree,
    assert_same,
    hard_batch,
    ordinary_batch,
    randn,
    relative_error,
    run_engine,
    run_oracle,
    with_columns,
    with_ignored_labels,
)
from published import DIVERGENCES
from qtarget.losses.engine import chunks
from qtarget.losses.engine.block import RowMath

pytestmark = pytest.mark.usefixtures("one_thread")

REAL = 59
TARGETS = {
    "kd": qt.preset("kd"),
    "kd at T = 2": qt.preset("kd", temperature=2.0),
    "kd-hybrid": qt.preset("kd-hybrid"),
    "target-sft, eta 0.3": qt.preset("target-sft", eta=0.3),
    "target-sft, eta 1": qt.preset("target-sft", eta=1.0),
    "target-sft, teacher at T = 2": qt.preset("target-sft", teacher_temperature=2.0),
    "sft-kl": qt.preset("sft-kl"),
    "asft": qt.preset("asft"),
    "two residuals": qt.Target(0.3, [(0.6, qt.residual.teacher()), (0.4, qt.residual.guided(0.2))]),
    **{f"kd by {divergence}": qt.preset("kd", divergence=divergence) for divergence in DIVERGENCES},
    "target-sft by jsd": qt.preset("target-sft", eta=0.3, divergence="jsd"),
    "two divergences": qt.Target(0.3, [(0.6, qt.residual.teacher(), "jsd"), (0.4, qt.residual.guided(0.2), "skew_kl")]),
    "two models in one pool": qt.Target(0.3, qt.residual.pool(teacher=0.7, reference=0.3)),
    "rule on the teacher": qt.Target(
        qt.trust.needs("teacher_log_p_y")(lambda stats: stats.teacher_log_p_y.exp()), qt.residual.teacher()
    ),
}
# On hard tokens a teacher is the student but for rounding, and then nobody can tell on which side of p a token is.
SMOOTH = {name: target for name, target in TARGETS.items() if name != "kd by total_variation"}
every_smooth_target = pytest.mark.parametrize("target", SMOOTH.values(), ids=SMOOTH)
every_target = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)


def documented(kept: qt.TopK, student: Tensor, real: int | None = None) -> Tensor:
    """log t [n, real]: as kept on the k; the rest of the mass ∝ p over the other real tokens, or evenly."""
    log_p = student[:, :real].log_softmax(-1)
    outside = torch.ones_like(log_p, dtype=torch.bool).scatter(1, kept.ids.long(), False)
    if kept.tail == "student":
        shape = log_p.masked_fill(~outside, -math.inf).log_softmax(-1)
    else:
        shape = -outside.sum(-1, keepdim=True).to(log_p.dtype).log().expand_as(log_p)
    log_tail = kept.tail_logprob
    if log_tail is None:
        log_tail = torch.log1p(-kept.logprobs.exp().sum(-1).clamp(max=1))
    return (log_tail[:, None] + shape).scatter(1, kept.ids.long(), kept.logprobs)


def keep(logits: Tensor, k: int, labels: Tensor, tail: str = "student", tail_given: bool = True) -> qt.TopK:
    """The k likeliest tokens; one row's label among them and the next row's not, where k allows."""
    wanted = logits.clone()
    rows = torch.arange(len(labels))
    wanted[rows[::2], labels[::2]] = math.inf
    wanted[rows[1::2], labels[1::2]] = -math.inf
    ids = wanted.topk(k, dim=-1).indices
    log_t = logits.log_softmax(-1)
    log_tail = log_t.scatter(1, ids, -math.inf).logsumexp(-1)
    return qt.TopK(ids, log_t.gather(1, ids), log_tail if tail_given else None, tail)


def with_topk(batch: Batch, k: int, names=("teacher", "reference"), **options) -> Batch:
    """The batch with the named models kept as top-k, and what that documents for the oracle."""
    labels = batch.labels.clamp(min=0)
    kept = {name: keep(batch.dense[name][:, : batch.vocab_size], k, labels, **options) for name in names}
    return documenting(batch, kept)


def documenting(batch: Batch, kept: dict[str, qt.TopK]) -> Batch:
    student = batch.logits()
    dense = {name: documented(topk, student, batch.vocab_size) for name, topk in kept.items()}
    heads = {name: qt.Head(logits, torch.eye(logits.shape[-1]).to(logits)) for name, logits in batch.dense.items()}
    return replace(batch, dense=batch.dense | dense, heads=heads | kept)


def padded(batch: Batch) -> Batch:
    return with_columns(replace(batch, labels=batch.labels.clamp(max=REAL - 1), vocab_size=REAL))


@pytest.mark.parametrize("vocab_size", [None, REAL], ids=["all rows", "padded"])
@pytest.mark.parametrize("tail_given", [False, True], ids=["tail from the k", "tail given"])
@pytest.mark.parametrize("tail", ["student", "even"])
@pytest.mark.parametrize("k", [1, 5, "all"])
@every_target
def test_topk(target, k, tail, tail_given, vocab_size):
    batch = ordinary_batch() if vocab_size is None else padded(ordinary_batch())
    k = (vocab_size or V) if k == "all" else k
    assert_engine_is_oracle(with_topk(batch, k, tail=tail, tail_given=tail_given), target, chunk_rows=10)


@pytest.mark.parametrize("tail", ["student", "even"])
@pytest.mark.parametrize("k", [1, 5])
@every_smooth_target
def test_topk_on_hard_tokens(target, k, tail):
    batch = with_topk(hard_batch(softcap=40.0, with_bias=True), k, tail=tail)
    assert_engine_is_oracle(batch, target, chunk_rows=10)


@every_target
def test_topk_with_ignored_labels(target):
    assert_engine_is_oracle(with_ignored_labels(with_topk(ordinary_batch(), 5), "some ignored"), target, chunk_rows=4)


def test_ids_at_ignored_positions_may_be_anything():
    """A cache holds supervised tokens only; what a collator writes elsewhere takes no part."""
    batch = with_ignored_labels(with_topk(ordinary_batch(), 5), "some ignored")
    ignored = batch.labels == -100
    kept = batch.heads["teacher"]
    rubbish = qt.TopK(
        kept.ids.masked_fill(ignored[:, None], -1),
        kept.logprobs.masked_fill(ignored[:, None], math.nan),
        kept.tail_logprob.masked_fill(ignored, math.nan),
    )
    target = qt.preset("target-sft")
    got = run_engine(replace(batch, heads={"teacher": rubbish}), target, stats="all")
    assert_same(got, run_oracle(batch, target, stats="all"))


@pytest.mark.parametrize("k", [5, V])
@every_target
def test_all_tokens_kept_is_the_dense_teacher(target, k):
    """With k = V nothing is lost; with k = 5 something is, which shows that this test can tell."""
    batch = ordinary_batch()
    dense, kept = run_engine(batch, target), run_engine(with_topk(batch, k), target)
    error = relative_error(kept.gradients["weight"], dense.gradients["weight"])
    assert error <= 1e-12 if k == V else error > 1e-4


@pytest.mark.parametrize("name", ["teacher", "reference"])
def test_topk_beside_a_dense_model(name):
    target = qt.Target(qt.trust.probability(), qt.residual.pool(student=0.2, teacher=0.5, reference=0.3))
    assert_engine_is_oracle(with_topk(ordinary_batch(), 5, names=[name]), target)


@pytest.mark.parametrize("tail", ["student", "even"])
@pytest.mark.parametrize("target", [target for target in TARGETS.values() if not target.needs_full_support], ids=str)
def test_nothing_outside_the_k(target, tail):
    """A teacher that rules out every other token, labels among them."""
    batch = with_topk(ordinary_batch(), 5, tail=tail)
    kept = {}
    ids = batch.heads["teacher"].ids  # for both, or a pool of the two would hold no token at all
    for name, topk in batch.heads.items():
        logprobs = topk.logprobs.log_softmax(-1)
        kept[name] = qt.TopK(ids, logprobs, torch.full_like(logprobs[:, 0], -math.inf), tail)
    assert_engine_is_oracle(documenting(replace(batch, heads=None), kept), target)


@every_target
def test_masses_that_do_not_sum_to_one_are_normalised(target):
    """Log-probabilities rounded to float16 on disk, and a tail that was rounded by itself."""
    batch = with_topk(ordinary_batch(), 5)
    kept = {}
    for name, topk in batch.heads.items():
        rounded = topk.logprobs.half().double()
        kept[name] = qt.TopK(topk.ids, rounded, topk.tail_logprob + 0.05)
    assert_engine_is_oracle(documenting(replace(batch, heads=None), kept), target)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=["int32 ids", "int64 ids"])
@every_target
def test_stored_as_in_a_cache(target, ids_dtype):
    batch = with_topk(ordinary_batch(), 5)
    stored, read = {}, {}
    for name, topk in batch.heads.items():
        half, half_tail = topk.logprobs.half(), topk.tail_logprob.half()
        stored[name] = qt.TopK(topk.ids.to(ids_dtype), half, half_tail)
        read[name] = qt.TopK(topk.ids, half.double(), half_tail.double())
    expected = documenting(replace(batch, heads=None), read)
    assert_engine_is_oracle(replace(expected, heads=stored), target)


# ---- a student that leaves next to nothing outside the k


def sure_student(mass: float, dtype: torch.dtype) -> tuple[Batch, Batch]:
    """A student with about ``mass`` outside the k, and a teacher with 0.3 there; also in float64."""
    batch = hard_batch()
    batch.hidden[:, 0] = -math.log(mass)
    labels = torch.full_like(batch.labels, PUSHED_UP)
    labels[1::2] = batch.labels[1::2]  # every other label is hopeless and outside the k
    batch = with_columns(replace(batch, labels=labels))
    g = torch.Generator().manual_seed(12)
    ids = torch.tensor([[PUSHED_UP, 0, 1, 2]]).repeat(len(labels), 1)
    logprobs = (0.7 * randn(g, len(labels), 4).softmax(-1)).log()
    tail = torch.full((len(labels),), math.log(0.3), dtype=torch.float64)
    low = batch.to(dtype)
    up = low.to(torch.float64)
    stored = qt.TopK(ids, logprobs.to(dtype), tail.to(dtype))
    read = qt.TopK(ids, stored.logprobs.double(), stored.tail_logprob.double())
    exact = documenting(up, {"teacher": read, "reference": read})
    return replace(low, heads={"teacher": stored, "reference": stored}), exact


@pytest.mark.parametrize("mass", [1e-6, 1e-12, 1e-20, 1e-28, 1e-33, 1e-45])
@every_target
def test_student_sure_of_the_k_in_double_precision(target, mass):
    _, batch = sure_student(mass, torch.float64)
    assert_engine_is_oracle(batch, target)


@pytest.mark.parametrize("mass", [1e-3, 1e-6, 1e-12, 1e-20, 1e-28, 1e-33, 1e-45])
@every_target
def test_student_sure_of_the_k_in_single_precision(target, mass):
    """Σ p outside the k goes from ordinary through tiny to zero in float32."""
    batch, exact = sure_student(mass, torch.float32)
    got, truth = run_engine(batch, target), run_oracle(exact, target)
    for name in ("hidden", "weight"):
        error = (got.gradients[name] - truth.gradients[name]).norm()
        assert error <= 1e-5 * truth.gradients[name].norm() + 1e-6, name  # the oracle has 1 − 1 where R is near p
    for what, mine, expected in (
        ("loss", got.loss, truth.loss),
        ("ce_q", got.stats["ce_q"], truth.stats["ce_q"]),
    ):
        # d reaches 75, whose rounding in float32 is 8e-6 of e^d
        assert_rows_agree(mine.reshape(-1), expected.reshape(-1), what, rtol=1.2e-5, floor=1e-5)


def test_padded_rows_that_outweigh_the_rest():
    """Probability on padded rows, next to nothing on real tokens outside the k."""
    batch, exact = sure_student(1e-20, torch.float32)
    batch.bias, exact.bias = (torch.zeros(V, dtype=x.weight.dtype) for x in (batch, exact))
    batch.bias[REAL:] = exact.bias[REAL:] = 40.0
    options = {"vocab_size": REAL, "labels": batch.labels.clamp(max=REAL - 1)}
    batch = replace(batch, **options)
    exact = replace(exact, **options, heads=None)
    stored = batch.heads["teacher"]
    read = qt.TopK(stored.ids, stored.logprobs.double(), stored.tail_logprob.double())
    exact = documenting(exact, {"teacher": read, "reference": read})
    for target in (qt.preset("kd"), qt.preset("sft-kl"), qt.preset("target-sft")):
        got, truth = run_engine(batch, target), run_oracle(exact, target)
        assert relative_error(got.gradients["weight"], truth.gradients["weight"]) <= 1e-5


# ---- the cheap way is taken where it may be

CHEAP = [
    "kd",
    "kd by reverse_kl",
    "target-sft by jsd",
    "kd-hybrid",
    "target-sft, eta 0.3",
    "target-sft, eta 1",
    "sft-kl",
    "asft",
]


@pytest.mark.parametrize("tail", ["student", "even"])
@pytest.mark.parametrize("name", [*CHEAP, "kd at T = 2"])
def test_a_tail_in_the_student_s_shape_needs_no_dense_row(name, tail, monkeypatch):
    def refuse(*_):
        raise AssertionError("a dense row was formed")

    monkeypatch.setattr(RowMath, "_dense", refuse)
    batch = with_topk(ordinary_batch(), 5, tail=tail)
    if name in CHEAP and tail == "student":
        run_engine(batch, TARGETS[name])
    else:
        with pytest.raises(AssertionError, match="dense row"):
            run_engine(batch, TARGETS[name])


@every_smooth_target
def test_cheap_and_dense_rows_agree_in_one_batch(target, monkeypatch):
    """Blocks of one row: each takes its own way."""
    monkeypatch.setattr(chunks, "block_rows", lambda *_: 1)
    assert_engine_is_oracle(with_topk(hard_batch(), 5), target)
