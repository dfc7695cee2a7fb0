"""Targets: what each needs, how YAML holds it, and rules of one's own."""

import copy
import doctest
import importlib
import inspect
import json
import math
import pickle
import pkgutil
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
import yaml

import qtarget as qt
from published import CASES
from qtarget import targets
from qtarget.targets import TokenStats

residual, trust = qt.residual, qt.trust
NAMES = qt.presets.names()
every_preset = pytest.mark.parametrize("name", NAMES)


def through_yaml(target):
    return qt.Target.from_config(yaml.safe_load(yaml.safe_dump(target.to_config())))


# ---- presets


@every_preset
def test_preset_is_described(name):
    """What the command line and the docs show of it."""
    entry = qt.presets.describe(name)
    texts = {field: getattr(entry, field) for field in ("formula", "trusts", "rest", "source", "summary")}
    assert all(isinstance(text, str) and text.strip() for text in texts.values()), texts
    assert not texts["summary"].startswith(name)
    assert "a =" in entry.formula
    assert entry.name == name


@every_preset
def test_hyperparameters_have_defaults(name):
    """The defaults are the signature's, and a target shows what it was made with."""
    entry = qt.presets.describe(name)
    assert entry.parameters == {key: p.default for key, p in inspect.signature(entry.build).parameters.items()}
    assert inspect.Parameter.empty not in entry.parameters.values()
    target = qt.preset(name)
    assert target.hyperparameters == {key: value for key, value in entry.parameters.items() if key != "divergence"}
    assert str(target) == name if not entry.parameters else str(target).startswith(f"{name}(")
    assert target.formula == entry.formula


@pytest.mark.parametrize("alias, name", [("nll", "sft"), ("p-loss", "dft")])
def test_alias(alias, name):
    assert qt.preset(alias) == qt.preset(name)
    assert qt.preset(alias).name == name
    assert qt.presets.describe(alias).name == name


def test_no_alias_hides_a_name():
    known = [key for name in NAMES for key in (name, *qt.presets.describe(name).aliases)]
    assert len(known) == len(set(known))


@pytest.mark.parametrize(
    "name, hyperparameters, needed",
    [
        ("sft", {}, set()),
        ("iw-sft", {}, {"weight"}),
        ("cft", {}, {"critical"}),
        ("psft", {}, {"old_policy"}),
        ("kd", {}, {"teacher"}),
        ("kd", {"temperature": 2.0}, {"teacher"}),
        ("kd-hybrid", {"kd_weight": 0.0}, set()),
        ("kd-hybrid", {"kd_weight": 0.0, "temperature": 2.0}, set()),
        ("kd-hybrid", {"kd_weight": 1.0}, {"teacher"}),
        ("target-sft", {}, {"teacher"}),
        ("target-sft", {"eta": 0.0}, set()),
        ("sft-kl", {}, {"reference"}),
        ("sft-kl", {"kl_weight": 0.0}, set()),
        ("asft", {"kl_weight": 0}, set()),
        ("label-smoothing", {}, set()),
        ("gem", {"h": "logsigmoid"}, set()),
    ],
)
def test_requires_by_value(name, hyperparameters, needed):
    assert qt.preset(name, **hyperparameters).requires == needed


def test_requires_of_composed_targets():
    both = qt.Target(0.5, [(1.0, residual.teacher()), (0.0, residual.reference())])
    assert both.requires == {"teacher"}  # a factor of zero asks for nothing
    assert qt.Target(trust.trajectory_weight(), scale=trust.token_mask()).requires == {"weight", "critical"}
    assert qt.Target(teacher_knows_better).requires == {"teacher"}
    assert qt.Target(trust.anchored(trust.clipped_ratio(), 0.1), residual.reference()).requires == {
        "old_policy",
        "reference",
    }


@pytest.mark.parametrize(
    "pool, coefficients",
    [
        (residual.guided(eta=0.0), {"student": 1.0}),
        (residual.guided(eta=1.0), {"teacher": 1.0}),
        (residual.guided(eta=0.25, temperature=2.0), {"student": 0.75, "teacher": 0.125}),
        (residual.tempered(2.0), {"student": 0.5}),
        (residual.teacher(0.5), {"teacher": 2.0}),
        (residual.uniform(), {}),
        (residual.pool(student=0.5, reference=0.5), {"student": 0.5, "reference": 0.5}),
    ],
)
def test_pools_drop_what_is_zero(pool, coefficients):
    """Never multiplied: 0 · (−inf) would be NaN."""
    assert pool.nonzero == coefficients


# ---- to YAML and back


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_preset_through_yaml(case):
    target = qt.preset(case.preset, **case.hyperparameters)
    again = through_yaml(target)
    assert again == target
    assert str(again) == str(target)
    assert again.requires == target.requires


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_preset_in_parts(case):
    """Trust, residual and scale with the numbers filled in are the same target, and so are their parts by themselves."""
    target = qt.preset(case.preset, **case.hyperparameters)
    parts = target.to_config(composed=True)
    again = qt.Target.from_config(json.loads(json.dumps(parts)))
    assert again == target and hash(again) == hash(target)
    assert (again.requires, again.needs) == (target.requires, target.needs)
    assert again.to_config() == again.to_config(composed=True) == parts
    assert set(parts) <= {"trust", "residual", "scale", "value"}
    half = replace(target, share=0.5)
    assert qt.Target.from_config(half.to_config(composed=True)) == half


def halved(stats):
    return stats.log_p_y.exp() / 2


@trust.needs("teacher_log_p_y")
def teacher_knows_better(stats):
    return (stats.teacher_log_p_y > stats.log_p_y).to(stats.log_p_y.dtype)


@dataclass(frozen=True)
class Sigmoid(trust.Rule):
    """γ = σ(slope (log p_y − middle))"""

    slope: float = 1.0
    middle: float = -3.0

    def __call__(self, stats):
        return torch.sigmoid(self.slope * (stats.log_p_y - self.middle))


@dataclass(frozen=True)
class Doubt(trust.Rule):
    needs: ClassVar[frozenset[str]] = frozenset({"log_p_y", "entropy"})

    def __call__(self, stats):
        return (-stats.entropy).exp()


@dataclass(frozen=True)
class GentleEntropy(trust.Entropy):
    """A rule of one's own that starts from one of the library's."""

    def __call__(self, stats):
        return super().__call__(stats).sqrt()


def half_teacher():
    return residual.pool(student=0.5, teacher=0.5)


def sharpened_for(beta=0.7):
    return residual.sharpened(beta)


mine = qt.Target(trust.probability(), residual.guided(0.2))


def make_mine(eta=0.5, *, weight=1.0):
    return qt.Target(trust.probability(), residual.guided(eta), scale=weight)


def not_a_target():
    return residual.teacher()


COMPOSED = {
    "trust alone": (
        qt.Target(trust.entropy(top_k=5, power=2.0)),
        "{trust: {entropy: {top_k: 5, power: 2.0}}}",
    ),
    "a number": (qt.Target(0.3, residual.uniform()), "{trust: 0.3, residual: uniform}"),
    "names alone": (
        qt.Target(trust.probability(), residual.guided()),
        "{trust: probability, residual: guided}",
    ),
    "parameters": (
        qt.Target(trust.probability_power(0.5), residual.teacher(2.0), value="ce"),
        "{trust: {probability_power: {alpha: 0.5}}, residual: {teacher: {temperature: 2.0}}, value: ce}",
    ),
    "anchored": (
        qt.Target(trust.anchored(trust.entropy(top_k=7), 0.2), residual.reference()),
        "{trust: {anchored: {trust: {entropy: {top_k: 7}}, kl_weight: 0.2}}, residual: reference}",
    ),
    "anchored on a name": (
        qt.Target(trust.anchored(trust.probability(), 0.1), residual.reference()),
        "{trust: {anchored: {trust: probability, kl_weight: 0.1}}, residual: reference}",
    ),
    "guided": (
        qt.Target(trust.constant(0.4), residual.guided(0.3, temperature=2.0)),
        "{trust: {constant: {value: 0.4}}, residual: {guided: {eta: 0.3, temperature: 2.0}}}",
    ),
    "residuals with weights": (
        qt.Target(0.2, [(0.5, residual.teacher()), (-0.25, residual.sharpened(0.8)), (1.0, residual.uniform())]),
        "{trust: 0.2, residual: [{teacher: {}, weight: 0.5}, {sharpened: {beta: 0.8}, weight: -0.25}, uniform]}",
    ),
    "scaled by a rule": (
        qt.Target(trust.probability(), scale=trust.trajectory_weight()),
        "{trust: probability, scale: trajectory_weight}",
    ),
    "scaled by a number": (qt.Target(scale=2.5), "{scale: 2.5}"),
    "any pool": (
        qt.Target(0.5, residual.pool(student=0.2, teacher=0.9, reference=-0.1)),
        "{trust: 0.5, residual: {pool: {student: 0.2, teacher: 0.9, reference: -0.1}}}",
    ),
    "a threshold": (
        qt.Target(trust.probability_threshold(direction="middle", tau_low=0.1, tau_high=0.9)),
        "{trust: {probability_threshold: {direction: middle, tau_low: 0.1, tau_high: 0.9}}}",
    ),
    "columns": (qt.Target(trust.token_mask(), residual.teacher()), "{trust: token_mask, residual: teacher}"),
    "a clipped ratio": (
        qt.Target(trust.clipped_ratio(0.2, clip_high=0.28)),
        "{trust: {clipped_ratio: {clip: 0.2, clip_high: 0.28}}}",
    ),
    "a function of one's own": (qt.Target(halved), f"{{trust: '{__name__}:halved'}}"),
    "a function with needs": (
        qt.Target(teacher_knows_better, residual.teacher()),
        f"{{trust: '{__name__}:teacher_knows_better', residual: teacher}}",
    ),
    "a class of one's own": (qt.Target(Doubt()), f"{{trust: '{__name__}:Doubt'}}"),
    "a class with parameters": (
        qt.Target(Sigmoid(slope=2.0), residual.teacher()),
        f"{{trust: {{'{__name__}:Sigmoid': {{slope: 2.0}}}}, residual: teacher}}",
    ),
    "a class from a class of the library": (
        qt.Target(GentleEntropy(top_k=9)),
        f"{{trust: {{'{__name__}:GentleEntropy': {{top_k: 9}}}}}}",
    ),
    "a class of one's own, anchored": (
        qt.Target(trust.anchored(Sigmoid(), 0.3), residual.reference()),
        f"{{trust: {{anchored: {{trust: '{__name__}:Sigmoid', kl_weight: 0.3}}}}, residual: reference}}",
    ),
    "a pool of one's own": (
        qt.Target(0.5, half_teacher),
        f"{{trust: 0.5, residual: '{__name__}:half_teacher'}}",
    ),
    "a pool of one's own with parameters": (
        qt.Target(0.5, sharpened_for(0.9)),
        f"{{trust: 0.5, residual: {{'{__name__}:sharpened_for': {{beta: 0.9}}}}}}",
    ),
}


@pytest.mark.parametrize("target, text", COMPOSED.values(), ids=COMPOSED)
def test_composed_target_is_read(target, text):
    assert qt.Target.from_config(yaml.safe_load(text)) == target


@pytest.mark.parametrize("target, text", COMPOSED.values(), ids=COMPOSED)
def test_composed_target_through_yaml(target, text):
    again = through_yaml(target)
    assert again == target
    assert again.requires == target.requires
    assert again.needs == target.needs
    assert hash(again) == hash(target)


def test_a_pool_made_directly_is_written_with_its_coefficients():
    target = qt.Target(0.5, residual.Pool(student=0.25, teacher=0.75))
    assert through_yaml(target) == target


@pytest.mark.parametrize("name", [*qt.trust.Rule.known, *qt.residual.Residual.known])
def test_every_part_by_its_name(name):
    """Written with its defaults and read again."""
    is_rule = name in qt.trust.Rule.known
    made = (trust if is_rule else residual).__dict__[name]()
    target = qt.Target(made) if is_rule else qt.Target(0.5, made)
    written = target.to_config()["trust" if is_rule else "residual"]
    assert name in written
    assert through_yaml(target) == target
    assert made.label == name and isinstance(made.__doc__, str) and ">>> " in made.__doc__


# ---- as values


@every_preset
def test_a_target_is_a_plain_value(name):
    target = qt.preset(name)
    written = eval(repr(target), {**vars(trust), **vars(residual), **vars(qt.divergence), "Target": qt.Target})
    for same in (written, copy.deepcopy(target), pickle.loads(pickle.dumps(target)), replace(target)):
        assert same == target and hash(same) == hash(target)
        assert (same.name, same.hyperparameters, same.formula) == (target.name, target.hyperparameters, target.formula)
    half = replace(target, share=0.5)
    assert half != target and half.name == name and half.formula == target.formula


def test_a_copy_with_other_parts_loses_the_name():
    target = qt.preset("target-sft", eta=0.3)
    weighted = replace(target, scale=trust.trajectory_weight())
    assert weighted.name == str(weighted) == "composed" and weighted.hyperparameters == {}
    assert weighted.formula == "Q = γ δ + (1 − γ) π̃,  γ = probability,  π̃ = 1·guided"
    assert weighted.to_config() == target.to_config(composed=True) | {"scale": "trajectory_weight"}
    assert replace(weighted, residual=residual.uniform()).formula.endswith("π̃ = 1·uniform")
    assert replace(target, scale=2, name="mine", formula="a formula").formula == "a formula"


@pytest.mark.parametrize(
    "given, text",
    [
        ([0.5], "residual holds 0.5; write a residual, or a list of (factor, residual)"),
        ([("heavy", residual.teacher())], "weight of a residual is 'heavy'; use a number"),
        (trust.probability(), "residual is Probability(); use one of guided"),
        (0.5, "residual is 0.5; use one of guided"),
    ],
)
def test_what_is_no_residual(given, text):
    with pytest.raises(qt.ConfigError) as caught:
        qt.Target(0.5, given)
    assert text in str(caught.value)


MODULES = [one.name for one in pkgutil.walk_packages(targets.__path__, "qtarget.targets.")]


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples(module):
    assert doctest.testmod(importlib.import_module(module)).failed == 0


def test_a_target_is_its_own_config():
    assert qt.Target.from_config(mine) is mine


@pytest.mark.parametrize("text", ["dft", "{preset: dft}", "p-loss"])
def test_ways_to_write_a_preset(text):
    assert qt.Target.from_config(yaml.safe_load(text)) == qt.preset("dft")


def test_defaults_are_left_out_of_nothing():
    assert qt.preset("eaft", top_k=5).to_config() == {
        "preset": "eaft",
        "top_k": 5,
        "power": 1.0,
        "normalizer": "log_k",
    }
    assert qt.preset("dft").to_config() == "dft"


@pytest.mark.parametrize(
    "config, target",
    [
        (f"{__name__}:mine", mine),
        (f"{__name__}:make_mine", make_mine()),
        ({"preset": f"{__name__}:make_mine", "eta": 0.1, "weight": 2.0}, make_mine(0.1, weight=2.0)),
    ],
    ids=["a target", "a function", "a function with parameters"],
)
def test_target_of_one_s_own(config, target):
    read = qt.Target.from_config(config)
    assert (read.trust, read.residual, read.scale) == (target.trust, target.residual, target.scale)
    assert read.to_config() == config
    assert through_yaml(read) == read
    assert str(read).startswith(f"{__name__}:")


@pytest.mark.parametrize(
    "config, text",
    [
        (3, "target is 3; use a name such as 'dft', a mapping, or my_pkg.my_module:my_target"),
        ("dtf", "target is 'dtf'; did you mean 'dft'? valid: dft, idft"),
        ({"preset": 3}, "target is 3; use a name such as 'dft'"),
        ({"preset": "eaft", "topk": 3}, "parameter of eaft is 'topk'; did you mean 'top_k'? valid:"),
        (
            {"preset": "dft", "trust": 0.5},
            "target names the preset 'dft' and also trust; use one or the other",
        ),
        (
            {"eta": 0.5},
            "target is {'eta': 0.5}; give preset: NAME, or trust: and residual: (presets: sft, dft",
        ),
        (
            {"trust": 0.5, "residul": "teacher"},
            "key of target is 'residul'; did you mean 'residual'? valid: residual",
        ),
        ({"trust": "entropi"}, "trust is 'entropi'; did you mean 'entropy'? valid: affine_probability"),
        ({"trust": True}, "trust is True; use one of affine_probability"),
        ({"trust": 0.5, "residual": "techer"}, "residual is 'techer'; did you mean 'teacher'? valid: guided"),
        ({"trust": 0.5, "residual": 0.5}, "residual is 0.5; use one of guided"),
        ({"trust": {"entropy": {"k": 5}}}, "parameter of trust entropy is 'k'; "),
        ({"trust": {"entropy": 5}}, "trust.entropy is 5; write its parameters as name: value"),
        (
            {"trust": {"entropy": {}, "constant": {}}},
            "write one name with its parameters, as in entropy: {top_k: 20}",
        ),
        ({"trust": {"entropy": {"top_k": 1}}}, "top_k is 1; use a whole number from 2"),
        (
            {"trust": {"anchored": {"trust": "probabilty"}}},
            "trust.trust is 'probabilty'; did you mean 'probability'?",
        ),
        ({"scale": "trajectory"}, "scale is 'trajectory'; did you mean 'trajectory_weight'?"),
        ({"trust": 0.5, "value": "reverse"}, "value is 'reverse'; use one of kl, ce, tempered_kl"),
        (
            {"trust": 0.5, "residual": [{"teacher": {}, "weight": "heavy"}]},
            "weight of a residual is 'heavy'; use a number",
        ),
        (
            "no_such_package.rules:mine",
            "target is 'no_such_package.rules:mine', but importing no_such_package.rules failed",
        ),
        (f"{__name__}:nothing", f"target is '{__name__}:nothing', but {__name__} has no 'nothing'"),
        (
            f"{__name__}:NAMES",
            f"target is '{__name__}:NAMES', which is neither a Target nor a function that returns one",
        ),
        (
            f"{__name__}:not_a_target",
            f"target is '{__name__}:not_a_target', which returned Teacher, not a Target",
        ),
        (
            {"preset": f"{__name__}:make_mine", "etta": 1},
            f"parameter of target {__name__}:make_mine is 'etta'; did you mean 'eta'? valid: eta, weight",
        ),
        ({"trust": f"{__name__}:no_rule"}, f"trust is '{__name__}:no_rule', but {__name__} has no 'no_rule'"),
    ],
)
def test_config_that_means_nothing(config, text):
    with pytest.raises(qt.ConfigError) as caught:
        qt.Target.from_config(config)
    assert text in str(caught.value)


def test_parts_that_are_none():
    with pytest.raises(
        qt.ConfigError, match=r"trust is 'probability'; use one of affine_probability, .*, a number or a function"
    ):
        qt.Target("probability")
    with pytest.raises(qt.ConfigError, match="residual is 'teacher'; use one of guided, "):
        qt.Target(0.5, [(1.0, "teacher")])
    with pytest.raises(qt.ConfigError, match=r"needs is 'entropi'; did you mean 'entropy'\? valid: critical, entropy"):
        trust.needs("entropi")


# ---- rules


def stats_of(**values):
    values = {name: torch.as_tensor(value, dtype=torch.float64) for name, value in values.items()}
    return TokenStats(values, needs=values)


P_Y = torch.tensor([0.05, 0.1, 0.5, 0.9, 1.0], dtype=torch.float64)


@pytest.mark.parametrize(
    "rule, expected",
    [
        (trust.constant(0.3), [0.3] * 5),
        (trust.probability(), P_Y),
        (trust.probability_power(2.0), P_Y**2),
        (trust.probability_threshold(0.07), [0, 1, 1, 1, 1]),
        (trust.probability_threshold(0.07, "lower"), [1, 0, 0, 0, 0]),
        (trust.probability_threshold(direction="middle", tau_low=0.07, tau_high=0.7), [0, 1, 1, 0, 0]),
        (trust.anchored(trust.probability(), 0.5), P_Y / (P_Y + 0.5)),
        (trust.clipped_ratio(0.2), [0.1, 0.2, 1.0, 0, 0]),
        (halved, P_Y / 2),
        (Sigmoid(2.0, -1.0), torch.sigmoid(2 * (P_Y.log() + 1))),
    ],
)
def test_rule(rule, expected):
    stats = stats_of(log_p_y=P_Y.log(), old_logps=[math.log(0.5)] * 5)
    got = trust.as_rule(rule)(stats)
    torch.testing.assert_close(got, torch.as_tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("needed", ["entropy", "weight", "teacher_log_p_y", "rest_mass"])
def test_a_rule_sees_what_it_declares(needed):
    stats = TokenStats({"log_p_y": P_Y.log(), needed: P_Y}, needs={needed})
    assert torch.equal(getattr(stats, needed), P_Y)
    assert torch.equal(stats.log_p_y, P_Y.log())  # the label's log-probability is free


@pytest.mark.parametrize("read", ["entropy", "weight", "teacher_log_p_y", "rest_mass"])
def test_a_rule_that_reads_more_than_it_declares_is_told(read):
    stats = TokenStats({"log_p_y": P_Y.log(), read: P_Y}, needs=frozenset())
    with pytest.raises(AttributeError, match=f"reads stats.{read} without declaring it; add '{read}' to the rule's"):
        getattr(stats, read)


def top_k(k):
    return torch.tensor([[0.5, 0.25, 0.125]], dtype=torch.float64).log()[:, :k]


@pytest.mark.parametrize("name, expected", [("top_k_entropy", math.log(3) - 2 / 3 * math.log(2)), ("top_k_mass", 0.75)])
def test_a_rule_that_reads_the_top_k_declares_it(name, expected):
    told = f"reads stats.{name} without declaring it; add '{name}' to the rule's needs"
    with pytest.raises(AttributeError, match=told):
        getattr(TokenStats({}, top_k, needs=frozenset()), name)(2)
    with pytest.raises(AttributeError, match=told):
        getattr(TokenStats({}), name)(2)
    got = getattr(TokenStats({}, top_k, needs={name}), name)(2)
    torch.testing.assert_close(got, torch.tensor([expected], dtype=torch.float64))


def test_a_statistic_that_does_not_exist_lists_those_that_do():
    with pytest.raises(AttributeError, match="stats has no 'entropi'; it has log_p_y, rest_mass, entropy"):
        _ = TokenStats({"log_p_y": P_Y.log()}).entropi
