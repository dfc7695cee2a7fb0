"""Divergences by themselves: published numbers, what they are of each other, how they are written, what is refused."""

import math

import pytest
import torch
import yaml

import qtarget as qt
from qtarget import divergence as D
from qtarget import residual, trust

NAMES = sorted(qt.targets.divergence.Divergence.known)
SOME = [D.forward_kl(), D.reverse_kl(), D.jsd(0.1), D.jsd(0.5), D.jsd(0.9), D.skew_kl(0.1), D.skew_kl(0.7)]
SOME += [D.skew_reverse_kl(0.1), D.skew_reverse_kl(0.7), D.total_variation(), D.alpha(0.0), D.alpha(0.5), D.todi()]
every = pytest.mark.parametrize("divergence", SOME, ids=str)


def softmax_pair(n=200, v=7, spread=4.0, seed=0):
    """Logits of a student and of a residual, of every temper."""
    g = torch.Generator().manual_seed(seed)
    scale = spread * torch.rand(2, n, 1, dtype=torch.float64, generator=g)
    return scale * torch.randn(2, n, v, dtype=torch.float64, generator=g)


def value_and_gradient(divergence, z, z_R):
    log_p, log_R = z.log_softmax(-1), z_R.log_softmax(-1)
    p = log_p.exp()
    pulled = divergence.times_p(p, log_p, log_p - log_R)
    value = divergence.value(p, log_R.exp(), log_p - log_R).sum(-1)
    return value, pulled - p * pulled.sum(-1, keepdim=True)


# ---- published numbers

Z = torch.tensor([[1.0, 0.0, -1.0, 0.5, -0.5]], dtype=torch.float64)
REFERENCE = torch.tensor([[0.5, 0.5, -0.5, 0.0, 1.0]], dtype=torch.float64)
TEACHER = torch.tensor([[0.0, 1.0, 0.0, -1.0, 0.5]], dtype=torch.float64)
LABEL = torch.tensor([1])


def kd(divergence):
    return qt.preset("kd", divergence=divergence)


ENTROPY_BONUS = qt.Target(
    trust.anchored(trust.constant(1.0), 0.1), [(1, residual.uniform(), D.reverse_kl())]
)  # beside 0.1 log V
GOLDEN = {  # target, value, gradient, whether Q is on the simplex
    "reverse KL": (kd("reverse_kl"), 0.567492, (0.211202, -0.237690, -0.087441, 0.258097, -0.144166), True),
    "jsd 0.1": (kd(D.jsd(0.1)), 0.045255, (0.024053, -0.021312, -0.007840, 0.018026, -0.012927), True),
    "jsd 0.5": (kd(D.jsd(0.5)), 0.126940, (0.058928, -0.054975, -0.020224, 0.049616, -0.033344), True),
    "jsd 0.9": (kd(D.jsd(0.9)), 0.049296, (0.019605, -0.020609, -0.007582, 0.021087, -0.012500), True),
    "skew KL": (kd("skew_kl"), 0.405327, (0.207150, -0.185441, -0.068220, 0.158986, -0.112475), True),
    "skew reverse KL": (kd("skew_reverse_kl"), 0.429989, (0.180671, -0.180013, -0.066223, 0.174747, -0.109183), True),
    "total variation": (kd("total_variation"), 0.485545, (0.133463, -0.108595, -0.039950, 0.080949, -0.065866), True),
    "alpha 0.5": (kd(D.alpha(0.5)), 0.521738, (0.240921, -0.230318, -0.084729, 0.213821, -0.139695), True),
    "todi": (kd("todi"), 1.073774, (0.364573, -0.380680, -0.140044, 0.387045, -0.230894), False),
    "sft + 0.5 KL(p ‖ ref)": (
        qt.preset("sft-kl", kl_weight=0.5, direction="reverse"),
        1.985588,
        (0.515886, -0.889063, 0.040812, 0.312901, 0.019464),
        False,
    ),
    "dft + 0.05 KL(p ‖ ref)": (
        qt.preset("asft", kl_weight=0.05, direction="reverse"),
        0.305125,
        (0.076319, -0.137502, 0.007428, 0.046290, 0.007465),
        True,
    ),
    "nll - 0.1 H": (
        ENTROPY_BONUS,
        1.707673 + 0.1 * math.log(5),
        (0.452111, -0.849447, 0.049584, 0.261219, 0.086533),
        False,
    ),
}


@pytest.mark.parametrize("run", ["oracle", "engine"])
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_vectors(name, run):
    target, value, gradient, on_simplex = GOLDEN[name]
    leaf = Z.clone().requires_grad_()
    others = {model: z for model, z in (("teacher", TEACHER), ("reference", REFERENCE)) if model in target.requires}
    if run == "oracle":
        out = qt.target_loss(leaf, LABEL, target, **{f"{model}_logits": z for model, z in others.items()})
    else:
        unit = torch.eye(5, dtype=torch.float64)
        heads = {model: qt.Head(z, unit) for model, z in others.items()}
        out = qt.linear_target_loss(leaf, unit, LABEL, target, **heads)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(value, abs=6e-7)
    assert leaf.grad[0].tolist() == pytest.approx(gradient, abs=6e-7)
    assert bool(out.stats["off_simplex_fraction"]) is not on_simplex


# ---- what they are of each other


@every
def test_a_score_is_nothing_where_the_two_agree(divergence):
    assert float(divergence.score(torch.zeros(1, dtype=torch.float64))) == 0
    z, _ = softmax_pair()
    value, gradient = value_and_gradient(divergence, z, z)
    assert float(value.abs().max()) <= 1e-15 and float(gradient.abs().max()) <= 1e-15


@every
def test_score_times_p_is_that(divergence):
    z, z_R = softmax_pair()
    log_p, d = z.log_softmax(-1), z.log_softmax(-1) - z_R.log_softmax(-1)
    p = log_p.exp()
    torch.testing.assert_close(divergence.times_p(p, log_p, d), p * divergence.score(d), rtol=1e-10, atol=1e-14)


def weighted(*parts):
    return lambda z, z_R: tuple(
        sum(w * x for (w, _), x in zip(parts, found, strict=True))
        for found in zip(*(value_and_gradient(d, z, z_R) for _, d in parts), strict=True)
    )


IDENTITIES = {
    "alpha 0 is reverse KL": ([(1, D.alpha(0.0))], [(1, D.reverse_kl())], 1e-13),
    "alpha 1 is forward KL": ([(1, D.alpha(1.0))], [(1, D.forward_kl())], 1e-13),
    "alpha near 0": ([(1, D.alpha(1e-7))], [(1, D.reverse_kl())], 1e-4),
    "alpha near 1": ([(1, D.alpha(1 - 1e-7))], [(1, D.forward_kl())], 1e-4),
    "skew KL near 0": ([(1, D.skew_kl(1e-9))], [(1, D.forward_kl())], 1e-4),
    "skew reverse KL near 0": ([(1, D.skew_reverse_kl(1e-9))], [(1, D.reverse_kl())], 1e-4),
    "jsd 0.3 of the two skews": (
        [(1, D.jsd(0.3))],
        [(0.3, D.skew_kl(0.3)), (0.7, D.skew_reverse_kl(0.7))],
        1e-13,
    ),
    "jsd near 0, by beta": ([(1e9, D.jsd(1e-9))], [(1, D.forward_kl())], 1e-4),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_identities(name):
    one, other, tolerance = IDENTITIES[name]
    z, z_R = softmax_pair(spread=2.0)
    for got, expected in zip(weighted(*one)(z, z_R), weighted(*other)(z, z_R), strict=True):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_reverse_kl_to_a_guided_residual_is_a_share_of_that_to_the_teacher():
    """With the student inside the residual held constant, as every residual is."""
    z, z_T = softmax_pair()
    _, guided = value_and_gradient(D.reverse_kl(), z, 0.7 * z + 0.3 * z_T)
    _, whole = value_and_gradient(D.reverse_kl(), z, z_T)
    torch.testing.assert_close(guided, 0.3 * whole, rtol=0, atol=1e-14)


@every
def test_reach_is_an_upper_bound(divergence):
    """Of pairs at random, and of ones that put nearly all of p where R has next to nothing."""
    for spread in (1.0, 8.0, 30.0):
        z, z_R = softmax_pair(n=20_000, v=4, spread=spread)
        p, d = z.softmax(-1), z.log_softmax(-1) - z_R.log_softmax(-1)
        pulled = divergence.times_p(p, z.log_softmax(-1), d).sum(-1, keepdim=True)
        furthest = float((divergence.score(d) - pulled).max())
        if divergence.reach is not None:
            assert furthest <= divergence.reach + 1e-12
    assert divergence.reach is not None or furthest > 5


@every
def test_an_infinite_divergence_says_so(divergence):
    z, z_R = softmax_pair()
    z_R[:, 0] = -math.inf
    value, gradient = value_and_gradient(divergence, z, z_R)
    assert bool(torch.isfinite(value).all() and torch.isfinite(gradient).all()) is not divergence.needs_full_support


# ---- as written


def tanh(d):
    return torch.tanh(d)


def one_at_zero(d):
    return torch.exp(d)


@pytest.mark.parametrize("divergence", [*SOME, f"{__name__}:tanh"], ids=str)
def test_a_divergence_comes_back_from_yaml(divergence):
    target = qt.Target(0.3, [(0.7, residual.teacher(), divergence), (1, residual.reference(), D.jsd(0.2))])
    assert qt.Target.from_config(yaml.safe_load(yaml.safe_dump(target.to_config()))) == target
    preset = qt.preset("kd", divergence=divergence)
    again = qt.Target.from_config(yaml.safe_load(yaml.safe_dump(preset.to_config())))
    assert again == preset and str(again) == str(preset)


@pytest.mark.parametrize("name", NAMES)
def test_a_divergence_by_its_name(name):
    made = getattr(D, name)()
    assert qt.Target(0, [(1, residual.teacher(), name)]).residual[0].divergence == made
    assert made.equation and made.label == name and ">>> " in made.__doc__


REFUSED = {
    "an unknown name": (lambda: kd("reverse"), "divergence.*is 'reverse'; did you mean 'reverse_kl'"),
    "an unknown parameter": (lambda: kd({"jsd": {"alpha": 0.1}}), "alpha"),
    "jsd at 0": (lambda: kd({"jsd": {"beta": 0}}), "beta is 0"),
    "jsd at 1": (lambda: D.jsd(1.0), "beta is 1"),
    "skew at 1": (lambda: D.skew_kl(1.0), "alpha is 1"),
    "reverse skew at 0": (lambda: D.skew_reverse_kl(0.0), "alpha is 0"),
    "alpha above 1": (lambda: D.alpha(1.5), "alpha is 1.5"),
    "todi below 0": (lambda: D.todi(-1.0), "slope is -1"),
    "a number": (lambda: kd(0.5), "divergence is 0.5; use one of alpha, forward_kl"),
    "a function that is not 0 at 0": (lambda: kd(one_at_zero), "one_at_zero gives 1 at d = 0"),
    "a function of another shape": (lambda: kd(torch.sum), "divergence sum gave .* return one finite number per d"),
    "kd at a temperature": (lambda: qt.preset("kd", temperature=2, divergence="jsd"), "temperature is 2 with"),
    "a flattened teacher": (
        lambda: qt.Target(0, [(1, residual.teacher(2.0), "reverse_kl")]),
        "temperature of teacher is 2 with divergence reverse_kl",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    make, message = REFUSED[name]
    with pytest.raises(qt.ConfigError, match=message):
        make()
