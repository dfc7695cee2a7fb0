"""z_loss, c · lse² on each supervised token, against autograd of the logits in float64."""

import logging
from dataclasses import replace

import pytest
import torch

import qtarget as qt
from engine_and_oracle import (
    N,
    Outcome,
    V,
    assert_same,
    hard_batch,
    ordinary_batch,
    project_logits,
    run_and_backward,
    run_engine,
    run_oracle,
    with_ignored_labels,
)
from qtarget.losses import engine

pytestmark = pytest.mark.usefixtures("one_thread")

C = 0.02
TARGETS = {
    "sft": qt.preset("sft"),
    "dft": qt.preset("dft"),
    "cft, some tokens without a gradient": qt.preset("cft"),
    "target-sft": qt.preset("target-sft"),
    "kd at T = 2": qt.preset("kd", temperature=2.0),
    "jsd": qt.preset("kd", divergence="jsd"),
    "two residuals": qt.Target(0.3, residual=[(0.4, qt.residual.teacher()), (0.3, qt.residual.uniform(), "jsd")]),
}
BATCHES = {
    "hard": hard_batch,
    "softcap, scale and bias": lambda: hard_batch(softcap=40.0, scale=1.3, with_bias=True),
    "padded head": lambda: ordinary_batch(vocab_size=V - 8),
    "some ignored": lambda: with_ignored_labels(hard_batch(), "some ignored"),
    "all ignored": lambda: with_ignored_labels(hard_batch(), "all ignored"),
}
every_target = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
every_batch = pytest.mark.parametrize("batch", BATCHES)


def by_autograd(batch, target, upstream=1.0, **options) -> Outcome:
    """The target's own loss and statistics from the oracle, and the term written out beside it."""

    def call(hidden, weight, bias):
        logits = project_logits(hidden, weight, bias, batch.scale, batch.softcap)
        out = qt.target_loss(logits, batch.labels, target, **batch.oracle_inputs(target), **options)
        term = C * logits.exp().sum(-1).log().square().masked_fill(batch.labels == -100, 0.0)
        if options["reduction"] != "none":
            count = options.get("num_items") or max(1, int((batch.labels != -100).sum()))
            term = term.sum() / (count if options["reduction"] == "mean" else 1)
        return replace(out, loss=out.loss + term)

    return run_and_backward(batch, call, upstream)


@every_batch
@every_target
def test_engine_and_oracle_add_its_value_and_gradient_and_no_statistic(target, batch):
    batch, options = BATCHES[batch](), {"reduction": "sum", "stats": "all"}
    expected = by_autograd(batch, target, **options)
    assert_same(run_oracle(batch, target, z_loss=C, **options), expected)
    for rows in (10, None):
        assert_same(run_engine(batch, target, z_loss=C, chunk_rows=rows, **options), expected)


@pytest.mark.parametrize("options", [{}, {"num_items": 37}], ids=["mean", "num_items"])
def test_it_is_divided_as_the_loss_is(options):
    batch = with_ignored_labels(ordinary_batch(), "some ignored")
    expected = by_autograd(batch, qt.preset("dft"), reduction="mean", **options)
    assert_same(run_engine(batch, qt.preset("dft"), z_loss=C, **options), expected)
    assert_same(run_oracle(batch, qt.preset("dft"), z_loss=C, **options), expected)


def test_it_is_part_of_each_tokens_loss():
    batch, upstream = hard_batch(), torch.linspace(-1, 2, N, dtype=torch.float64)
    expected = by_autograd(batch, qt.preset("cft"), upstream, reduction="none")
    assert_same(run_engine(batch, qt.preset("cft"), upstream, z_loss=C, reduction="none", chunk_rows=10), expected)


def test_another_backend_says_that_plain_pytorch_computes_it(caplog, monkeypatch):
    monkeypatch.setattr("qtarget.losses.engine.who._told", set())
    if engine.no_compiler(torch.device("cpu")):
        pytest.skip("no compiler")
    batch, options = ordinary_batch(), {"reduction": "sum", "stats": "all"}
    with caplog.at_level(logging.WARNING, logger="qtarget"):
        got = run_engine(batch, qt.preset("dft"), z_loss=C, backend="compiled", **options)
    assert caplog.messages == ["target dft has z_loss, so backend 'torch' is used for it"]
    assert_same(got, by_autograd(batch, qt.preset("dft"), **options))


@pytest.mark.parametrize("value", [-1e-4, float("inf"), "much"], ids=repr)
@pytest.mark.parametrize("run", [run_engine, run_oracle])
def test_a_wrong_number_is_refused(run, value):
    with pytest.raises(qt.ConfigError, match=r"z_loss is .*; use a"):
        run(ordinary_batch(), qt.preset("sft"), z_loss=value)
