"""The engine in an autograd graph: reductions, frozen parts, empty batches, repeated and skipped work."""

from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import qtarget as qt
from engine_and_oracle import (
    N,
    assert_engine_is_oracle,
    assert_rows_agree,
    assert_same,
    case_named,
    floor_of,
    hard_batch,
    ordinary_batch,
    preset_of,
    run_engine,
    run_oracle,
    with_columns,
    with_ignored_labels,
)
from published import CASES, KINDS
from qtarget.losses.engine import chunks

pytestmark = pytest.mark.usefixtures("one_thread")

every_case = pytest.mark.parametrize("case", KINDS, ids=lambda case: case.id)
some_presets = pytest.mark.parametrize("name", ["sft", "dft", "iw-sft", "profit", "sft-kl", "gem", "kd", "target-sft"])
UNEQUAL = torch.linspace(-1, 2, N, dtype=torch.float64)
UNEQUAL[[4, 11]] = 0


# ---- reductions


@pytest.mark.parametrize("share", ["none ignored", "some ignored"])
@every_case
def test_unreduced_loss_under_unequal_weights(case, share):
    """Backward runs the chunks once more, each token under its own upstream gradient."""
    batch = with_ignored_labels(hard_batch(softcap=40.0, with_bias=True), share)
    got, expected = (
        run(batch, preset_of(case), upstream=UNEQUAL, reduction="none", stats="all", **options)
        for run, options in ((run_engine, {"chunk_rows": 10}), (run_oracle, {}))
    )
    assert_same(got, expected, floor=floor_of(case))
    assert (got.loss[batch.labels == -100] == 0).all()


@every_case
def test_mean_divides_by_supervised_labels(case):
    batch = with_ignored_labels(ordinary_batch(), "some ignored")
    assert_same(run_engine(batch, preset_of(case)), run_oracle(batch, preset_of(case), reduction="mean"))


@pytest.mark.parametrize("num_items", [37, 37.0, torch.tensor(37), torch.tensor(37.0)], ids=repr)
@some_presets
def test_mean_divides_by_num_items_where_given(name, num_items):
    batch = with_ignored_labels(ordinary_batch(), "some ignored")
    got = run_engine(batch, qt.preset(name), num_items=num_items)
    assert_same(got, run_oracle(batch, qt.preset(name), num_items=num_items))
    total = run_oracle(batch, qt.preset(name), reduction="sum")
    assert_rows_agree(37 * got.gradients["hidden"], total.gradients["hidden"], "d_hidden", 1e-12, 1e-15)


@pytest.mark.parametrize("num_items", [0, torch.tensor(0)], ids=repr)
def test_num_items_of_nothing_is_one(num_items):
    batch = with_ignored_labels(ordinary_batch(), "all ignored")
    assert float(run_engine(batch, qt.preset("dft"), num_items=num_items).loss) == 0


@some_presets
def test_num_items_does_not_touch_sums(name):
    batch = ordinary_batch()
    for reduction in ("sum", "none"):
        plain, given = (run_engine(batch, qt.preset(name), reduction=reduction, num_items=n) for n in (None, 37))
        assert torch.equal(plain.loss, given.loss)


def test_weights_never_enter_the_denominator():
    batch = ordinary_batch()
    doubled = replace(batch, columns=batch.columns | {"weight": 2 * batch.columns["weight"]})
    one, two = (run_engine(b, qt.preset("iw-sft")) for b in (batch, doubled))
    assert_rows_agree(two.gradients["weight"], 2 * one.gradients["weight"], "d_weight", 1e-12, 1e-15)


# ---- what comes from above, and several calls


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@some_presets
def test_upstream_gradient_of_a_scalar(name, reduction):
    batch = ordinary_batch(with_bias=True)
    upstream = torch.tensor(-3.5, dtype=torch.float64)
    target = qt.preset(name)
    assert_same(
        run_engine(batch, target, upstream=upstream, reduction=reduction),
        run_oracle(batch, target, upstream=upstream, reduction=reduction),
    )


@pytest.mark.parametrize("reduction", ["sum", "none"])
@some_presets
def test_gradients_of_two_calls_add_up(name, reduction):
    batch, target = ordinary_batch(with_bias=True), qt.preset(name)
    whole = run_engine(batch, target, reduction="sum")
    leaves = [x.clone().requires_grad_() for x in (batch.hidden, batch.weight, batch.bias)]
    for rows in (slice(0, 12), slice(12, N)):
        part = replace(
            batch,
            hidden=batch.hidden[rows],
            labels=batch.labels[rows],
            columns={key: column[rows] for key, column in batch.columns.items()},
            dense={key: logits[rows] for key, logits in batch.dense.items()},
        )
        inputs = part.engine_inputs(target)
        out = qt.linear_target_loss(
            leaves[0][rows],
            leaves[1],
            part.labels,
            target,
            head_bias=leaves[2],
            reduction=reduction,
            **inputs,
        )
        out.loss.sum().backward()
    for leaf, (key, gradient) in zip(leaves, whole.gradients.items(), strict=True):
        assert_rows_agree(leaf.grad, gradient, f"d_{key}", 1e-12, 1e-14)


def test_two_objectives_on_one_graph():
    batch = ordinary_batch()
    hidden = batch.hidden.clone().requires_grad_()
    losses = [
        qt.linear_target_loss(
            hidden, batch.weight, batch.labels, qt.preset(name), **batch.engine_inputs(qt.preset(name))
        )
        for name in ("dft", "kd")
    ]
    (losses[0].loss + 2 * losses[1].loss).backward()
    dft, kd = (run_engine(batch, qt.preset(name)).gradients["hidden"] for name in ("dft", "kd"))
    assert_rows_agree(hidden.grad, dft + 2 * kd, "d_hidden", 1e-12, 1e-15)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@some_presets
def test_inside_activation_checkpointing(name, reduction):
    batch, target = ordinary_batch(), qt.preset(name)
    hidden, weight = batch.hidden.clone().requires_grad_(), batch.weight.clone().requires_grad_()

    def call(states):
        inputs = batch.engine_inputs(target)
        return qt.linear_target_loss(states, weight, batch.labels, target, reduction=reduction, **inputs).loss

    checkpoint(call, hidden, use_reentrant=False).sum().backward()
    expected = run_engine(batch, target, reduction=reduction)
    assert torch.equal(hidden.grad, expected.gradients["hidden"])
    assert torch.equal(weight.grad, expected.gradients["weight"])


# ---- what is not asked for is not done


def call_with(batch, target, wanted, **options):
    leaves = {"hidden": batch.hidden, "weight": batch.weight, "bias": batch.bias}
    leaves = {name: leaf.clone().requires_grad_(name in wanted) for name, leaf in leaves.items()}
    inputs = batch.engine_inputs(target)
    out = qt.linear_target_loss(
        leaves["hidden"],
        leaves["weight"],
        batch.labels,
        target,
        head_bias=leaves["bias"],
        **inputs,
        **options,
    )
    return out, leaves


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "wanted", [("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ("weight", "bias")], ids="+".join
)
@some_presets
def test_frozen_parts(name, wanted, reduction, monkeypatch):
    """A gradient that nobody asked for is not formed, and the others are what they were."""
    batch, target = ordinary_batch(with_bias=True), qt.preset(name)
    full = run_engine(batch, target, reduction=reduction)
    formed = []
    run = chunks.run
    monkeypatch.setattr(chunks, "run", lambda *args, **kwargs: formed.append(run(*args, **kwargs)) or formed[-1])
    out, leaves = call_with(batch, target, wanted, reduction=reduction)
    gradients = {"hidden": formed[-1].d_hidden, "weight": formed[-1].d_weight, "bias": formed[-1].d_bias}
    out.loss.sum().backward()
    if reduction == "mean":
        assert {key for key, gradient in gradients.items() if gradient is not None} == set(wanted)
    for key, leaf in leaves.items():
        if key in wanted:
            assert_rows_agree(leaf.grad, full.gradients[key], f"d_{key}", 1e-12, 1e-15)
        else:
            assert leaf.grad is None


def refuse(*_):
    raise AssertionError("a gradient was worked on")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@every_case
def test_evaluation_does_no_gradient_work(case, guard, reduction, monkeypatch):
    batch, target = hard_batch(softcap=40.0, with_bias=True), preset_of(case)
    expected = run_engine(batch, target, reduction=reduction, stats="all")
    monkeypatch.setattr(chunks._Run, "_multiply", refuse)
    with guard():
        out, _ = call_with(batch, target, ("hidden", "weight", "bias"), reduction=reduction, stats="all")
    assert not out.loss.requires_grad
    assert torch.equal(out.loss, expected.loss)
    for name, statistic in expected.stats.items():
        assert_rows_agree(out.stats[name], statistic, name, rtol=1e-12, floor=1e-13)


@some_presets
def test_nothing_to_train_does_no_gradient_work(name, monkeypatch):
    monkeypatch.setattr(chunks._Run, "_multiply", refuse)
    out, _ = call_with(ordinary_batch(with_bias=True), qt.preset(name), ())
    assert not out.loss.requires_grad


def test_the_proof_that_gradient_work_is_noticed(monkeypatch):
    monkeypatch.setattr(chunks._Run, "_multiply", refuse)
    with pytest.raises(AssertionError, match="worked on"):
        call_with(ordinary_batch(with_bias=True), qt.preset("dft"), ("hidden",))


@every_case
def test_statistics_have_no_graph(case):
    out, _ = call_with(ordinary_batch(with_bias=True), preset_of(case), ("hidden", "weight"), stats="all")
    assert not any(statistic.requires_grad for statistic in out.stats.values())


# ---- nothing supervised


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@every_case
def test_nothing_supervised_is_a_connected_zero(case, reduction):
    """Zeros of the right shapes, so that the other ranks of a distributed run are not left waiting."""
    batch = with_ignored_labels(ordinary_batch(with_bias=True), "all ignored")
    out, leaves = call_with(batch, preset_of(case), ("hidden", "weight", "bias"), reduction=reduction)
    assert (out.loss == 0).all() and out.loss.requires_grad
    out.loss.sum().backward()
    for name, leaf in leaves.items():
        assert leaf.grad.shape == leaf.shape, name
        assert (leaf.grad == 0).all(), name


@pytest.mark.parametrize("name", ["sft", "target-sft", "kd"])
def test_no_positions_at_all(name):
    batch = ordinary_batch()
    batch = replace(
        batch,
        hidden=batch.hidden[:0],
        labels=batch.labels[:0],
        columns={},
        dense={key: logits[:0] for key, logits in batch.dense.items()},
    )
    got = run_engine(batch, qt.preset(name))
    assert float(got.loss) == 0
    assert (got.gradients["weight"] == 0).all()


@every_case
def test_ignored_positions_may_hold_anything(case):
    batch = with_ignored_labels(hard_batch(), "some ignored")
    expected = run_engine(batch, preset_of(case), stats="all")
    ignored = batch.labels == -100
    spoilt = replace(
        batch,
        hidden=batch.hidden.masked_fill(ignored[:, None], float("nan")),
        dense={name: z.masked_fill(ignored[:, None], float("nan")) for name, z in batch.dense.items()},
    )
    assert_same(run_engine(spoilt, preset_of(case), stats="all"), expected, rtol=0, floor=0)


def test_another_ignore_index():
    batch = with_ignored_labels(ordinary_batch(), "some ignored")
    target = qt.preset("target-sft")
    other = replace(batch, labels=batch.labels.masked_fill(batch.labels == -100, -1))
    assert_same(run_engine(other, target, ignore_index=-1), run_engine(batch, target), rtol=0, floor=0)


# ---- once is enough


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_second_backward_says_what_to_do(reduction):
    out, _ = call_with(ordinary_batch(with_bias=True), qt.preset("dft"), ("hidden", "weight"), reduction=reduction)
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"backward ran a second time.*call the loss again.*reduction=\"none\""):
        out.loss.backward(retain_graph=True)


@some_presets
def test_a_second_backward_of_the_unreduced_loss_is_the_first_again(name):
    out, leaves = call_with(ordinary_batch(with_bias=True), qt.preset(name), ("hidden", "weight"), reduction="none")
    out.loss.sum().backward(retain_graph=True)
    first = leaves["weight"].grad.clone()
    out.loss.sum().backward()
    assert_rows_agree(leaves["weight"].grad, 2 * first, "d_weight", 1e-12, 1e-15)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_are_refused(reduction):
    out, leaves = call_with(ordinary_batch(with_bias=True), qt.preset("dft"), ("hidden",), reduction=reduction)
    with pytest.raises(RuntimeError, match=r"no second derivatives.*without create_graph=True"):
        torch.autograd.grad(out.loss.sum(), leaves["hidden"], create_graph=True)


def test_weights_changed_before_an_unreduced_backward_are_noticed():
    out, leaves = call_with(ordinary_batch(with_bias=True), qt.preset("dft"), ("hidden", "weight"), reduction="none")
    with torch.no_grad():
        leaves["weight"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.sum().backward()


# ---- rows without a gradient

DROPPING = [case for case in CASES if case.preset in ("profit", "cft", "iw-sft", "psft")]


@pytest.fixture
def rows_multiplied(monkeypatch):
    """How many rows each call of the backward matmuls was given."""
    seen = []
    real = chunks._Run._multiply

    def spy(self, g, numbers):
        if len(numbers):
            seen.append(len(numbers))
        real(self, g, numbers)

    monkeypatch.setattr(chunks._Run, "_multiply", spy)
    return seen


@pytest.mark.parametrize("block", [2, 4, None], ids=["blocks of 2", "blocks of 4", "one block"])
@pytest.mark.parametrize("share", ["none ignored", "some ignored"])
@pytest.mark.parametrize("case", DROPPING, ids=lambda case: case.id)
def test_rows_without_a_gradient_are_skipped(case, share, block, rows_multiplied, monkeypatch):
    if block is not None:
        monkeypatch.setattr(chunks, "block_rows", lambda *_: block)
    batch = with_ignored_labels(hard_batch(softcap=40.0), share)
    assert_engine_is_oracle(batch, preset_of(case), chunk_rows=10, floor=floor_of(case))
    trust = run_oracle(batch, preset_of(case)).stats["trust"]
    kept, supervised = int((trust.nan_to_num() != 0).sum()), int((~trust.isnan()).sum())
    assert sum(rows_multiplied) == kept < supervised


@pytest.mark.parametrize("case", DROPPING, ids=lambda case: case.id)
def test_rows_without_a_gradient_are_skipped_in_the_unreduced_loss(case, rows_multiplied):
    batch = hard_batch()
    got = run_engine(batch, preset_of(case), upstream=UNEQUAL, reduction="none", chunk_rows=10)
    assert_same(got, run_oracle(batch, preset_of(case), upstream=UNEQUAL, reduction="none"))
    assert sum(rows_multiplied) == int((got.stats["trust"] != 0).sum()) < N


@pytest.mark.parametrize("value, calls", [(0.0, 0), (1.0, 3)])
def test_chunks_without_a_gradient_multiply_nothing(value, calls, rows_multiplied):
    batch = replace(ordinary_batch(), columns={"weight": torch.full((N,), value)})
    got = run_engine(batch, qt.preset("iw-sft"), chunk_rows=10)
    assert len(rows_multiplied) == calls
    assert bool((got.gradients["weight"] == 0).all()) == (value == 0)


def test_a_rule_of_one_s_own_may_drop_rows(rows_multiplied):
    target = qt.Target(lambda stats: (stats.log_p_y > -3).to(stats.log_p_y.dtype))
    assert_engine_is_oracle(ordinary_batch(), target, chunk_rows=10)
    assert 0 < sum(rows_multiplied) < N


def test_rows_that_the_residual_still_pulls_are_kept(rows_multiplied):
    """A masked label with a teacher: where a = 0, b = 1."""
    assert_engine_is_oracle(ordinary_batch(), qt.Target(qt.trust.token_mask(), qt.residual.teacher()), chunk_rows=10)
    assert sum(rows_multiplied) == N


def test_the_skipping_batch_has_rows_of_both_kinds():
    trust = run_engine(with_columns(hard_batch()), preset_of(case_named("psft"))).stats["trust"]
    assert 0 < int((trust == 0).sum()) < N


def test_kept_rows_of_several_chunks_are_multiplied_together(rows_multiplied):
    """A fifth of the tokens kept: products of a chunk's size, not of a fifth of it."""
    batch = ordinary_batch(n=300)
    batch.columns["critical"] = torch.arange(300) % 5 == 0
    assert_engine_is_oracle(batch, qt.preset("cft"), chunk_rows=30)
    assert sum(rows_multiplied) == 60 and len(rows_multiplied) <= 4
