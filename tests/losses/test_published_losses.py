"""Every preset against the loss its paper prints, differentiated by autograd in float64."""

import math

import pytest
import torch

import published
import qtarget as qt
from published import CASES, Case

V = 23
REAL_V = 19
FLOAT64_OFF_SIMPLEX = -1e-12
REQUIREMENT = {
    "teacher_logits": "teacher",
    "reference_logits": "reference",
    "old_logps": "old_policy",
    "weight": "weight",
    "critical": "critical",
}
LABEL_SHAPED = ("old_logps", "weight", "critical")

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def cases(*presets, where=lambda case: True):
    chosen = [case for case in CASES if case.preset in presets and where(case)]
    return pytest.mark.parametrize("case", chosen, ids=lambda case: case.id)


def randn(generator, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def with_old_logps(batch, generator):
    """Ratios p_y / p_old below, inside and above every clipping range in CASES."""
    logits, labels, inputs = batch
    log_ratio = torch.tensor([0.0, 0.1, -0.1, 0.23, -0.4, 0.6, -3.0, 3.0], dtype=torch.float64)
    log_ratio = log_ratio.repeat(math.ceil(len(labels) / len(log_ratio)))[: len(labels)]
    log_ratio = log_ratio + 0.001 * torch.rand(len(labels), dtype=torch.float64, generator=generator)
    inputs["old_logps"] = published.label_log_p(logits, labels) - log_ratio
    return batch


@pytest.fixture
def mixed():
    """Twelve tokens of every temper, hard ones included."""
    g = torch.Generator().manual_seed(1)
    n = 12
    logits, labels = 1.5 * randn(g, n, V), torch.randint(0, REAL_V, (n,), generator=g)
    teacher, reference = 1.5 * randn(g, n, V), 1.5 * randn(g, n, V)
    rows = torch.arange(n)
    logits[0, labels[0]] += 40  # p_y = 1 as far as float64 can tell
    logits[1, labels[1]] += 8
    logits[2, labels[2]] -= 40
    logits[3, labels[3]] -= 40
    logits[3, (labels[3] + 1) % REAL_V] += 15  # and sure of another token
    for other in (teacher, reference):
        other[4] = logits[4] + 1e-7 * randn(g, V)
        other[5, (labels[5] + 2) % REAL_V] += 120
        other[6] += 40 * randn(g, V)
        other[2, labels[2]] += 120  # sure of the label that the student rules out
        other[0] = logits[0]
    logits[7, labels[7]] = logits[7].logsumexp(-1)  # p_y near one half
    inputs = {
        "teacher_logits": teacher,
        "reference_logits": reference,
        "weight": torch.tensor([1, 0, 0.3, 16, 1, 2.5, 0.7, 1, 16, 0.01, 1, 1.5], dtype=torch.float64),
        "critical": rows % 3 != 1,
        "vocab_size": None,
    }
    return with_old_logps((logits, labels, inputs), g)


@pytest.fixture
def hopeless():
    """Labels near e^-40 in otherwise ordinary rows. Nothing cancels, so agreement is purely relative."""
    g = torch.Generator().manual_seed(2)
    n = 6
    logits, labels = 1.5 * randn(g, n, V), torch.randint(0, V, (n,), generator=g)
    logits[torch.arange(n), labels] -= 40
    inputs = {
        "teacher_logits": 1.5 * randn(g, n, V),
        "reference_logits": 1.5 * randn(g, n, V),
        "weight": torch.rand(n, dtype=torch.float64, generator=g),
        "critical": torch.arange(n) % 2 == 0,
        "vocab_size": None,
    }
    return with_old_logps((logits, labels, inputs), g)


def preset_of(case):
    return qt.preset(case.preset, **case.hyperparameters)


def asked_for(case, inputs):
    """What a user passes for this case: its own extra inputs, and vocab_size where the head is padded."""
    named = {name: inputs[name] for name in case.needs if name != "vocab_size"}
    return named | ({"vocab_size": inputs["vocab_size"]} if inputs["vocab_size"] is not None else {})


def value_and_gradient(loss_fn, logits):
    """Per-token values [n] and the gradient of their sum [n, v]."""
    leaf = logits.detach().clone().requires_grad_()
    value = loss_fn(leaf)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient


def published_value_and_gradient(case, batch):
    logits, labels, inputs = batch
    return value_and_gradient(lambda z: case.loss(z, labels, inputs), logits)


def assert_rows_agree(got, expected, what, *, rtol=1e-10, floor=1e-14):
    """Each token on its own scale; `floor` is what autograd of a float64 softmax rounds away by itself."""
    got, expected = got.detach(), expected.detach()
    assert got.shape == expected.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    got, expected = got.unsqueeze(-1).flatten(1), expected.unsqueeze(-1).flatten(1)
    error = (got - expected).abs().amax(-1)
    allowed = rtol * expected.abs().amax(-1) + floor
    wrong = (~(error <= allowed)).nonzero().flatten().tolist()  # a NaN is wrong too
    lines = [f"token {i}: error {error[i]:.3e}, allowed {allowed[i]:.3e}" for i in wrong]
    assert not wrong, f"{what} differs\n" + "\n".join(lines)


def assert_agrees(case, target, batch, **tolerance):
    """Gradient of the sum, gradient of the per-token loss under unequal weights, and per-token value."""
    logits, labels, inputs = batch
    extra = asked_for(case, inputs)
    value, gradient = published_value_and_gradient(case, batch)

    leaf = logits.clone().requires_grad_()
    total = qt.target_loss(leaf, labels, target, reduction="sum", **extra).loss
    (got,) = torch.autograd.grad(total, leaf)
    assert_rows_agree(got, gradient, "gradient", **tolerance)

    per_token = qt.target_loss(leaf, labels, target, reduction="none", **extra).loss
    upstream = torch.linspace(-1, 2, len(labels), dtype=torch.float64)
    (got,) = torch.autograd.grad(per_token, leaf, upstream)
    assert_rows_agree(got, upstream[:, None] * gradient, 'gradient of reduction="none"', **tolerance)

    assert_rows_agree(per_token, value, "value", **tolerance)
    assert_rows_agree(total.reshape(1), per_token.sum().reshape(1), "sum of values", **tolerance)


def narrow_head(batch, other_width=V):
    """The same tokens under a head whose last rows are no tokens, with logits as large as any."""
    logits, labels, inputs = batch
    others = {name: inputs[name][:, :other_width] for name in ("teacher_logits", "reference_logits")}
    return logits, labels, inputs | others | {"vocab_size": REAL_V}


# ---- published losses


@pytest.mark.parametrize("name", qt.presets.names())
def test_every_preset_has_a_published_loss(name):
    assert qt.presets.describe(name).printed is not None
    assert qt.presets.printed_loss(qt.preset(name)) is not None
    assert name in {case.preset for case in CASES}


def test_case_names_are_unique():
    assert len({case.id for case in CASES}) == len(CASES)


@every_case
def test_loss_is_the_published_one(case, mixed):
    assert_agrees(case, preset_of(case), mixed)


@every_case
def test_hopeless_labels_keep_relative_precision(case, hopeless):
    assert_agrees(case, preset_of(case), hopeless, floor=0.0)


@every_case
def test_padded_head(case, mixed):
    assert_agrees(case, preset_of(case), narrow_head(mixed))


@every_case
def test_student_far_from_everything_in_single_precision(case, mixed):
    """A student sure by 120 logits, against label, teacher and reference; e^-120 is 0 in float32."""
    logits, labels = mixed[0][4:].clone(), mixed[1][4:]
    inputs = {name: value if value is None else value[4:] for name, value in mixed[2].items()}
    logits[torch.arange(len(labels)), (labels + 1) % V] += 120
    single = {
        name: value.float().double() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    logits = logits.float()
    value, gradient = published_value_and_gradient(case, (logits.double(), labels, single))
    columns = {
        name: value.float() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in asked_for(case, single).items()
    }
    leaf = logits.requires_grad_()
    loss = qt.target_loss(leaf, labels, preset_of(case), reduction="none", **columns).loss
    (got,) = torch.autograd.grad(loss.sum(), leaf)
    assert_rows_agree(loss.double(), value, "value", rtol=1e-5, floor=1e-5)
    assert_rows_agree(got.double(), gradient, "gradient", rtol=1e-5, floor=1e-5)


@cases("sft-kl", "asft", "kd", "kd-hybrid", "target-sft")
def test_padded_student_beside_a_head_without_padding(case, mixed):
    assert_agrees(case, preset_of(case), narrow_head(mixed, other_width=REAL_V))


@cases("label-smoothing", "sft-kl", "asft", "kd", "kd-hybrid", "target-sft")
def test_vocab_size_equal_to_the_width_changes_nothing(case, mixed):
    logits, labels, inputs = mixed
    assert_agrees(case, preset_of(case), (logits, labels, inputs | {"vocab_size": V}))


@cases("sft-kl", "asft", "kd", "kd-hybrid", "target-sft", where=lambda case: not preset_of(case).needs_full_support)
def test_tokens_the_other_model_rules_out(case, mixed):
    logits, labels, inputs = mixed
    ruled_out = torch.zeros(V, dtype=torch.bool)
    ruled_out[[2, 7, 11]] = True  # labels among them
    labels = labels.clone()
    labels[8:10] = torch.tensor([2, 7])
    others = {name: inputs[name].masked_fill(ruled_out, -math.inf) for name in ("teacher_logits", "reference_logits")}
    assert_agrees(case, preset_of(case), (logits, labels, inputs | others))


@cases("target-sft", where=lambda case: "divergence" not in case.hyperparameters)
def test_target_sft_is_cross_entropy_to_its_target(case, mixed):
    logits, labels, inputs = mixed
    guide = {"teacher_logits": None} | preset_of(case).hyperparameters | {name: inputs[name] for name in case.needs}
    ce, gradient = value_and_gradient(lambda z: published.target_sft_cross_entropy(z, labels, **guide), logits)
    leaf = logits.clone().requires_grad_()
    out = qt.target_loss(leaf, labels, preset_of(case), reduction="sum", **asked_for(case, inputs))
    (got,) = torch.autograd.grad(out.loss, leaf)
    assert_rows_agree(got, gradient, "gradient")
    assert_rows_agree(out.stats["ce_q"], ce, "ce_q")


@every_case
def test_induced_target_is_p_minus_gradient(case, mixed):
    logits, labels, inputs = mixed
    _, gradient = published_value_and_gradient(case, mixed)
    q = qt.target_distribution(logits, labels, preset_of(case), reading="induced", **asked_for(case, inputs))
    assert_rows_agree(q, logits.softmax(-1) - gradient, "induced target")
    assert ((q.sum(-1) - 1).abs() <= 1e-13 * q.abs().sum(-1)).all()


@every_case
def test_induced_target_with_a_padded_head(case, mixed):
    batch = logits, labels, inputs = narrow_head(mixed)
    _, gradient = published_value_and_gradient(case, batch)
    q = qt.target_distribution(logits, labels, preset_of(case), reading="induced", **asked_for(case, inputs))
    assert_rows_agree(q, logits.softmax(-1) - gradient, "induced target")


STRENGTH = {  # a + Σ b: p − g / strength is where the gradient would vanish
    "sft": lambda p_y, inputs: torch.ones_like(p_y),
    "dft": lambda p_y, inputs: p_y,
    "cft": lambda p_y, inputs: inputs["critical"].to(p_y.dtype),
    "iw-sft": lambda p_y, inputs: inputs["weight"],
    "label-smoothing": lambda p_y, inputs: torch.ones_like(p_y),
    "sft-kl": lambda p_y, inputs: torch.full_like(p_y, 1.1),
    "asft": lambda p_y, inputs: p_y + 0.05,
    "gem": lambda p_y, inputs: torch.zeros_like(p_y),
    "kd": lambda p_y, inputs: torch.ones_like(p_y),
    "kd:temperature=2.0": lambda p_y, inputs: torch.zeros_like(p_y),
    "kd-hybrid": lambda p_y, inputs: torch.ones_like(p_y),
    "target-sft": lambda p_y, inputs: torch.ones_like(p_y),
}


@pytest.mark.parametrize("case", [c for c in CASES if c.id in STRENGTH], ids=lambda case: case.id)
def test_normalised_target_is_the_fixed_point_or_missing(case, mixed):
    logits, labels, inputs = mixed
    _, gradient = published_value_and_gradient(case, mixed)
    strength = STRENGTH[case.id](published.label_log_p(logits, labels).exp(), inputs)
    exists = strength > 0
    q = qt.target_distribution(logits, labels, preset_of(case), reading="normalised", **asked_for(case, inputs))
    assert q[~exists].isnan().all()
    expected = logits.softmax(-1) - gradient / strength[:, None]
    # Dividing by a small strength enlarges what autograd rounded away.
    assert_rows_agree(q[exists], expected[exists], "normalised target", floor=1e-13)


@every_case
def test_statistics_follow_from_the_published_gradient(case, mixed):
    logits, labels, inputs = mixed
    _, gradient = published_value_and_gradient(case, mixed)
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    q = p - gradient
    off_simplex = (q < FLOAT64_OFF_SIMPLEX).any(-1)
    # Clamping takes away only rounding: kl_q is asked for where q is on the simplex.
    kl_q = (torch.xlogy(q.clamp(min=0), q.clamp(min=0)) - q.clamp(min=0) * log_p).sum(-1)

    stats = qt.target_loss(
        logits, labels, preset_of(case), reduction="none", stats="all", **asked_for(case, inputs)
    ).stats

    assert_rows_agree(stats["nll"], published.sft(logits, labels), "nll")
    assert_rows_agree(stats["update"], gradient.abs().sum(-1) / 2, "update")
    assert_rows_agree(stats["entropy"], -(p * log_p).sum(-1), "entropy")
    assert_rows_agree(stats["ce_q"], -(q * log_p).sum(-1), "ce_q", floor=1e-13)
    assert torch.equal(stats["accuracy"].bool(), logits.argmax(-1) == labels)
    assert torch.equal(stats["off_simplex_fraction"].bool(), off_simplex)
    assert torch.equal(stats["kl_q"].isnan(), off_simplex)
    assert_rows_agree(stats["kl_q"][~off_simplex], kl_q[~off_simplex], "kl_q", floor=1e-13)


@every_case
def test_requires_names_the_extra_inputs(case):
    assert preset_of(case).requires == {REQUIREMENT[name] for name in case.needs if name != "vocab_size"}


@pytest.mark.parametrize("direction, kept", [("higher", True), ("lower", False)])
def test_profit_keeps_a_label_exactly_at_the_threshold(direction, kept):
    leaf = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    target = qt.preset("profit", tau=0.5, direction=direction)
    qt.target_loss(leaf, torch.tensor([1]), target, reduction="sum").loss.backward()
    expected = torch.tensor([[0.5, -0.5]], dtype=torch.float64) * kept
    assert_rows_agree(leaf.grad, expected, "gradient")


# ---- identities

IDENTITIES = [
    ("target-sft", {"eta": 0.0}, "dft", "value and gradient"),
    ("beyond-log", {"alpha": 1.0}, "dft", "gradient"),
    ("beyond-log", {"alpha": 0.0}, "sft", "value and gradient"),
    ("label-smoothing", {"smoothing": 0.0}, "sft", "value and gradient"),
    ("asft", {"kl_weight": 0.0}, "dft", "value and gradient"),
    ("sft-kl", {"kl_weight": 0.0}, "sft", "value and gradient"),
    ("kd-hybrid", {"kd_weight": 0.0}, "sft", "value and gradient"),
    ("gem", {"beta": 1.0}, "sft", "gradient"),
    ("psft", {}, "sft", "gradient"),
    ("p-loss", {}, "dft", "value and gradient"),
    ("nll", {}, "sft", "value and gradient"),
]


@pytest.mark.parametrize(
    "name, hyperparameters, plain, equal", IDENTITIES, ids=[f"{i[0]} is {i[2]}" for i in IDENTITIES]
)
def test_identity(name, hyperparameters, plain, equal, mixed):
    logits, labels, _ = mixed
    target, plain_target = qt.preset(name, **hyperparameters), qt.preset(plain)
    extra = {"old_logps": published.label_log_p(logits, labels)} if name == "psft" else {}
    value, gradient = value_and_gradient(
        lambda z: qt.target_loss(z, labels, target, reduction="none", **extra).loss, logits
    )
    plain_value, plain_gradient = value_and_gradient(
        lambda z: qt.target_loss(z, labels, plain_target, reduction="none").loss, logits
    )
    assert_rows_agree(gradient, plain_gradient, "gradient")
    if "value" in equal:
        assert_rows_agree(value, plain_value, "value")


def test_target_sft_value_is_continuous_at_eta_zero(mixed):
    logits, labels, inputs = mixed
    value = {
        eta: qt.target_loss(
            logits,
            labels,
            qt.preset("target-sft", eta=eta),
            teacher_logits=inputs["teacher_logits"],
            reduction="none",
        ).loss
        for eta in (0.0, 1e-9)
    }
    assert_rows_agree(value[1e-9], value[0.0], "value", floor=1e-5)


# ---- golden vectors

GOLDEN_Z = [[1.0, 0.0, -1.0, 0.5, -0.5]]
GOLDEN_REFERENCE = [[0.5, 0.5, -0.5, 0.0, 1.0]]
GOLDEN_TEACHER = [[0.0, 1.0, 0.0, -1.0, 0.5]]
SFT = (0.428656, -0.842306, 0.058012, 0.259993, 0.095646)
DFT = (0.067596, -0.132826, 0.009148, 0.040999, 0.015083)


def golden_row(preset, hyperparameters, *needs, gradient, on_simplex=True):
    name = ":".join([preset, *(f"{k}={v}" for k, v in hyperparameters.items())])
    case = Case(name, preset, hyperparameters, needs)
    return pytest.param(case, torch.tensor([gradient], dtype=torch.float64), on_simplex, id=name)


TEACHER, REFERENCE = "teacher_logits", "reference_logits"
GOLDEN = [
    golden_row("sft", {}, gradient=SFT),
    golden_row("dft", {}, gradient=DFT),
    golden_row("beyond-log", {"alpha": 1.0}, gradient=DFT),
    golden_row(
        "target-sft",
        {"eta": 0.0},
        gradient=DFT,
    ),
    golden_row(
        "beyond-log",
        {"alpha": 0.5},
        gradient=(0.170222, -0.334485, 0.023037, 0.103245, 0.037982),
    ),
    golden_row(
        "eaft",
        {"top_k": 5},
        gradient=(0.371352, -0.729705, 0.050257, 0.225236, 0.082860),
    ),
    golden_row(
        "label-smoothing",
        {"smoothing": 0.1},
        gradient=(0.408656, -0.762306, 0.038012, 0.239993, 0.075646),
    ),
    golden_row(
        "sft-kl",
        {"kl_weight": 0.5},
        REFERENCE,
        gradient=(0.534831, -0.871611, 0.047232, 0.324392, -0.034843),
        on_simplex=False,
    ),
    golden_row(
        "asft",
        {"kl_weight": 0.1},
        REFERENCE,
        gradient=(0.088831, -0.138687, 0.006992, 0.053879, -0.011015),
    ),
    golden_row(
        "psft",
        {"clip": 0.2, "clip_high": 0.28},
        "old_logps",
        gradient=(0.312506, -0.614073, 0.042293, 0.189545, 0.069730),
    ),
    golden_row(
        "gem",
        {"beta": 0.7},
        gradient=(0.525225, -0.874129, 0.030165, 0.257120, 0.061619),
        on_simplex=False,
    ),
    golden_row(
        "gem",
        {"beta": 0.7, "h": "logsigmoid"},
        gradient=(0.263926, -0.438547, 0.015007, 0.128881, 0.030732),
    ),
    golden_row(
        "kd",
        {},
        TEACHER,
        gradient=(0.280175, -0.245919, -0.090468, 0.205370, -0.149157),
    ),
    golden_row(
        "kd-hybrid",
        {"kd_weight": 0.5},
        TEACHER,
        gradient=(0.354415, -0.544113, -0.016228, 0.232681, -0.026756),
    ),
    golden_row(
        "target-sft",
        {"eta": 0.5},
        TEACHER,
        gradient=(0.184280, -0.244375, -0.031888, 0.144558, -0.052575),
    ),
    golden_row(
        "target-sft",
        {"eta": 1.0},
        TEACHER,
        gradient=(0.303589, -0.339965, -0.067054, 0.213983, -0.110553),
    ),
]
every_golden = pytest.mark.parametrize("case, gradient, on_simplex", GOLDEN)
SIX_DECIMALS = 6e-7


@pytest.fixture
def golden():
    reference = torch.tensor(GOLDEN_REFERENCE, dtype=torch.float64)
    labels = torch.tensor([1])
    inputs = {
        "teacher_logits": torch.tensor(GOLDEN_TEACHER, dtype=torch.float64),
        "reference_logits": reference,
        "old_logps": published.label_log_p(reference, labels),
        "vocab_size": None,
    }
    return torch.tensor(GOLDEN_Z, dtype=torch.float64), labels, inputs


@every_golden
def test_published_loss_gives_the_golden_vector(case, gradient, on_simplex, golden):
    _, got = published_value_and_gradient(case, golden)
    assert_rows_agree(got, gradient, "gradient", floor=SIX_DECIMALS)
    assert ((golden[0].softmax(-1) - got) >= FLOAT64_OFF_SIMPLEX).all() == on_simplex


@every_golden
def test_qtarget_gives_the_golden_vector(case, gradient, on_simplex, golden):
    logits, labels, inputs = golden
    leaf = logits.clone().requires_grad_()
    out = qt.target_loss(leaf, labels, preset_of(case), reduction="sum", **asked_for(case, inputs))
    out.loss.backward()
    assert_rows_agree(leaf.grad, gradient, "gradient", floor=SIX_DECIMALS)
    assert out.stats["off_simplex_fraction"].tolist() == [0.0 if on_simplex else 1.0]
    assert_agrees(case, preset_of(case), golden)


# ---- reductions and labels outside supervision


def with_ignored(batch):
    """Two rows of a [2, 6] batch, three of their labels ignored and the columns there full of rubbish."""
    logits, labels, inputs = batch
    ignored = torch.zeros(len(labels), dtype=torch.bool)
    ignored[[0, 5, 9]] = True
    inputs = {
        name: value.to(torch.float64).masked_fill(ignored, 1e3) if name in LABEL_SHAPED else value
        for name, value in inputs.items()
    }
    inputs = {name: value if value is None else value.reshape(2, 6, *value.shape[1:]) for name, value in inputs.items()}
    return logits.reshape(2, 6, V), labels.masked_fill(ignored, -100).reshape(2, 6), inputs, ignored


@every_case
def test_ignored_labels_take_no_part(case, mixed):
    value, gradient = published_value_and_gradient(case, mixed)
    logits, labels, inputs, ignored = with_ignored(mixed)
    extra = asked_for(case, inputs)
    leaf = logits.clone().requires_grad_()

    total = qt.target_loss(leaf, labels, preset_of(case), reduction="sum", **extra)
    (got,) = torch.autograd.grad(total.loss, leaf)
    got = got.reshape(-1, V)
    assert (got[ignored] == 0).all()
    assert_rows_agree(got[~ignored], gradient[~ignored], "gradient")

    per_token = qt.target_loss(leaf, labels, preset_of(case), reduction="none", **extra).loss
    assert per_token.shape == labels.shape
    assert (per_token.flatten()[ignored] == 0).all()
    assert_rows_agree(per_token.flatten()[~ignored], value[~ignored], "value")

    assert total.stats
    for name, statistic in total.stats.items():
        assert statistic.shape == labels.shape, name
        assert statistic.flatten()[ignored].isnan().all(), name
        if name != "kl_q":  # computed only where asked for
            assert not statistic.flatten()[~ignored].isnan().any(), name


@every_case
def test_mean_divides_by_supervised_labels(case, mixed):
    value, gradient = published_value_and_gradient(case, mixed)
    logits, labels, inputs, ignored = with_ignored(mixed)
    leaf = logits.clone().requires_grad_()
    loss = qt.target_loss(leaf, labels, preset_of(case), reduction="mean", **asked_for(case, inputs)).loss
    (got,) = torch.autograd.grad(loss, leaf)
    kept = (~ignored).sum()
    assert_rows_agree(loss.reshape(1), value[~ignored].sum().reshape(1) / kept, "value")
    assert_rows_agree(got.reshape(-1, V)[~ignored], gradient[~ignored] / kept, "gradient")


@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
@cases("sft", "iw-sft", "cft", "profit")
def test_mean_divides_by_num_items_where_given(case, as_tensor, mixed):
    value, gradient = published_value_and_gradient(case, mixed)
    logits, labels, inputs, ignored = with_ignored(mixed)
    num_items = torch.tensor(37) if as_tensor else 37
    leaf = logits.clone().requires_grad_()
    loss = qt.target_loss(
        leaf, labels, preset_of(case), reduction="mean", num_items=num_items, **asked_for(case, inputs)
    ).loss
    (got,) = torch.autograd.grad(loss, leaf)
    assert_rows_agree(loss.reshape(1), value[~ignored].sum().reshape(1) / 37, "value")
    assert_rows_agree(got.reshape(-1, V)[~ignored], gradient[~ignored] / 37, "gradient")


def test_mean_is_the_default_reduction(mixed):
    logits, labels, _ = mixed
    target = qt.preset("sft")
    assert torch.equal(
        qt.target_loss(logits, labels, target).loss,
        qt.target_loss(logits, labels, target, reduction="mean").loss,
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@every_case
def test_no_supervised_label_leaves_a_zero_with_a_graph(case, reduction, mixed):
    logits, labels, inputs = mixed
    leaf = logits.clone().requires_grad_()
    loss = qt.target_loss(
        leaf, torch.full_like(labels, -100), preset_of(case), reduction=reduction, **asked_for(case, inputs)
    ).loss
    loss.sum().backward()
    assert (loss == 0).all()
    assert (leaf.grad == 0).all()


def test_another_ignore_index(mixed):
    logits, labels, _ = mixed
    ignored = labels == labels[3]
    _, gradient = value_and_gradient(lambda z: published.sft(z, labels), logits)
    leaf = logits.clone().requires_grad_()
    target = qt.preset("sft")
    qt.target_loss(leaf, labels, target, reduction="sum", ignore_index=int(labels[3])).loss.backward()
    assert_rows_agree(leaf.grad, gradient * ~ignored[:, None], "gradient")


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float64])
def test_critical_may_be_a_mask_or_numbers(dtype, mixed):
    logits, labels, inputs = mixed
    case = Case("cft", "cft", {}, ("critical",))
    assert_agrees(case, qt.preset("cft"), (logits, labels, inputs | {"critical": inputs["critical"].to(dtype)}))


# ---- the checks can fail


def dft_without_stop_gradient(logits, labels):
    log_p_y = published.label_log_p(logits, labels)
    return -log_p_y.exp() * log_p_y


def test_a_lost_stop_gradient_is_noticed(mixed):
    logits, labels, _ = mixed
    mutant = Case("dft", "dft", {}, instead=dft_without_stop_gradient)
    value, _ = published_value_and_gradient(mutant, mixed)
    assert_rows_agree(value, published.dft(logits, labels), "value")  # the value alone would not tell
    with pytest.raises(AssertionError, match="gradient differs"):
        assert_agrees(mutant, qt.preset("dft"), mixed)


def test_a_wrong_value_is_noticed(mixed):
    constant_off = Case("dft", "dft", {}, instead=lambda z, y: published.dft(z, y) + 1e-6)
    with pytest.raises(AssertionError, match="value differs"):
        assert_agrees(constant_off, qt.preset("dft"), mixed)


def test_a_nan_is_noticed():
    with pytest.raises(AssertionError, match="token 1"):
        assert_rows_agree(torch.tensor([0.0, math.nan]), torch.zeros(2), "value")
