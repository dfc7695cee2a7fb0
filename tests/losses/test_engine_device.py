"""What the engine does on a device, seen on a CPU: host reads, dtypes of products, bytes, memory, places of tensors."""

import importlib.util
from dataclasses import replace

import pytest
import torch
from test_engine_memory import LargestTensor
from test_token_statistics import EVERYTHING
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import qtarget as qt
from engine_and_oracle import Batch, ordinary_batch, randn, relative_error, run_engine, run_oracle, with_columns

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs the package triton", allow_module_level=True)

from roofline import BYTES, SMALL, STUDENT

from device_path import Watch, as_on_a_device
from qtarget.losses.engine import buffers, matmuls, sizes
from qtarget.losses.engine.buffers import Places, Rows, Scratch, TopKRows, padded_rows
from qtarget.losses.engine.device.device_rows import DeviceRows
from qtarget.losses.engine.device.row_plan import FOUND, TABLE, RowPlan

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("one_thread")]

N, V, D = 24, 256, 16
# Those whose rule or residual reads something else; the others differ in a formula on [r] numbers.
NAMES = [
    "sft",
    "deft",
    "sed-sft",
    "cft",
    "prift",
    "label-smoothing",
    "sft-kl",
    "sft-entropy",
    "kd-hybrid",
    "target-sft",
]
TARGETS = {name: qt.preset(name) for name in NAMES} | {
    "gem logsigmoid": qt.preset("gem", h="logsigmoid"),
    "kd at T = 2": qt.preset("kd", temperature=2.0),
    "kd by reverse_kl": qt.preset("kd", divergence="reverse_kl"),
}
# In Triton's interpreter each takes seconds; these have one, two and three reads, an offset and a sweep of torch's own.
SOON = ("sft", "deft", "target-sft", "gem logsigmoid", "kd by reverse_kl")
EACH = [target if name in SOON else pytest.param(target, marks=pytest.mark.full) for name, target in TARGETS.items()]
every_target = pytest.mark.parametrize("target", EACH, ids=TARGETS)
every_target_and_statistic = pytest.mark.parametrize(
    "target", [*EACH, EVERYTHING], ids=[*TARGETS, "statistics of whole rows"]
)
BF16, FP32 = torch.bfloat16, torch.float32


def half(dtype=BF16, n=N, v=V, **options) -> tuple[Batch, Batch]:
    """Hidden states and heads in 16 bits, and the float64 batch of the same numbers."""
    batch = ordinary_batch(n=n, v=v, d=D, seed=6, **options)
    g = torch.Generator().manual_seed(7)
    states = {name: (randn(g, n, D).to(dtype), (randn(g, v, D) / 2).to(dtype)) for name in batch.dense}
    low = replace(batch, hidden=batch.hidden.to(dtype), weight=batch.weight.to(dtype))
    dense = {name: h.double() @ w.double().T for name, (h, w) in states.items()}
    up = with_columns(replace(low, hidden=low.hidden.double(), weight=low.weight.double(), dense=dense))
    columns = {name: c.float() if c.is_floating_point() else c for name, c in up.columns.items()}
    up.columns = {name: c.double() if c.is_floating_point() else c for name, c in columns.items()}
    return replace(low, heads={name: qt.Head(*pair) for name, pair in states.items()}, columns=columns), up


def run(batch: Batch, target: qt.Target, **options):
    return run_engine(batch, target, backend="triton", **options)


# ---- exactness


def rounded_gradient_bound(up: Batch, target: qt.Target, dtype) -> dict[str, float]:
    """What rounding the gradient on exact logits to 16 bits does to dH and dW."""
    z = up.logits().requires_grad_()
    qt.target_loss(z, up.labels, target, reduction="sum", **up.oracle_inputs(target)).loss.backward()
    g = z.grad
    factor = matmuls.gradient_factor(dtype)
    low = (g * factor).to(dtype).double() / factor
    truth = g @ up.weight, g.T @ up.hidden
    got = low @ up.weight, low.T @ up.hidden
    return {name: relative_error(a, b) for name, a, b in zip(("hidden", "weight"), got, truth, strict=True)}


def rows_beside_garbage(rows, width, dtype, device):
    """As ``padded_rows``, with NaN beyond the rows' ends."""
    made = padded_rows(rows, width, dtype, device)
    torch.as_strided(made, (rows, made.stride(0)), (made.stride(0), 1)).fill_(torch.nan)
    return made


@pytest.mark.parametrize("name", ["kd", "target-sft", "sft-kl", "gem"])
def test_what_lies_beyond_the_rows_of_an_odd_vocabulary_is_not_read(name, monkeypatch):
    """An empty buffer may hold anything, NaN too."""
    low, up = half(n=8, v=67)
    monkeypatch.setattr(buffers, "padded_rows", rows_beside_garbage)
    with as_on_a_device():
        got = run(low, qt.preset(name), reduction="sum")
    truth = run_oracle(up, qt.preset(name), reduction="sum")
    assert float((got.loss.double() - truth.loss).abs() / truth.loss.abs().clamp(min=1)) <= 1e-5
    assert relative_error(got.gradients["weight"], truth.gradients["weight"]) <= 1e-2


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=["bf16", "fp16"])
@every_target
def test_16_bit_gradients_lose_no_more_than_one_rounding(target, dtype):
    low, up = half(dtype)
    with as_on_a_device():
        got = run(low, target, reduction="sum")
    truth = run_oracle(up, target, reduction="sum")
    assert float((got.loss.double() - truth.loss).abs() / truth.loss.abs().clamp(min=1)) <= 1e-5
    eps = torch.finfo(dtype).eps
    for name, bound in rounded_gradient_bound(up, target, dtype).items():
        # and dH and dW are rounded to the inputs' dtype, once or with one more factor twice
        assert relative_error(got.gradients[name], truth.gradients[name]) <= 1.2 * bound + eps, name


@pytest.mark.parametrize("name", ["cft", "profit", "target-sft"])
def test_the_unreduced_loss(name):
    """The incoming gradient is spread over many orders of magnitude, as a loss scale makes it."""
    low, up = half(torch.float16)
    upstream = torch.logspace(-6, 5, N, dtype=torch.float64)
    with as_on_a_device():
        got = run(low, qt.preset(name), upstream=upstream.float(), reduction="none")
    truth = run_oracle(up, qt.preset(name), upstream=upstream, reduction="none")
    for part in ("hidden", "weight"):
        expected = truth.gradients[part].clamp(-65504, 65504)
        kept = expected.abs() < 60000  # float16 itself ends there
        assert relative_error(got.gradients[part][kept], expected[kept]) <= 3e-3, part


@pytest.mark.parametrize("name", ["dft", "target-sft"])
def test_float32_heads_under_autocast_and_without(name):
    low, _ = half()
    states = {m: qt.Head(h.hidden.float(), h.weight.float()) for m, h in low.heads.items()}
    wide = replace(low, hidden=low.hidden.float(), weight=low.weight.float(), heads=states)
    with as_on_a_device():
        exact = run(wide, qt.preset(name), reduction="sum")
        with torch.autocast("cpu", BF16):
            got = run(wide, qt.preset(name), reduction="sum")
    assert got.gradients["weight"].dtype == FP32
    for part in ("hidden", "weight"):  # hidden states and heads are bf16 numbers, so only g is rounded
        assert 1e-5 < relative_error(got.gradients[part], exact.gradients[part].double()) < 5e-3


@pytest.mark.parametrize("name", ["cft", "target-sft"])
def test_z_loss_beside_the_logits(name):
    """In plain PyTorch; a token that the target drops has a gradient, too."""
    low, up = half()
    with as_on_a_device():
        got = run(low, qt.preset(name), z_loss=0.02, reduction="sum")
    truth = run_oracle(up, qt.preset(name), z_loss=0.02, reduction="sum")
    assert float((got.loss.double() - truth.loss).abs() / truth.loss) <= 1e-5
    for part in ("hidden", "weight"):
        assert relative_error(got.gradients[part], truth.gradients[part]) <= 5e-3, part


# ---- what it multiplies


@every_target
def test_every_product_has_16_bit_inputs(target):
    low, _ = half()
    with as_on_a_device(), Watch() as watch:
        run(low, target)
    assert set(watch.products) == {(BF16, BF16)}


@pytest.mark.parametrize(
    "hidden, weight, autocast, expected",
    [
        (FP32, FP32, BF16, BF16),  # the trainer's default on a GPU
        (FP32, FP32, None, FP32),
        (BF16, BF16, None, BF16),
        (FP32, BF16, None, BF16),
        (torch.float16, torch.float16, None, torch.float16),
        (BF16, BF16, torch.float16, torch.float16),
        (torch.float64, FP32, BF16, torch.float64),
    ],
)
def test_compute_dtype(hidden, weight, autocast, expected):
    low, _ = half()
    batch = replace(low, hidden=low.hidden.to(hidden), weight=low.weight.to(weight))
    with as_on_a_device(), Watch() as watch, torch.autocast("cpu", autocast or BF16, enabled=autocast is not None):
        run(batch, qt.preset("dft"))
    assert set(watch.products) == {(expected, expected)}


def test_a_float32_head_is_cast_once_a_call():
    low, _ = half()
    wide = replace(low, weight=low.weight.float())
    casts = []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket.__name__ == "_to_copy" and args[0].shape == wide.weight.shape:
                casts.append((args[0].dtype, kwargs["dtype"]))
            return function(*args, **(kwargs or {}))

    def nothing(a, b, out=None):  # a CPU's product would cast the head back
        return torch.zeros(len(a), b.shape[1]) if out is None else out.zero_()

    with as_on_a_device(), torch.autocast("cpu", BF16), pytest.MonkeyPatch.context() as patch, Casts():
        patch.setattr(matmuls, "wide_mm", nothing)
        run(wide, qt.preset("dft"))
    assert casts.count((FP32, BF16)) == 1


# ---- when it waits


@every_target_and_statistic
def test_two_host_reads_a_call(target):
    """One for how many tokens there are, one for what is wrong with them."""
    low, _ = half()
    low = replace(low, labels=low.labels.masked_fill(torch.arange(N) % 5 == 1, -100))
    with as_on_a_device(gradient_rows=1000), Watch() as watch:
        out = qt.linear_target_loss(
            low.hidden.clone().requires_grad_(),
            low.weight.clone().requires_grad_(),
            low.labels,
            target,
            backend="triton",
            num_items=torch.tensor(17.0),
            **low.engine_inputs(target),
        )
        out.loss.backward()
    assert watch.reads == {"together": 2}


def test_two_host_reads_with_several_targets_and_top_k():
    low, up = half()
    scores = up.dense["teacher"].log_softmax(-1).topk(8)
    teacher = qt.TopK(scores.indices, scores.values.float())
    with as_on_a_device(), Watch() as watch:
        qt.linear_target_loss(
            low.hidden.clone().requires_grad_(),
            low.weight.clone().requires_grad_(),
            low.labels,
            [qt.preset("target-sft"), qt.preset("sft")],
            which=torch.arange(N) % 2,
            teacher=teacher,
            backend="triton",
        ).loss.backward()
    assert watch.reads == {"together": 2}


def test_tokens_dropped_where_g_comes_in_parts_cost_a_read_a_part(monkeypatch):
    low, _ = half()
    wide = replace(low, weight=low.weight.float())
    monkeypatch.setattr(sizes, "_DEVICE_BUDGET_BYTES", 8 * V * (4 + 2))
    with as_on_a_device(), torch.autocast("cpu", BF16), Watch() as watch:
        run(wide, qt.preset("cft"))
    assert watch.reads == {"together": 1 + 3}  # 24 tokens, parts of 8


def test_the_count_of_reads_notices_one():
    low, _ = half()

    def impatient(stats):
        return stats.log_p_y.exp() if bool((stats.log_p_y < 0).all()) else stats.log_p_y

    with as_on_a_device(), Watch() as watch:
        run(low, qt.Target(impatient))
    assert watch.reads["_local_scalar_dense"] > 0


def test_a_rule_that_waits_for_the_device_is_named(caplog):
    def impatient_rule(stats):
        return stats.log_p_y.exp() if float(stats.log_p_y.max()) < 1 else stats.log_p_y

    low, _ = half()
    with as_on_a_device():
        for _ in range(2):
            run(low, qt.Target(impatient_rule))
            run(low, qt.preset("dft"))
    (line,) = [r.getMessage() for r in caplog.records if "waits" in r.getMessage()]
    assert "impatient_rule" in line and "torch.where" in line


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda b: b.hidden[13].fill_(float("nan")), "logits are NaN or infinite at row 13"),
        (lambda b: b.heads["teacher"].hidden[5].fill_(float("inf")), "teacher logits are NaN or infinite at row 5"),
        (lambda b: b.labels[7].fill_(V), f"labels holds {V}, outside the vocabulary of {V}"),
        (lambda b: b.labels[7].fill_(-3), "labels holds -3, outside the vocabulary"),
    ],
)
def test_faults_are_told_with_their_row(spoil, message):
    low, _ = half()
    spoil(low)
    with as_on_a_device(), pytest.raises(qt.ConfigError, match=message):
        run(low, qt.preset("target-sft"))


@pytest.mark.parametrize(
    "ids, message",
    [([[0, V]] * N, f"TopK ids run from 0 to {V}"), ([[3, 3]] * N, "TopK ids hold 3 twice")],
)
def test_a_teacher_s_ids_are_checked_at_the_end(ids, message):
    low, _ = half()
    kept = qt.TopK(torch.tensor(ids), torch.full((N, 2), -1.0))
    with as_on_a_device(), pytest.raises(qt.ConfigError, match=message):
        run(replace(low, heads={"teacher": kept}), qt.preset("target-sft"))


def test_float16_logits_beyond_its_range():
    """Logits of 1e5: float16 ends at 65504, but logits are float32."""
    low, up = half(torch.float16)
    low, up = (
        replace(low, hidden=low.hidden * 200, weight=low.weight * 200),
        replace(up, hidden=up.hidden * 200, weight=up.weight * 200),
    )
    with as_on_a_device():
        got = run(low, qt.preset("dft"), reduction="sum")
    assert float(up.logits().abs().max()) > 65504
    assert torch.isfinite(got.loss) and torch.isfinite(got.gradients["hidden"]).all()


def test_weights_that_a_float16_gradient_cannot_hold():
    low, _ = half(torch.float16)
    low.columns["weight"] = torch.full((N,), 70.0)
    with as_on_a_device(), pytest.raises(qt.ConfigError, match=r"weights reach 70, and the gradient of a float16 head"):
        run(low, qt.preset("iw-sft"))
    low, _ = half(BF16)
    low.columns["weight"] = torch.full((N,), 70.0)
    with as_on_a_device():
        assert torch.isfinite(run(low, qt.preset("iw-sft")).gradients["weight"]).all()


def test_hidden_states_that_are_not_contiguous_and_none_at_all():
    low, _ = half()
    wide = torch.randn(N, 2 * D).to(BF16)
    strided = replace(low, hidden=wide[:, ::2])
    target = qt.preset("target-sft")
    with as_on_a_device():
        got, plain = run(strided, target), run(replace(low, hidden=wide[:, ::2].contiguous()), target)
        assert torch.equal(got.gradients["weight"], plain.gradients["weight"])
        nothing = run(replace(low, labels=torch.full_like(low.labels, -100)), target)
    assert float(nothing.loss) == 0 and float(nothing.gradients["weight"].abs().max()) == 0


# ---- bytes

# Of a test's small groups of 8 columns; of 128 on a device: 0.03 + 0.2.
GROUPS = 4 / 8


@every_target
def test_bytes_for_each_logit(target, request):
    name = request.node.callspec.id
    low, _ = half(n=32, v=512)
    low.columns["weight"] = torch.ones(32)  # no row is dropped
    low.columns["critical"] = torch.ones(32, dtype=torch.bool)
    with as_on_a_device(logits_rows=32, gradient_rows=32), Watch(elements=32 * 512) as watch:
        run(low, target)
    logits = 32 * 512
    small = GROUPS if name == "sed-sft" else 0
    assert watch.kernel_bytes / logits == pytest.approx(BYTES[name] + small, abs=0.02), "kernels"
    swept = 20 if name == "deft" else 0  # Σp² is a sweep of torch's own
    assert watch.bytes / logits == swept, "torch's operations between them"


class Operations(TorchDispatchMode):
    """Counts torch's operations outside the kernels, views left out."""

    def __init__(self, watch: Watch):
        super().__init__()
        self.watch, self.count = watch, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if not function.is_view and not self.watch._in_kernel and name not in ("empty", "new_empty", "empty_like"):
            self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", SMALL)
def test_operations_of_one_more_chunk(name):
    """What benchmarks/roofline.py takes them to be; top-k rows are the expensive ones."""
    low, up = half(n=24)
    target = qt.preset(name.removesuffix(", top-k"))
    if name.endswith("top-k"):
        scores = up.dense["teacher"].log_softmax(-1).topk(8)
        low = replace(low, heads={"teacher": qt.TopK(scores.indices, scores.values.float())})
    models = 2 if "teacher" in target.requires and not name.endswith("top-k") else 1
    counts = []
    for rows in (24, 12):
        with as_on_a_device(logits_rows=rows * models, gradient_rows=24), Watch() as watch, Operations(watch) as seen:
            run(low, target)
        counts.append(seen.count)
    assert counts[1] - counts[0] <= SMALL[name]


def test_dropped_rows_are_read_once():
    low, _ = half(n=32, v=512)
    low.columns["critical"] = torch.arange(32) % 4 == 0
    with as_on_a_device(logits_rows=32, gradient_rows=32), Watch(elements=32 * 512) as watch:
        run(low, qt.preset("cft"))
    assert watch.kernel_bytes / (32 * 512) == pytest.approx(4 + 6 / 4, abs=0.02)


def test_top_k_reads_the_student_alone():
    low, up = half(n=32, v=512)
    scores = up.dense["teacher"].log_softmax(-1).topk(8)
    low = replace(low, heads={"teacher": qt.TopK(scores.indices, scores.values.float())})
    with as_on_a_device(logits_rows=32, gradient_rows=32), Watch(elements=32 * 512) as watch:
        run(low, qt.preset("target-sft"))
    assert watch.kernel_bytes / (32 * 512) == pytest.approx(STUDENT, abs=0.02)


# ---- memory


def peak_elements(target, **options) -> int:
    low, _ = half(n=64, v=512)
    inputs = low.engine_inputs(qt.preset("target-sft"))
    leaves = low.hidden.clone().requires_grad_(), low.weight.clone().requires_grad_()
    with as_on_a_device(), Watch(), LargestTensor() as largest:
        qt.linear_target_loss(*leaves, low.labels, target, backend="triton", **inputs, **options)
    return largest.elements


def kept_for_backward(target, **options) -> int:
    """Bytes of the gradients that wait for backward."""
    low, _ = half(n=64, v=512)
    leaves = low.hidden.clone().requires_grad_(), low.weight.clone().requires_grad_()
    out = qt.linear_target_loss(*leaves, low.labels, target, **low.engine_inputs(qt.preset("target-sft")), **options)
    result = out.loss.grad_fn.result
    return sum(g.numel() * g.element_size() for g in (result.d_hidden, result.d_weight))


def test_two_sources_take_the_memory_of_one():
    """One dW, one set of buffers, however many targets there are."""
    both = [qt.preset("target-sft"), qt.preset("dft")]
    which = torch.arange(64) % 2
    assert kept_for_backward(both, which=which) == kept_for_backward(both[0])
    assert peak_elements(both, which=which) == peak_elements(both[0])


@pytest.mark.parametrize(
    "tokens, vocab, width, sixteen, skips, whole, gradient",
    [
        (8192, 151936, 4096, True, False, True, 8192),  # 2 · N · V = 4 · V · d
        (8192, 151936, 2048, True, False, False, 4096),
        (4096, 151936, 2048, True, False, True, 4096),
        (8192, 151936, 4096, False, False, False, 4096),  # a float32 head: dW is the accumulator itself
        (3000, 151936, 2048, False, True, True, 3000),  # counted once, if all of it fits
        (100, 151936, 2048, True, False, True, 100),
        (1, 151936, 64, False, False, False, 1),
    ],
)
def test_cut_on_a_large_card(tokens, vocab, width, sixteen, skips, whole, gradient):
    accumulator = 4 * vocab * width if sixteen else 0
    found = sizes.device_sizes(tokens, vocab, 1, 2, accumulator, 80 << 30, skips)
    assert (found.whole, found.gradient) == (whole, gradient)
    assert found.logits <= 2048


@pytest.mark.parametrize("tokens", [1, 300, 5000, 100_000])
@pytest.mark.parametrize("vocab", [32000, 151936, 262144])
@pytest.mark.parametrize("models", [1, 2, 3])
def test_a_small_card_s_budget_is_kept(tokens, vocab, models):
    found = sizes.device_sizes(tokens, vocab, models, 2, 0, 16 << 30, False)
    rows = found.logits * models * 4 + found.gradient * 2
    assert rows * vocab <= 2 << 30 or found.logits <= 256


def test_odd_vocabularies_have_aligned_rows():
    rows = padded_rows(3, 50257, torch.float32, torch.device("cpu"))
    assert rows.shape == (3, 50257) and rows.stride() == (50304, 1)
    assert padded_rows(3, 49152, BF16, torch.device("cpu")).is_contiguous()
    low, _ = half(v=251)
    with as_on_a_device():
        got = run(low, qt.preset("dft"))
    assert torch.isfinite(got.gradients["weight"]).all()


# ---- where tensors lie


class ShapesOnly:
    """In place of the kernels: what they return, without data."""

    def drifts(self, z):
        return True

    def sums(self, z, o, y, case):
        same_device(z, o, y)
        groups = z.new_empty(z.shape[0], -(-z.shape[1] // 128)) if case.groups else None
        return z.new_empty(len(TABLE), z.shape[0]), groups

    def mean_score(self, z, o, y, table, weights, case):
        same_device(z, o, y, table, weights)
        return z.new_empty(z.shape[0])

    def gradient(self, z, o, y, table, weights, case, g, places):
        same_device(z, o, y, table, weights, g)
        return z.new_empty(len(FOUND), z.shape[0])


def same_device(*tensors):
    assert len({tensor.device for tensor in tensors}) == 1, [tensor.device for tensor in tensors]


FORMS = ["logits", "top-k", "top-k, even tail"]


def on_fake_cuda(target: qt.Target, form: str = "logits", labels_on: str = "cuda"):
    r, k = 64, 32
    cuda = torch.device("cuda")
    z, other = (torch.empty(r, V, device=cuda) for _ in range(2))
    if form != "logits":
        ids = torch.empty(r, k, dtype=torch.int64, device=cuda)
        logprobs, tail = torch.empty(r, k, device=cuda), torch.empty(r, device=cuda)
        other = TopKRows(ids, logprobs, tail, "even" if "even" in form else "student")
    columns = {name: torch.empty(r, device=cuda) for name in ("weight", "critical", "old_logps")}
    math = DeviceRows(
        target=target,
        plan=RowPlan.of(target),
        passes=ShapesOnly(),
        vocab_size=V - 6,
        support=V - 6,
        scratch=Scratch(FP32, cuda),
        with_kl=True,
        softcap=30.0,
    )
    labels = torch.empty(r, dtype=torch.int64, device=labels_on)
    g = torch.empty(r + 1, V, dtype=BF16, device=cuda)
    aux = {name: other for name in ("teacher", "reference") if name in target.requires}
    part = math.run(Rows(z, aux, labels, columns, g=g, places=Places(cuda)))
    return math.report([part, part])


@pytest.mark.parametrize("form", FORMS)
@every_target_and_statistic
def test_everything_between_the_kernels_stays_on_the_device(target, form):
    if form != "logits" and not {"teacher", "reference"} & target.requires:
        form = "logits"
    with FakeTensorMode():
        result = on_fake_cuda(target, form)
        assert {result.loss.device.type, *(value.device.type for value in result.stats.values())} == {"cuda"}
        assert {result.loss.dtype, *(value.dtype for value in result.stats.values())} == {FP32}


@pytest.mark.parametrize("target", [qt.preset("dft"), qt.preset("target-sft")], ids=str)
def test_a_label_left_on_the_host_is_noticed(target):
    with FakeTensorMode(), pytest.raises((RuntimeError, AssertionError), match=r"device|cpu"):
        on_fake_cuda(target, labels_on="cpu")


def test_a_rule_that_makes_a_tensor_on_the_host_is_noticed():
    def forgetful(stats):
        return stats.log_p_y.exp() * torch.ones(64)

    with FakeTensorMode(), pytest.raises(RuntimeError, match="device"):
        on_fake_cuda(qt.Target(forgetful))
