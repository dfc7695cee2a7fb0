"""What the engine allocates, and how it cuts its work."""

import inspect
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import qtarget as qt
from engine_and_oracle import assert_same, ordinary_batch, project_logits, run_engine, run_oracle
from qtarget.losses.engine import buffers, matmuls, sizes
from qtarget.losses.engine.buffers import Scratch
from qtarget.losses.engine.matmuls import HeadMatmuls
from qtarget.losses.engine.sizes import block_rows, chunk_rows

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS, VOCAB, WIDTH = 512, 5000, 32
KEEPING = buffers.workspace
CPU, GPU = torch.device("cpu"), torch.device("cuda")
RULES = ["dft", "eaft", "label-smoothing", "gem", "kd", "kd at T = 2", "target-sft", "asft"]
TARGETS = {name: qt.preset(name) for name in RULES if name != "kd at T = 2"} | {
    "kd at T = 2": qt.preset("kd", temperature=2.0)
}


@pytest.fixture(autouse=True)
def nothing_kept_from_earlier_calls(monkeypatch):
    """On a CPU the buffers of a call serve the next one, which would then allocate less than it needs."""
    monkeypatch.setattr(buffers, "workspace", Scratch)


class LargestTensor(TorchDispatchMode):
    """The largest number of elements any operation allocated while it is on; views cost nothing."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        inputs = {memory_of(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor) and memory_of(x) not in inputs]
        self.elements = max([self.elements, *(x.numel() for x in made)])
        return result


def memory_of(x):
    return x.untyped_storage().data_ptr()


def problem():
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=g, requires_grad=True)
    weight = (torch.randn(VOCAB, WIDTH, generator=g) / 6).requires_grad_()
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=g)
    head = qt.Head(torch.randn(TOKENS, WIDTH, generator=g), torch.randn(VOCAB, WIDTH, generator=g) / 6)
    scores = project_logits(head.hidden, head.weight, None).log_softmax(-1).topk(8)
    return hidden, weight, labels, {"head": head, "top-k": qt.TopK(scores.indices, scores.values)}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("other", ["head", "top-k"])
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_no_tensor_of_tokens_times_vocabulary(target, other, reduction):
    hidden, weight, labels, others = problem()
    inputs = {name: others[other] for name in target.requires}
    with LargestTensor() as largest:
        out = qt.linear_target_loss(
            hidden, weight, labels, target, chunk_rows=64, stats="all", reduction=reduction, **inputs
        )
        out.loss.sum().backward()
    assert 0 < largest.elements < TOKENS * VOCAB / 4
    assert weight.grad is not None


def test_full_logits_are_noticed():
    hidden, weight, labels, _ = problem()
    with LargestTensor() as largest:
        qt.target_loss(hidden @ weight.T, labels, qt.preset("dft")).loss.backward()
    assert largest.elements >= TOKENS * VOCAB


def test_a_top_k_teacher_costs_no_second_buffer_of_logits():
    hidden, weight, labels, others = problem()
    with LargestTensor() as largest:
        qt.linear_target_loss(hidden, weight, labels, qt.preset("kd"), chunk_rows=16, teacher=others["top-k"])
    assert largest.elements == VOCAB * WIDTH  # dW; the chunks are smaller


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_half_precision_head_is_cast_up_in_tiles(dtype, monkeypatch):
    monkeypatch.setattr(matmuls, "_CAST_ROWS", 500)
    hidden, weight, labels, _ = problem()
    low = weight.detach().to(dtype)  # frozen, so that dW does not hide the tiles
    with LargestTensor() as largest:
        qt.linear_target_loss(hidden, low, labels, qt.preset("dft"), chunk_rows=8).loss.backward()
    assert largest.elements <= VOCAB * WIDTH / 2


# ---- the rule that picks a chunk


@pytest.mark.parametrize(
    "tokens, vocab, buffers, itemsize, device, rows",
    [
        (2048, 49152, 1, 4, CPU, 683),
        (2048, 49152, 2, 4, CPU, 683),
        (769, 49152, 1, 4, CPU, 385),  # equal chunks, not 768 and 1
        (1600, 49152, 1, 4, CPU, 534),
        (100, 49152, 1, 4, CPU, 100),
        (1, 49152, 1, 4, CPU, 1),
        (0, 49152, 1, 4, CPU, 1),
        (1 << 20, 174762, 1, 4, CPU, 768),  # 512 MiB, just within the budget
        (1 << 20, 174763, 1, 4, CPU, 384),  # past it: half as many
        (1 << 20, 262144, 1, 8, CPU, 192),
        (1 << 20, 262144, 2, 4, CPU, 192),
        (4096, 262144, 4, 4, CPU, 128),
        (4096, 262144, 64, 4, CPU, 128),  # never fewer
        (1 << 20, 49152, 1, 4, GPU, 2048),
        (1 << 20, 152064, 2, 4, GPU, 1024),
        (1 << 20, 262144, 64, 4, GPU, 512),
    ],
)
def test_chunk_rule(tokens, vocab, buffers, itemsize, device, rows):
    assert chunk_rows(tokens, vocab, buffers, itemsize, device) == rows


@pytest.mark.parametrize("tokens", [1, 7, 512, 513, 1000, 2047, 12345])
def test_chunks_are_equal_and_cover_every_token(tokens):
    rows = chunk_rows(tokens, 49152, 1, 4, CPU)
    chunks = -(-tokens // rows)
    assert chunks == -(-tokens // 768)
    assert chunks * rows - tokens < chunks  # the last one is short by less than one row for each of the others


def test_more_memory_than_the_budget_is_said(caplog):
    with caplog.at_level(logging.WARNING, logger="qtarget"):
        chunk_rows(4096, 262144, 2, 4, CPU)
        assert not caplog.records
        chunk_rows(4096, 262144, 8, 4, CPU)
    (record,) = caplog.records
    assert "vocabulary of 262144 needs 1024 MB of logits buffers even at 128 rows a chunk" in record.getMessage()


def test_chunk_rule_knows_no_width():
    """Tokens times width over vocabulary gives a few rows for a small model with a large vocabulary."""
    assert list(inspect.signature(chunk_rows).parameters) == [
        "tokens",
        "vocab",
        "models",
        "itemsize",
        "device",
    ]


def sizes_of_chunks(monkeypatch, batch, **options):
    seen = []
    real = HeadMatmuls.logits
    monkeypatch.setattr(HeadMatmuls, "logits", lambda self, h, out: (seen.append(len(h)), real(self, h, out))[1])
    run_engine(batch, qt.preset("dft"), **options)
    return seen


@pytest.mark.parametrize("width", [2, 64])
def test_chunks_do_not_depend_on_the_width(width, monkeypatch):
    monkeypatch.setattr(sizes, "_ENOUGH_ROWS", 12)
    assert sizes_of_chunks(monkeypatch, ordinary_batch(d=width)) == [10, 10, 9]


def test_chunk_rows_wins_over_the_rule(monkeypatch):
    assert sizes_of_chunks(monkeypatch, ordinary_batch(), chunk_rows=12) == [12, 12, 5]


@pytest.mark.parametrize("rows, vocab", [(1, 10), (512, 49152), (512, 10), (4, 10**9)])
def test_blocks_fit_the_scratch_or_are_one_row(rows, vocab):
    block = block_rows(rows, vocab, 4, CPU)
    assert 1 <= block <= rows
    assert block == 1 or block * vocab * 4 <= sizes._SCRATCH_BYTES


# ---- buffers that are kept from call to call


@pytest.fixture
def empty_workspace(monkeypatch):
    """The library's own, as in a fresh process."""
    monkeypatch.setattr(buffers, "workspace", KEEPING)
    monkeypatch.setattr(buffers, "_kept", threading.local())


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_kept_buffers_leave_no_trace(target, empty_workspace):
    """After a larger call, an evaluation and one that stopped at NaN, in any order of sizes."""
    batch = ordinary_batch()
    expected = run_engine(batch, target, stats="all", chunk_rows=10)
    run_engine(ordinary_batch(n=40, v=90), target)
    spoilt = batch.hidden.clone()
    spoilt[13] = float("nan")
    with pytest.raises(qt.ConfigError, match="NaN or infinite at row 13"):
        run_engine(replace(batch, hidden=spoilt), target)
    assert_same(run_engine(batch, target, stats="all", chunk_rows=10), expected, rtol=0, floor=0)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_an_evaluation_first(guard, empty_workspace):
    batch, target = ordinary_batch(), qt.preset("target-sft")
    with guard():
        qt.linear_target_loss(batch.hidden, batch.weight, batch.labels, target, **batch.engine_inputs(target))
    assert_same(run_engine(batch, target), run_oracle(batch, target))


def test_threads_do_not_share_buffers(empty_workspace):
    """Models on several threads of one process, as torch.nn.DataParallel runs them."""
    batches = [ordinary_batch(n=64, v=300, seed=seed) for seed in range(4)]
    target = qt.preset("target-sft")
    expected = [run_engine(batch, target, chunk_rows=4) for batch in batches]
    with ThreadPoolExecutor(len(batches)) as pool:
        got = list(pool.map(lambda batch: run_engine(batch, target, chunk_rows=4), batches * 4))
    for mine, truth in zip(got, expected * 4, strict=True):
        assert_same(mine, truth, rtol=1e-12, floor=1e-14)
