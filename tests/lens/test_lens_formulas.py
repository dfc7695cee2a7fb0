"""What the page computes in a browser is what the replay computes: every preset, every rule with every residual, every
divergence."""

import inspect
from dataclasses import dataclass

import pytest
import torch

import lens_records
import qtarget as qt
from lens_pages import JS_FIGURES, Opened, agrees, near
from lens_records import record_from_logits
from published import CASES
from qtarget.lens import page
from qtarget.lens.page_targets import RULES, page_entries
from qtarget.lens.replay import Replay
from qtarget.targets.divergence import Divergence
from qtarget.targets.residual import Residual
from qtarget.targets.trust import Rule

N = 1000
RECORD = lens_records.of_everything(N)
REPLAY = Replay(RECORD)

EXTRA = [
    ("target-sft", {"eta": 0.05}),
    ("target-sft", {"eta": 0.93, "teacher_temperature": 3.0}),
    ("kd", {"temperature": 6.0}),
    ("kd-hybrid", {"kd_weight": 1.0, "temperature": 0.7}),
    ("gem", {"beta": 1.6}),
    ("eaft", {"top_k": 3, "power": 0.5}),
    ("eaft", {"top_k": 40}),
    ("label-smoothing", {"smoothing": 1.0}),
    ("sft-kl", {"direction": "reverse", "kl_weight": 0.5}),
    *(("kd", {"divergence": name}) for name in Divergence.known),
    ("target-sft", {"divergence": "jsd", "eta": 0.3}),
]
CARDS = {entry["name"]: entry["parameters"] for entry in page_entries(RECORD, range(N))}
# A divergence with numbers of its own, and a number without a slider, are no choice of a preset's card; see below.
CHOSEN = [
    case
    for case in CASES
    if {*case.hyperparameters} <= {*CARDS[case.preset]} and not isinstance(case.hyperparameters.get("divergence"), dict)
]
TARGETS = [(case.preset, case.hyperparameters) for case in CHOSEN] + EXTRA


@pytest.fixture(scope="module")
def shared(browser, tmp_path_factory):
    """One page for the tests that only compute."""
    opened = Opened(browser, page.write(RECORD, tmp_path_factory.mktemp("page") / "lens.html"))
    yield opened.page
    opened.close()


@pytest.mark.browser
@pytest.mark.parametrize("name, given", TARGETS, ids=lambda part: str(part))
def test_the_page_computes_what_python_does(shared, name, given):
    agrees(shared.evaluate(JS_FIGURES, [name, given]), qt.preset(name, **given), REPLAY)


def doubt(stats):
    return 2 * (-stats.entropy).exp() * stats.teacher_log_p_y.exp()


doubt.needs = frozenset({"entropy", "teacher_log_p_y"})


@dataclass(frozen=True)
class Between(Residual):
    share: float

    @property
    def coefficients(self):
        return {"student": 1 - self.share, "reference": self.share}


# Each part of the library that has parameters, with some that are no defaults.
PARAMETERS = {
    "constant": {"value": 0.3},
    "probability_power": {"alpha": 0.5, "held": True},
    "affine_probability": {"constant": 0.3, "slope": 0.6, "held": True},
    "clipped_probability": {"low": 0.05, "high": 0.6},
    "mixture_ratio": {"gamma": 0.2},
    "shaped_probability": {"gamma": 0.3},
    "confidence_gap": {"confidence": 0.8},
    "focal": {"gamma": 1.5, "held": False},
    "probability_threshold": {"tau": 0.2, "direction": "lower"},
    "entropy": {"top_k": 7, "power": 2.0, "normalizer": 3.0},
    "surprise_power": {"strength": 0.7, "beta": 2.0, "low": 0.3, "high": 1.5},
    "toward_half": {"weight": 0.6, "top_k": 3, "tau": 0.7},
    "clipped_ratio": {"clip": 0.3},
    "reference_lower_mass": {"threshold": 0.3},
    "reference_threshold": {"perplexity": 6.0},
    "gibbs": {"beta": 3.0, "prior": "teacher"},
    "anchored": {"trust": qt.trust.entropy(5), "kl_weight": 0.7},
    "teacher": {"temperature": 1.5},
    "guided": {"eta": 0.3, "temperature": 2.0},
    "tempered": {"temperature": 0.8},
    "sharpened": {"beta": 0.6, "h": "logsigmoid"},
    "pool": {"student": 0.5, "teacher": 0.3, "reference": 0.4},
    "jsd": {"beta": 0.1},
    "skew_kl": {"alpha": 0.3},
    "skew_reverse_kl": {"alpha": 0.4},
    "alpha": {"alpha": 0.3},
    "todi": {"slope": 2.0},
}
RULE = {name: rule(**PARAMETERS.get(name, {})) for name, rule in Rule.known.items() if name != "offset_mass"}
POOL = {name: pool(**PARAMETERS.get(name, {})) for name, pool in Residual.known.items()}
DIVERGENCE = {name: kind(**PARAMETERS.get(name, {})) for name, kind in Divergence.known.items()}
DIVERGENCE |= {"alpha 0": qt.divergence.alpha(0.0), "todi 0": qt.divergence.todi(0.0), "of one's own": torch.tanh}
# Over the uniform residual the error has a bound, over the teacher it may have none, over the others R is not exact.
APPROACHED = [POOL["uniform"], POOL["pool"], POOL["sharpened"], qt.residual.teacher(), qt.residual.guided(0.3)]
SCALED = {
    "half": qt.Target(0.9, qt.residual.teacher(), scale=0.5),
    "by entropy": qt.Target(qt.trust.probability(), qt.residual.reference(), scale=qt.trust.entropy()),
    "by the offset's mass": qt.Target(0.4, POOL["sharpened"], scale=qt.trust.offset_mass()),
    "by the mass of no offset": qt.Target(0.4, qt.residual.teacher(), scale=qt.trust.offset_mass()),
    "trust is the offset's mass": qt.Target(qt.trust.offset_mass(), POOL["sharpened"]),
    "a share": qt.Target(qt.trust.probability(), qt.residual.guided(0.5), share=0.3),
    "no share": qt.Target(qt.trust.probability(), qt.residual.guided(0.5), share=0.0),
    "a residual of one's own": qt.Target(qt.trust.probability(), Between(0.7)),
    "two residuals": qt.Target(0.4, [(0.7, qt.residual.teacher()), (-0.2, qt.residual.uniform())]),
    "a residual of weight 0": qt.Target(0.4, [(0.0, qt.residual.teacher()), (1.0, qt.residual.student())]),
    "a pool with a negative coefficient": qt.Target(0.4, qt.residual.pool(student=1.5, reference=-0.5)),
    "a number without a slider": qt.preset("symmetric-ce", beta=0.25),
    "a rule that the page has not": qt.preset("prift", by="mass", threshold=0.05),
    "such a rule in another": qt.Target(qt.trust.anchored(qt.trust.concentration_power(), 0.3), qt.residual.teacher()),
    "a rule of one's own": qt.Target(doubt, qt.residual.guided(0.2), scale=0.5),
    "a rule of one's own, in a share of two": qt.Target(
        doubt, [(0.5, qt.residual.teacher()), (0.5, qt.residual.reference())], share=0.6
    ),
}


def figures_of(view, target):
    """Of a target that is put on the page."""
    (entry,) = (e for e in page_entries(RECORD, range(N), target) if e.get("own"))
    view.evaluate("entry => { lens.D.targets[0] = entry; }", {**entry, "name": "put there"})
    return view.evaluate(JS_FIGURES, ["put there", {}])


@pytest.mark.browser
@pytest.mark.parametrize("rule", RULE)
def test_a_rule(shared, rule):
    target = qt.Target(RULE[rule], qt.residual.teacher())
    agrees(figures_of(shared, target), target, REPLAY)


@pytest.mark.browser
@pytest.mark.parametrize("pool", POOL)
def test_a_residual(shared, pool):
    for rule in (qt.trust.probability(), qt.trust.anchored(kl_weight=0.7)):
        target = qt.Target(rule, POOL[pool])
        agrees(figures_of(shared, target), target, REPLAY)


@pytest.mark.browser
@pytest.mark.parametrize("divergence", DIVERGENCE)
def test_a_divergence_from_residuals(shared, divergence):
    for pool in APPROACHED:
        target = qt.Target(0.7, [(0.4, pool, DIVERGENCE[divergence])])
        agrees(figures_of(shared, target), target, REPLAY)


@pytest.mark.browser
@pytest.mark.parametrize("case", SCALED)
def test_scales_shares_and_rules_of_ones_own(shared, case):
    agrees(figures_of(shared, SCALED[case]), SCALED[case], REPLAY)


@pytest.mark.browser
def test_the_page_knows_every_part_of_the_library(shared):
    """Who adds a residual or a divergence to targets/ adds it to targets.js; a rule may do without."""
    assert {*shared.evaluate("Object.keys(lens.RULES)")} == {*RULES.split(), "given"}
    assert {*shared.evaluate("Object.keys(lens.POOLS)")} == {*Residual.known}
    assert {*shared.evaluate("Object.keys(lens.DIVERGENCES)")} == {*Divergence.known, "given"}
    parts = {**Rule.known, **Residual.known, **Divergence.known}
    assert {*PARAMETERS} <= {*parts}
    for name, part in parts.items():
        assert name in PARAMETERS or not inspect.signature(part).parameters, name


@pytest.mark.browser
def test_tails_below_the_floor_and_a_whole_vocabulary(open_page, tmp_path):
    """Where all that is left weighs less than one kept token, and where nothing is left, the bounds are others."""
    for k, vocab in ((20, 23), (24, 24)):
        z = lens_records.random_logits(300, vocab, 9)
        record = record_from_logits(
            z, lens_records.random_labels(z), teacher=z + lens_records.random_logits(300, vocab, 1), k=k
        )
        view = open_page(page.write(record, tmp_path / "lens.html"))
        for name, given in (("gem", {"beta": 0.4}), ("kd", {"temperature": 0.5}), ("kd", {}), ("target-sft", {})):
            script = JS_FIGURES.replace("{ length: 40 }", "{ length: 0 }")
            got, figures = view.evaluate(script, [name, given]), Replay(record).figures(qt.preset(name, **given))
            near(got["update"], figures.update, "update", 5)
            near(got["updateError"], figures.update_error, "error of the update", 5)
            near(got["qError"], figures.q_error, "error of Q", 5)
            assert k < vocab or max(got["updateError"]) < 1e-9


@pytest.mark.browser
def test_a_changed_formula_is_noticed(shared):
    """The comparison above can fail: eta off by a hundredth, a lost tail."""
    got = shared.evaluate(JS_FIGURES, ["target-sft", {"eta": 0.51}])
    with pytest.raises(AssertionError, match="update"):
        near(got["update"], REPLAY.figures(qt.preset("target-sft", eta=0.5)).update, "update")
