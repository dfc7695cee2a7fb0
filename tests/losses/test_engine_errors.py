"""What the losses say when asked for something wrong: one sentence with the field, its value and the fix."""

import importlib.util
import math
import shutil
from functools import partial

import pytest
import torch

import qtarget as qt
from engine_and_oracle import as_head, ordinary_batch, randn

pytestmark = pytest.mark.usefixtures("one_thread")

N = 12
BATCH = ordinary_batch(n=N)
ONES, LABELS, LOGITS, V = torch.ones(N), BATCH.labels, BATCH.logits(), 67
IDS, LOGPROBS = torch.arange(5).repeat(N, 1), torch.full((N, 5), -3.0)


def at(tensor, place, value):
    """A copy with one entry changed."""
    tensor = tensor.clone()
    tensor[place] = value
    return tensor


def linear(target="dft", hidden=BATCH.hidden, weight_=BATCH.weight, labels=LABELS, **options):
    target = qt.preset(target) if isinstance(target, str) else target
    return qt.linear_target_loss(hidden, weight_, labels, target, **options)


def full(target="dft", logits=LOGITS, labels=LABELS, **options):
    target = qt.preset(target) if isinstance(target, str) else target
    return qt.target_loss(logits, labels, target, **options)


def head(rows=V, width=7, n=N, **options):
    g = torch.Generator().manual_seed(0)
    return qt.Head(randn(g, n, width), randn(g, rows, width), **options)


def topk(**fields):
    return qt.TopK(**({"ids": IDS, "logprobs": LOGPROBS} | fields))


def kd(**fields):
    """kd with a top-k teacher of these fields."""
    return linear("kd", teacher=topk(**fields))


def expect(call, text, error=qt.ConfigError):
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert text in message
    assert "\n" not in message and not message.endswith(".")


def table(**rows):
    return pytest.mark.parametrize("call, text", rows.values(), ids=rows)


both = pytest.mark.parametrize("loss", [linear, full], ids=["linear", "full"])


@table(
    name=(
        lambda: qt.preset("eatf"),
        "target is 'eatf'; did you mean 'eaft'? valid: eaft",
    ),
    parameter=(
        lambda: qt.preset("eaft", topk=3),
        "parameter of eaft is 'topk'; did you mean 'top_k'? valid: normalizer, power, top_k",
    ),
    no_parameters=(lambda: qt.preset("dft", alpha=1), "dft has no parameter 'alpha'; it takes none"),
    not_a_number=(
        lambda: qt.preset("beyond-log", alpha="x"),
        "target beyond-log: alpha is 'x'; use a number",
    ),
    nan=(lambda: qt.preset("beyond-log", alpha=math.nan), "alpha is nan; use a number"),
    a_truth=(lambda: qt.preset("kd", temperature=True), "temperature is True; use a number"),
    tau=(lambda: qt.preset("profit", tau=1.5), "target profit: tau is 1.5; use a number from 0 to 1"),
    direction=(
        lambda: qt.preset("profit", direction="hihger"),
        "direction is 'hihger'; did you mean 'higher'? valid:",
    ),
    middle=(
        lambda: qt.preset("profit", direction="middle"),
        "direction is 'middle'; give both tau_low and tau_high",
    ),
    order=(
        lambda: qt.preset("profit", direction="middle", tau_low=0.5, tau_high=0.2),
        "tau_high is 0.2; use a number above 0.5 to 1",
    ),
    stray=(
        lambda: qt.preset("profit", tau_low=0.2),
        "tau_low and tau_high are for direction 'middle'; direction is 'higher', use tau",
    ),
    top_k=(lambda: qt.preset("eaft", top_k=1), "top_k is 1; use a whole number from 2 (the paper uses 20)"),
    top_k_not_whole=(lambda: qt.preset("eaft", top_k=2.5), "top_k is 2.5; use a whole number from 2"),
    power=(lambda: qt.preset("eaft", power=-1), "power is -1; use a number from 0"),
    normalizer=(
        lambda: qt.preset("eaft", normalizer="ln"),
        "normalizer is 'ln'; use 'log_k', 'none' or a number above",
    ),
    negative_normalizer=(lambda: qt.preset("eaft", normalizer=-1), "normalizer is -1; use a number above 0"),
    smoothing=(
        lambda: qt.preset("label-smoothing", smoothing=1.2),
        "smoothing is 1.2; use a number from 0 to 1",
    ),
    kl_weight=(lambda: qt.preset("sft-kl", kl_weight=-1), "kl_weight is -1; use a number from 0"),
    asft_weight=(
        lambda: qt.preset("asft", kl_weight=-0.1),
        "target asft: kl_weight is -0.1; use a number from 0",
    ),
    reverse=(
        lambda: qt.preset("asft", direction="backward"),
        "direction is 'backward'; did you mean 'forward'? valid: forward, reverse",
    ),
    other_direction=(lambda: qt.preset("sft-kl", direction="back"), "direction is 'back'; valid: forward"),
    clip=(lambda: qt.preset("psft", clip=0), "clip is 0; use a number above 0 to 1"),
    clip_high=(lambda: qt.preset("psft", clip_high=-1), "clip_high is -1; use a number above 0"),
    beta=(lambda: qt.preset("gem", beta=0), "beta is 0; use a number above 0"),
    h=(lambda: qt.preset("gem", h="lin"), "h is 'lin'; did you mean 'linear'? valid: linear, logsigmoid"),
    temperature=(lambda: qt.preset("kd", temperature=0), "target kd: temperature is 0; use a number above 0"),
    hybrid_temperature=(
        lambda: qt.preset("kd-hybrid", temperature=-2),
        "temperature is -2; use a number above 0",
    ),
    kd_weight=(lambda: qt.preset("kd-hybrid", kd_weight=2), "kd_weight is 2; use a number from 0 to 1"),
    eta=(lambda: qt.preset("target-sft", eta=1.2), "target target-sft: eta is 1.2; use a number from 0 to 1"),
    teacher_temperature=(
        lambda: qt.preset("target-sft", teacher_temperature=0),
        "target target-sft: teacher_temperature is 0; use a number above 0",
    ),
)
def test_preset(call, text):
    expect(call, text)


@table(
    teacher=(
        lambda: linear("kd"),
        "target kd(temperature=1.0) needs a teacher and got none; pass teacher=qt.Head(",
    ),
    teacher_logits=(
        lambda: full("kd"),
        "target kd(temperature=1.0) needs a teacher and got none; pass teacher_logits=",
    ),
    reference=(
        lambda: linear("sft-kl"),
        "needs a reference and got none; pass reference=qt.Head(hidden, weight) or qt.TopK(ids, logprobs)",
    ),
    reference_logits=(lambda: full("asft"), "needs a reference and got none; pass reference_logits="),
    weight=(
        lambda: linear("iw-sft"),
        "needs weights and got none; pass weight=, one number per token or per row",
    ),
    critical=(
        lambda: full("cft"),
        "target cft needs a critical mask and got none; pass critical=, a boolean per token",
    ),
    old_logps=(
        lambda: linear("psft"),
        "needs the old policy's log-probabilities and got none; pass old_logps=, the label's log-probability",
    ),
)
def test_missing_input(call, text):
    expect(call, text)


def test_all_missing_inputs_at_once():
    target = qt.Target(qt.trust.trajectory_weight(), qt.residual.teacher())
    with pytest.raises(qt.ConfigError) as caught:
        linear(target)
    assert [fault.split(" and got none")[0] for fault in caught.value.faults] == [
        "target composed needs a teacher",
        "target composed needs weights",
    ]


@both
@table(
    shape=(
        {"labels": LABELS[:5]},
        " requires [12]; nothing is shifted here: labels[i] belongs to position i",
    ),
    dtype=({"labels": LABELS.float()}, "labels has dtype torch.float32; use torch.int64"),
    a_mask=({"labels": LABELS > 3}, "labels has dtype torch.bool; use torch.int64"),
    large=(
        {"labels": at(LABELS, 3, V)},
        "labels holds 67, outside the vocabulary of 67; use ids from 0 to 66, or -100 for positions that are",
    ),
    negative=(
        {"labels": at(LABELS, 3, -5)},
        "labels holds -5, outside the vocabulary of 67; use ids from 0 to 66",
    ),
    padding=(
        {"labels": at(LABELS.clamp(max=59), 3, 60), "vocab_size": 60},
        "labels holds 60, outside the vocabulary of 60; use ids from 0 to 59",
    ),
    negative_weight=(
        {"target": "iw-sft", "weight": at(ONES, 3, -1)},
        "weight holds -1; weights must be 0 or more",
    ),
    weight_shape=({"target": "iw-sft", "weight": ONES[:5]}, "weight has shape [5]; labels require [12]"),
    weight_nan=(
        {"target": "iw-sft", "weight": at(ONES, 3, math.nan)},
        "weight holds NaN or infinity at a supervised token; every number must be finite",
    ),
    weight_infinite=(
        {"target": "iw-sft", "weight": at(ONES, 3, math.inf)},
        "weight holds NaN or infinity at a",
    ),
    critical=(
        {"target": "cft", "critical": at(ONES, 3, 0.5)},
        "critical holds 0.5; it is a mask of tokens, use 0 and 1",
    ),
    critical_nan=(
        {"target": "cft", "critical": at(ONES, 3, math.nan)},
        "critical holds NaN or infinity at a",
    ),
    critical_shape=({"target": "cft", "critical": ONES[:3]}, "critical has shape [3]; labels require [12]"),
    old_logps_shape=(
        {"target": "psft", "old_logps": ONES[:3]},
        "old_logps has shape [3]; labels require [12]",
    ),
    old_logps_nan=(
        {"target": "psft", "old_logps": at(ONES, 3, math.nan)},
        "old_logps holds NaN or infinity at a",
    ),
)
def test_labels_and_columns(call, text, loss):
    expect(partial(loss, **call), text)


@pytest.mark.parametrize("loss, what", [(linear, "hidden"), (full, "logits")], ids=["linear", "full"])
def test_labels_of_another_shape_name_what_they_belong_to(loss, what):
    expect(lambda: loss(labels=LABELS[:5]), f"labels has shape [5], but {what} requires [12]")


def test_a_column_per_row_is_offered_where_there_are_rows():
    batch = BATCH.hidden.reshape(3, 4, -1), LABELS.reshape(3, 4)
    call = partial(linear, "iw-sft", hidden=batch[0], labels=batch[1], weight=torch.ones(4))
    expect(call, "weight has shape [4]; labels require [3, 4], or one per row [3]")
    call = partial(linear, "psft", hidden=batch[0], labels=batch[1], old_logps=torch.ones(3))
    expect(call, "old_logps has shape [3]; labels require [3, 4]")


@both
@table(
    reduction=({"reduction": "avg"}, "reduction is 'avg'; use one of mean, sum, none"),
    stats=({"stats": "most"}, "stats is 'most'; use 'basic' or 'all'"),
    vocab_size_zero=({"vocab_size": 0}, "vocab_size is 0; use a whole number from 1 to the head's 67 rows"),
    vocab_size_large=(
        {"vocab_size": 68},
        "vocab_size is 68; use a whole number from 1 to the head's 67 rows",
    ),
    vocab_size_real=(
        {"vocab_size": 60.0},
        "vocab_size is 60.0; use a whole number from 1 to the head's 67 rows",
    ),
    top_k=(
        {"target": qt.preset("eaft", top_k=100)},
        "top_k is 100, but the vocabulary has 67 tokens; use a smaller top_k",
    ),
)
def test_options(call, text, loss):
    expect(partial(loss, **call), text)


@table(
    backend=(
        lambda: linear(backend="tritno"),
        "backend is 'tritno'; did you mean 'triton'? valid: auto, compiled, torch, triton",
    ),
    chunk_rows=(lambda: linear(chunk_rows=0), "chunk_rows is 0; use a whole number from 1, or None"),
    chunk_rows_huge=(
        lambda: linear(chunk_rows=2**31 // 67 + 1),
        "chunk_rows is 32051995, which makes 32051995 × 67 logits, more than 2^31 − 1; use at most 32051994, or None",
    ),
    labels_elsewhere=(
        lambda: linear(labels=LABELS.to("meta")),
        "labels is on meta and hidden on cpu; move it with .to('cpu')",
    ),
    teacher_elsewhere=(
        lambda: linear("kd", teacher=qt.Head(BATCH.hidden.to("meta"), BATCH.weight.to("meta"))),
        "teacher's hidden is on meta and hidden on cpu; move it with .to('cpu')",
    ),
    top_k_elsewhere=(
        lambda: kd(logprobs=LOGPROBS.to("meta")),
        "teacher's logprobs is on meta and hidden on cpu; move it with .to('cpu')",
    ),
    no_targets=(lambda: linear(target=[]), "target is an empty list; pass one target or more"),
    which_missing=(
        lambda: linear(target=[qt.preset("sft"), qt.preset("dft")]),
        "target is a list of 2; pass which=, an int64 tensor of the labels' shape with the number of each token's target",
    ),
    which_alone=(
        lambda: linear(which=torch.zeros_like(LABELS)),
        "which numbers the targets of a list, and target is a single one; pass target as a list",
    ),
    which_float=(
        lambda: linear(target=[qt.preset("sft")], which=torch.zeros(N)),
        "which has dtype torch.float32; use a torch.int64 tensor of the labels' shape",
    ),
    which_shape=(
        lambda: linear(target=[qt.preset("sft")], which=torch.zeros(5, dtype=torch.int64)),
        "which has shape [5]; labels require [12]",
    ),
    which_too_large=(
        lambda: linear(target=[qt.preset("sft")], which=torch.full((N,), 3)),
        "which holds 3; there are 1 targets, use numbers from 0 to 0",
    ),
    second_target_s_needs=(
        lambda: linear(target=[qt.preset("sft"), qt.preset("kd")], which=torch.ones(N, dtype=torch.int64)),
        "target kd(temperature=1.0) needs a teacher and got none; pass teacher=qt.Head(hidden, weight)",
    ),
    chunk_rows_real=(lambda: linear(chunk_rows=2.5), "chunk_rows is 2.5; use a whole number from 1, or None"),
    softcap=(lambda: linear(logit_softcap=0), "logit_softcap is 0; use a number above 0"),
    width=(
        lambda: linear(weight_=BATCH.weight[:, :5]),
        "hidden has shape [12, 12] and head_weight [67, 5]; head_weight must be [vocabulary, width]",
    ),
    no_matrix=(
        lambda: linear(weight_=BATCH.weight[0]),
        "hidden has shape [12, 12] and head_weight [12]; head_weight",
    ),
    bias=(lambda: linear(head_bias=torch.zeros(5)), "head_bias has shape [5]; head_weight requires [67]"),
    a_name=(
        lambda: qt.linear_target_loss(BATCH.hidden, BATCH.weight, LABELS, "dft"),
        "target is 'dft'; use qt.preset(name), qt.Target(...) or qt.Target.from_config(...)",
    ),
    a_name_for_the_oracle=(
        lambda: qt.target_loss(LOGITS, LABELS, "dft"),
        "target is 'dft'; use qt.preset(",
    ),
    reading=(
        lambda: qt.target_distribution(LOGITS, LABELS, qt.preset("dft"), reading="induce"),
        "reading is 'induce'; use 'induced' or 'normalised'",
    ),
)
def test_call(call, text):
    expect(call, text)


@table(
    logits=(
        lambda: linear("kd", teacher=BATCH.dense["teacher"]),
        "teacher is a Tensor; use qt.Head(hidden, weight) or qt.TopK(ids, logprobs)",
    ),
    positions=(
        lambda: linear("kd", teacher=head(n=11)),
        "teacher covers positions of shape [11]; hidden requires [12]",
    ),
    reference=(
        lambda: linear("asft", reference=head(n=3)),
        "reference covers positions of shape [3]; hidden requires",
    ),
    logits_of_the_oracle=(
        lambda: full("kd", teacher_logits=BATCH.dense["teacher"][:5]),
        "teacher_logits has shape [5, 67]; labels require [12] + [V]",
    ),
    width=(
        lambda: qt.Head(torch.zeros(4, 5), torch.zeros(9, 6)),
        "Head: hidden has shape [4, 5] and weight [9, 6]; weight must be [vocabulary, width] with",
    ),
    bias=(lambda: head(bias=torch.zeros(3)), "Head: bias has shape [3]; weight requires [67]"),
    vocab_size=(
        lambda: head(vocab_size=68),
        "Head: vocab_size is 68; use a number from 1 to the weight's 67 rows",
    ),
    softcap=(lambda: head(logit_softcap=0.0), "Head: logit_softcap is 0.0; use a number above 0"),
)
def test_other_models(call, text):
    expect(call, text)


@table(
    twice=(
        lambda: kd(ids=at(IDS, (3, 1), 4)),
        "teacher: TopK ids hold 4 twice for one token; each id may appear once",
    ),
    large=(lambda: kd(ids=at(IDS, (3, 1), V)), "teacher: TopK ids run from 0 to 67; use ids from 0 to 66"),
    negative=(
        lambda: kd(ids=at(IDS, (3, 1), -1)),
        "teacher: TopK ids run from -1 to 4; use ids from 0 to 66",
    ),
    padding=(
        lambda: linear("kd", teacher=topk(ids=at(IDS, (3, 1), 60)), labels=LABELS.clamp(max=59), vocab_size=60),
        "teacher: TopK ids run from 0 to 60; use ids from 0 to 59",
    ),
    more_than_the_vocabulary=(
        lambda: kd(ids=torch.arange(70).repeat(N, 1), logprobs=torch.full((N, 70), -5.0)),
        "TopK ids run from 0 to 69; use ids from 0 to 66",
    ),
    none_kept=(
        lambda: topk(ids=IDS[:, :0], logprobs=LOGPROBS[:, :0]),
        "TopK: ids has shape [12, 0]; the last axis holds one token or more",
    ),
    real_ids=(
        lambda: topk(ids=IDS.half()),
        "TopK: ids has dtype torch.float16; use torch.int64 or torch.int32",
    ),
    shapes=(
        lambda: topk(logprobs=LOGPROBS[:, :3]),
        "TopK: ids has shape [12, 5], logprobs [12, 3]; they must agree",
    ),
    tail_shape=(
        lambda: topk(tail_logprob=LOGPROBS),
        "TopK: tail_logprob has shape [12, 5]; ids require [12]",
    ),
    tail=(lambda: topk(tail="flat"), "TopK: tail is 'flat'; use 'student' or 'even'"),
    positions=(
        lambda: kd(ids=IDS[:3], logprobs=LOGPROBS[:3]),
        "teacher covers positions of shape [3]; hidden requires",
    ),
    logits_for_logprobs=(
        lambda: kd(logprobs=LOGPROBS + 5),
        "teacher: TopK logprobs sum to a probability of 36.9; use log_softmax over the whole vocabulary",
    ),
)
def test_top_k(call, text):
    expect(call, text)


# ---- numbers that are none

SPOILT = at(BATCH.hidden, (7, 3), math.nan)
ROWS = {"hidden": SPOILT.reshape(3, 4, -1), "labels": LABELS.reshape(3, 4)}
TEACHER = BATCH.dense["teacher"]
MEND = "; lower the learning rate, check the data of that row, or train in float32 or bfloat16 instead of"


@table(
    nan=(lambda: linear(hidden=SPOILT), "logits are NaN or infinite at row 7" + MEND),
    infinity=(
        lambda: linear(hidden=at(SPOILT, (7, 3), math.inf)),
        "logits are NaN or infinite at row 7" + MEND,
    ),
    overflow=(
        lambda: linear(hidden=1e30 * BATCH.hidden.float(), weight_=1e30 * BATCH.weight.float()),
        "at row 0" + MEND,
    ),
    second_chunk=(lambda: linear(hidden=SPOILT, chunk_rows=5), "logits are NaN or infinite at row 7"),
    a_row_and_a_position=(lambda: linear(**ROWS), "logits are NaN or infinite at row 1, position 3" + MEND),
    past_ignored_labels=(
        lambda: linear(**ROWS | {"labels": at(LABELS, slice(0, 6), -100).reshape(3, 4)}),
        "logits are NaN or infinite at row 1, position 3",
    ),
    minus_infinity=(
        lambda: linear(head_bias=at(torch.zeros(V), 3, -math.inf)),
        "logits are NaN or infinite at row 0",
    ),
    teacher=(
        lambda: linear("kd", teacher=as_head(at(TEACHER, (7, 3), math.nan))),
        "teacher logits are NaN or infinite",
    ),
    teacher_infinity=(
        lambda: linear("target-sft", teacher=as_head(at(TEACHER, (7, 3), math.inf))),
        "teacher logits are NaN or infinite at row 7" + MEND,
    ),
    reference=(
        lambda: linear("sft-kl", reference=as_head(at(TEACHER, (7, 3), math.nan))),
        "reference logits are NaN or infinite at row 7",
    ),
    top_k=(
        lambda: kd(logprobs=at(LOGPROBS, (7, 2), math.nan)),
        "teacher logits are NaN or infinite at row 7",
    ),
    a_rule=(
        lambda: linear(qt.Target(lambda stats: stats.log_p_y * math.nan)),
        "the trust rule's weights are NaN or infinite at row 0",
    ),
    oracle=(
        lambda: full(logits=at(LOGITS, (7, 3), math.inf)),
        "logits are NaN or infinite at row 7" + MEND,
    ),
    teacher_of_the_oracle=(
        lambda: full("kd", teacher_logits=at(TEACHER, (7, 3), math.nan)),
        "teacher_logits are NaN or infinite at row 7",
    ),
)
def test_not_finite(call, text):
    expect(call, text)


def test_a_number_that_is_none_names_its_place():
    """For whoever logs the batch: row and position as numbers."""
    with pytest.raises(qt.ConfigError) as caught:
        linear(**ROWS)
    assert (caught.value.row, caught.value.position) == (1, 3)


# ---- rules of one's own


@table(
    undeclared=(
        lambda stats: stats.entropy,
        "the rule reads stats.entropy without declaring it; add 'entropy' to the rule's needs",
    ),
    undeclared_top_k=(
        lambda stats: stats.top_k_entropy(3),
        "the rule reads stats.top_k_entropy without declaring it; add 'top_k_entropy' to the rule's needs",
    ),
    undeclared_column=(
        lambda stats: stats.weight,
        "the rule reads stats.weight without declaring it; add 'weight'",
    ),
    unknown=(
        lambda stats: stats.entropi,
        "stats has no 'entropi'; it has log_p_y, rest_mass, entropy, top_k_entropy",
    ),
)
@both
def test_statistics_of_a_rule(call, text, loss):
    expect(lambda: loss(qt.Target(call), weight=ONES), text, error=AttributeError)


@both
def test_what_a_rule_returns(loss):
    summed = qt.Target(lambda stats: stats.log_p_y.sum())
    expect(
        lambda: loss(summed),
        "the trust rule gave a tensor of shape []; return one number per token, a tensor shaped",
    )
    expect(
        lambda: loss(qt.Target(lambda stats: 0.5)),
        "the trust rule gave 0.5; return one number per token, a tensor",
    )


@both
def test_a_rule_may_return_a_mask(loss):
    mask, numbers = (
        loss(qt.Target(rule)).loss
        for rule in (lambda stats: stats.log_p_y > -3, lambda stats: (stats.log_p_y > -3).double())
    )
    assert torch.equal(mask, numbers)


# ---- backends that cannot run here


@pytest.mark.parametrize(
    "backend, hide, text",
    [
        (
            "triton",
            "triton",
            "backend is 'triton', which needs the package triton; use 'auto', which uses what runs here",
        ),
        ("triton", "interpreter", "backend is 'triton', which needs a CUDA device and hidden is on cpu; use 'auto'"),
        ("compiled", "compiler", "backend is 'compiled', which needs a C++ compiler on a CPU; use 'auto'"),
    ],
)
def test_a_backend_that_cannot_run(backend, hide, text, monkeypatch):
    find = importlib.util.find_spec
    if hide == "triton":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))
    if hide == "interpreter":
        monkeypatch.setattr(pytest.importorskip("triton").knobs.runtime, "interpret", False)
    if hide == "compiler":
        monkeypatch.setattr(shutil, "which", lambda name: None)
    expect(lambda: linear(backend=backend), text)
    assert torch.isfinite(linear().loss)  # auto runs all the same


@pytest.mark.parametrize(
    "version, capability, text",
    [
        ("3.9.0", (9, 0), "cannot be compiled by triton 3.9.0 for compute capability 9.0"),
        ("3.7.1", (7, 5), "needs compute capability 8.0 or newer and the device has 7.5"),
        ("3.7.1", (9, 0), None),
        ("3.9.0", (8, 0), None),
    ],
)
def test_devices_that_cannot_run_the_kernels(version, capability, text, monkeypatch):
    triton = pytest.importorskip("triton")
    from qtarget.losses.engine import choose
    from qtarget.losses.engine.device import kernels

    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    cuda = torch.device("cuda")
    assert kernels.can_run(cuda) == text
    assert choose("auto", cuda, torch.float32) == ("triton" if text is None else "torch")
    assert choose("auto", cuda, torch.float64) == "torch"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert choose("auto", cuda, torch.float32) == "compiled"
