"""The pure row functions against the oracle, as they are and through inductor."""

import functools
import logging
from dataclasses import replace

import pytest
import torch
from test_engine_precision import assert_no_worse_than_full_logits, single
from test_engine_topk import padded, with_topk

import qtarget as qt
from engine_and_oracle import (
    FLOOR,
    assert_same,
    floor_of,
    hard_batch,
    preset_of,
    run_engine,
    run_oracle,
    with_ignored_labels,
)
from published import KINDS
from qtarget.losses.engine import who
from qtarget.losses.engine.device import passes, row_functions

pytestmark = pytest.mark.usefixtures("one_thread")
every_case = pytest.mark.parametrize("case", KINDS, ids=lambda case: case.id)


@pytest.fixture
def as_they_are(monkeypatch):
    monkeypatch.setattr(who, "FunctionPasses", lambda: passes.FunctionPasses(compiled=False))


def assert_functions_are_the_oracle(batch, target, floor=FLOOR, **options):
    got = run_engine(batch, target, stats="all", reduction="sum", backend="compiled", **options)
    assert_same(got, run_oracle(batch, target, stats="all", reduction="sum"), floor=floor)


@pytest.mark.parametrize("chunk", [10, None])
@pytest.mark.parametrize("vocab_size, softcap", [(None, None), (61, 40.0)], ids=["plain", "padded and capped"])
@every_case
def test_every_preset_and_option(case, vocab_size, softcap, chunk, as_they_are):
    batch = with_ignored_labels(hard_batch(with_bias=True, softcap=softcap, vocab_size=vocab_size), "some ignored")
    if vocab_size:
        batch = replace(batch, labels=batch.labels.clamp(max=vocab_size - 1))
    assert_functions_are_the_oracle(batch, preset_of(case), floor_of(case), chunk_rows=chunk)


@pytest.mark.parametrize("tail", ["student", "even"])
@pytest.mark.parametrize("name", ["kd", "target-sft", "asft"])
def test_top_k(name, tail, as_they_are):
    assert_functions_are_the_oracle(with_topk(padded(hard_batch()), 5, tail=tail), qt.preset(name), chunk_rows=10)


@pytest.mark.parametrize("name", ["realistic", "hard"])
@every_case
def test_single_precision_is_no_worse_than_full_logits(case, name, as_they_are):
    batch, exact = single(name)
    assert_no_worse_than_full_logits(batch, exact, preset_of(case), backend="compiled")


# ---- through inductor


@pytest.mark.parametrize(
    "target",
    [
        qt.preset("target-sft"),
        qt.preset("kd", divergence="jsd"),
        pytest.param(qt.preset("dft"), marks=pytest.mark.full),
        pytest.param(qt.preset("kd", temperature=2.0), marks=pytest.mark.full),
    ],
    ids=str,
)
def test_compiled(target):
    batch, exact = single("hard")
    for rows in (10, None):  # another number of rows is no other graph
        assert_no_worse_than_full_logits(batch, exact, target, backend="compiled", chunk_rows=rows)


def test_another_coefficient_is_no_other_graph():
    """eta moves on a schedule: nothing is compiled again."""
    batch, exact = single("ordinary")
    options = {"backend": "compiled", "reduction": "sum"}
    run_engine(batch, qt.preset("target-sft", eta=0.4), **options)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for eta in (0.41, 0.6, 0.9):
        assert_no_worse_than_full_logits(batch, exact, qt.preset("target-sft", eta=eta), backend="compiled")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


def test_what_inductor_refuses_falls_back_once(monkeypatch, caplog):
    from torch._dynamo.exc import TorchDynamoException

    def refuses(*arguments):
        raise TorchDynamoException("planted")

    monkeypatch.setattr(row_functions, "compiled", functools.partial(lambda name: refuses))
    monkeypatch.setattr(who, "_told", set())
    batch, target = hard_batch(), qt.preset("target-sft")
    with caplog.at_level(logging.WARNING, "qtarget"):
        for _ in range(2):
            got = run_engine(batch, target, reduction="sum", backend="compiled", chunk_rows=10)
    assert_same(got, run_oracle(batch, target, reduction="sum"))
    (line,) = [record.getMessage() for record in caplog.records]
    assert "backend 'compiled' cannot be compiled here, so 'torch' is used: TorchDynamoException" in line
