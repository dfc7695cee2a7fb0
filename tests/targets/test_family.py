"""The wider family on one token worked out by hand, and what its members become at the ends of their numbers."""

import pytest
import torch

import qtarget as qt
from qtarget.targets.presets import printed_loss

Z = torch.tensor([[1.0, 0.0, -1.0, 0.5, -0.5]], dtype=torch.float64)
LABEL = torch.tensor([1])
GIVEN = {
    "reference_logits": torch.tensor([[0.5, 0.5, -0.5, 0.0, 1.0]], dtype=torch.float64),
    "teacher_logits": torch.tensor([[0.0, 1.0, 0.0, -1.0, 0.5]], dtype=torch.float64),
}
LN_5 = 1.6094379
SIX_DECIMALS = 6e-7

# Preset, numbers, reported loss, gradient on the logits, whether Q stays on the simplex.
GOLDEN = [
    ("talr", {"tau": 2.0}, 0.733496, "+0.170222 -0.334485 +0.023037 +0.103245 +0.037982", True),
    ("deft", {}, 1.083631, "+0.251478 -0.494152 +0.034034 +0.152529 +0.056112", True),
    ("idft", {}, 0.101126, "+0.023468 -0.046115 +0.003176 +0.014234 +0.005236", True),
    ("chord-phi", {}, 0.245344, "+0.056937 -0.111880 +0.007706 +0.034534 +0.012704", True),
    ("trsft", {}, 1.847102, "+0.428656 -0.842306 +0.058012 +0.259993 +0.095646", True),
    ("gold-floor", {"floor": 0.2}, 0.369420, "+0.085731 -0.168461 +0.011602 +0.051999 +0.019129", True),
    ("infosft", {}, 0.479946, "+0.111381 -0.218863 +0.015074 +0.067556 +0.024852", True),
    ("mixce", {}, 1.069189, "+0.248126 -0.487566 +0.033580 +0.150496 +0.055364", True),
    ("tailr", {}, 1.203997, "+0.279411 -0.549041 +0.037814 +0.169471 +0.062345", True),
    ("luffy", {}, -0.611942, "+0.101792 -0.200022 +0.013776 +0.061740 +0.022713", True),
    ("poly", {}, 2.689408, "+0.496252 -0.975133 +0.067160 +0.300992 +0.110729", False),
    ("focal", {}, 1.310482, "+0.514458 -1.010909 +0.069624 +0.312035 +0.114791", False),
    ("focal", {"held": True}, 1.310482, "+0.304123 -0.597600 +0.041159 +0.184460 +0.067859", True),
    ("symmetric-ce", {}, 3.553936, "+0.313250 -0.615536 +0.042394 +0.189996 +0.069896", True),
    ("sed-sft", {"tau": 1.0}, 1.870536, "+0.437911 -0.860493 +0.059265 +0.265606 +0.097711", False),
    ("prift", {}, 0.399535, "+0.092720 -0.182194 +0.012548 +0.056237 +0.020689", True),
    ("prift", {"by": "mass"}, 0.0, "0 0 0 0 0", True),
    ("prift", {"by": "mass", "threshold": 0.4}, 1.847102, "+0.428656 -0.842306 +0.058012 +0.259993 +0.095646", True),
    ("stm", {}, 0.0, "0 0 0 0 0", True),
    ("gift", {"beta": 2.0}, 1.837020, "+0.337847 -0.513295 +0.024606 +0.204915 -0.054072", True),
    ("gift", {}, 1.847102, "+0.428656 -0.842306 +0.058012 +0.259993 +0.095646", True),
    (
        "sft-kl",
        {"kl_weight": 0.5, "direction": "reverse"},
        1.985588,
        "+0.515886 -0.889063 +0.040812 +0.312901 +0.019464",
        False,
    ),
    ("asft", {"direction": "reverse"}, 0.305125, "+0.076319 -0.137502 +0.007428 +0.046290 +0.007465", True),
    ("sft-entropy", {}, 1.707673 + 0.1 * LN_5, "+0.452111 -0.849447 +0.049584 +0.261219 +0.086533", False),
    ("kd", {"divergence": "reverse_kl"}, 0.567492, "+0.211202 -0.237690 -0.087441 +0.258097 -0.144166", True),
    (
        "kd",
        {"divergence": {"jsd": {"beta": 0.1}}},
        0.045255,
        "+0.024053 -0.021312 -0.007840 +0.018026 -0.012927",
        True,
    ),
    ("kd", {"divergence": "jsd"}, 0.126940, "+0.058928 -0.054975 -0.020224 +0.049616 -0.033344", True),
    (
        "kd",
        {"divergence": {"jsd": {"beta": 0.9}}},
        0.049296,
        "+0.019605 -0.020609 -0.007582 +0.021087 -0.012500",
        True,
    ),
    ("kd", {"divergence": "skew_kl"}, 0.405327, "+0.207150 -0.185441 -0.068220 +0.158986 -0.112475", True),
    ("kd", {"divergence": "skew_reverse_kl"}, 0.429989, "+0.180671 -0.180013 -0.066223 +0.174747 -0.109183", True),
    ("kd", {"divergence": "total_variation"}, 0.485545, "+0.133463 -0.108595 -0.039950 +0.080949 -0.065866", True),
    ("kd", {"divergence": "alpha"}, 0.521738, "+0.240921 -0.230318 -0.084729 +0.213821 -0.139695", True),
    ("todi", {}, 1.073774, "+0.364573 -0.380680 -0.140044 +0.387045 -0.230894", False),
    ("taid", {}, 0.094990, "+0.107432 -0.105302 -0.038738 +0.100478 -0.063869", True),
]


def value_and_gradient(loss, z):
    leaf = z.clone().requires_grad_()
    value = loss(leaf)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient


def oracle(target, z, labels, given, **more):
    """Value and gradient, and the share of tokens off the simplex."""
    needed = {name: given[name] for name in given if name.removesuffix("_logits") in target.requires}
    stats = qt.target_loss(z, labels, target, reduction="none", **needed, **more).stats
    found = value_and_gradient(
        lambda leaf: qt.target_loss(leaf, labels, target, reduction="none", **needed, **more).loss, z
    )
    return *found, stats["off_simplex_fraction"]


@pytest.mark.parametrize("name, numbers, loss, gradient, on_simplex", GOLDEN, ids=lambda part: str(part)[:40])
def test_golden_vector(name, numbers, loss, gradient, on_simplex):
    target = qt.preset(name, **numbers)
    wanted = torch.tensor([[float(number) for number in gradient.split()]], dtype=torch.float64)
    printed = value_and_gradient(lambda z: printed_loss(target)(z, LABEL, GIVEN), Z)
    value, got, off_simplex = oracle(target, Z, LABEL, GIVEN)
    for each in (printed, (value, got)):
        assert float(each[0]) == pytest.approx(loss, abs=SIX_DECIMALS)
        assert torch.allclose(each[1], wanted, rtol=0, atol=SIX_DECIMALS)
    assert torch.allclose(got, printed[1], rtol=0, atol=1e-14)
    assert bool(off_simplex == 0) == on_simplex


# ---- what a member becomes at the ends of its numbers

# One, its numbers, another, its numbers, whether the reported loss is the same, too.
IDENTITIES = [
    ("talr", {"tau": 1.0}, "dft", {}, True),
    ("talr", {"tau": 4.0}, "beyond-log", {"alpha": 0.25}, False),
    ("mixce", {"mixing_ratio": 1.0}, "sft", {}, True),
    ("mixce", {"mixing_ratio": 0.0}, "dft", {}, True),
    ("mixce", {"mixing_ratio": 0.25}, "dft", {"share": 0.75}, True),
    ("gold-floor", {"floor": 1.0}, "sft", {}, True),
    ("gold-floor", {"floor": 0.0}, "dft", {}, True),
    ("tailr", {"gamma": 0.0}, "sft", {}, True),
    ("tailr", {"gamma": 1.0}, "dft", {}, True),
    ("trsft", {"high": 1.0}, "dft", {}, True),
    ("trsft", {"high": 1e-30}, "sft", {}, True),
    ("idft", {"strength": 0.0}, "dft", {}, True),
    ("idft", {"low": 1.0, "high": 1.0}, "dft", {}, True),
    ("sed-sft", {"weight": 0.0}, "sft", {}, True),
    ("sed-sft", {"tau": 0.0}, "sft", {}, True),
    ("focal", {"gamma": 0.0}, "sft", {}, True),
    ("focal", {"gamma": 0.0, "held": True}, "sft", {}, True),
    ("poly", {"epsilon": 0.0}, "sft", {}, True),
    ("symmetric-ce", {"alpha": 1.0, "beta": 0.0}, "sft", {}, True),
    ("symmetric-ce", {"alpha": 0.0, "beta": 0.25}, "beyond-log", {"alpha": 1.0}, True),
    ("symmetric-ce", {"alpha": 1.0, "beta": 0.5}, "poly", {"epsilon": 2.0}, True),
    ("eaft", {"power": 0.0}, "sft", {}, True),
    ("prift", {"by": "mass", "threshold": 0.0}, "sft", {}, True),
    ("stm", {"perplexity": 1e30}, "sft", {}, True),
    ("gift", {"beta": 200.0}, "sft", {}, True),
    ("gift", {"beta": 200.0, "toward": "teacher"}, "sft", {}, True),
    ("gift", {"beta": 1e-12, "toward": "teacher"}, "kd", {}, True),
    ("sft-entropy", {"entropy_weight": 0.0}, "sft", {}, True),
    ("taid", {"t": 1.0}, "kd", {}, False),
    ("todi", {"slope": 2.0}, "kd", {"divergence": {"todi": {"slope": 2.0}}}, True),
]


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(3)
    logits, teacher, reference = torch.randn(3, 40, 32, generator=generator, dtype=torch.float64).mul(3)
    return logits, torch.arange(40) % 32, {"teacher_logits": teacher, "reference_logits": reference}


@pytest.mark.parametrize("name, numbers, other, at, values", IDENTITIES, ids=lambda part: str(part)[:40])
def test_identity(name, numbers, other, at, values, batch):
    one, two = (qt.Target.from_config({"preset": n, **at}) for n, at in ((name, numbers), (other, at)))
    value, gradient, _ = oracle(one, *batch)
    wanted_value, wanted, _ = oracle(two, *batch)
    assert torch.allclose(gradient, wanted, rtol=1e-9, atol=1e-11)
    assert not values or torch.allclose(value, wanted_value, rtol=1e-9, atol=1e-10)


def test_luffy_and_chord_trust_the_middle_most():
    p_y = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    stats = qt.targets.TokenStats({"log_p_y": p_y.log(), "rest_mass": 1 - p_y})
    for name, at in (("luffy", 0.1), ("chord-phi", 0.5)):
        trust = qt.preset(name).trust(stats)
        assert float(p_y[trust.argmax()]) == pytest.approx(at) and float(trust.max()) == pytest.approx(0.25)


@pytest.mark.parametrize("name", ["mixce", "gold-floor", "tailr", "trsft"])
def test_what_is_left_of_the_trust_keeps_its_digits(name):
    """1 − γ in float32 of labels at 1 − 1e-9."""
    rest = torch.tensor([1e-9])
    stats = {"log_p_y": torch.log1p(-rest), "rest_mass": rest}
    rule = qt.preset(name, **{"trsft": {"high": 1.0}}.get(name, {})).trust
    (left,) = rule.weights(qt.targets.TokenStats(stats))[1]
    expected = {"mixce": 0.5e-9, "gold-floor": 1e-9, "tailr": 0.1e-9, "trsft": 1e-9}[name]
    assert float(left) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.1])
def test_tailr_at_a_label_whose_probability_is_0_in_float32(gamma):
    target = qt.preset("tailr", gamma=gamma)
    made = qt.target_loss(torch.tensor([[200.0, 0.0]]), torch.tensor([1]), target, stats="all")
    assert made.stats["trust"].tolist() == [1.0 if gamma == 0 else 0.0]


def test_gift_without_what_the_authors_add_to_the_reference():
    """log ref_y = −30: 5e-5 of trust; 1e-10 beside ref would make it 0.046."""
    stats = qt.targets.TokenStats({"reference_log_p_y": torch.tensor([-30.0, -60.0], dtype=torch.float64)})
    a, b = qt.preset("gift").trust.weights(stats)
    assert a.tolist() == pytest.approx([4.54e-5, 4.2e-18], rel=1e-2)
    assert (a + b).tolist() == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize(
    "name, numbers, told",
    [
        ("infosft", {"confidence": 0.5}, "confidence is 0.5; use a number above 0.5 below 1"),
        ("trsft", {"high": 0}, "high is 0; use a number above 0 to 1"),
        ("focal", {"held": "yes"}, "held is 'yes'; use true or false"),
        ("focal", {"gamma": -1}, "gamma is -1; use a number from 0"),
        ("talr", {"tau": 0}, "tau is 0; use a number above 0"),
        ("mixce", {"mixing_ratio": 2}, "mixing_ratio is 2; use a number from 0 to 1"),
        ("idft", {"low": 3.0}, "high is 2.0; use a number from 3"),
        ("sed-sft", {"top_k": 0}, "top_k is 0; use a whole number from 1"),
        ("gift", {"toward": "student"}, "toward is 'student'; valid: reference, teacher"),
        ("prift", {"by": "rank"}, "by is 'rank'; valid: mass, prob"),
        ("stm", {"perplexity": 0.5}, "perplexity is 0.5; use a number from 1"),
        ("symmetric-ce", {"log_zero": 1}, "log_zero is 1; use a number"),
    ],
)
def test_numbers_out_of_range(name, numbers, told):
    with pytest.raises(qt.ConfigError) as caught:
        qt.preset(name, **numbers)
    assert told in str(caught.value)
