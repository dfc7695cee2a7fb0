"""The targets of a page: a run's own is on it whatever it is, and what cannot be there is named with the reason."""

import json
import sys

import pytest

import lens_records
import qtarget as qt
import tiny_models
from lens_pages import JS_FIGURES, agrees
from qtarget.lens import capture, page, record, sliders
from qtarget.lens.page_targets import manifest_targets, page_entries, targets_of_run
from qtarget.lens.replay import Replay
from qtarget.targets.objective import Objective
from qtarget.targets.presets.entry import ENTRIES
from quick_runs import quick_trainer

N = 1000
COMPOSED = {
    "trust": {"anchored": {"trust": {"probability_power": {"alpha": 0.5}}, "kl_weight": 0.2}},
    "residual": [{"weight": 0.7, "guided": {"eta": 0.3}}, {"weight": 0.3, "teacher": {"temperature": 2.0}}],
    "scale": {"constant": {"value": 0.8}},
}
OWN = '''"""Targets of somebody's own. Importing this leaves a trace."""

import pathlib

import torch

import qtarget as qt

pathlib.Path(__file__).with_name("imported").touch()


@qt.trust.needs("entropy")
def doubt(stats):
    return (-stats.entropy).exp()


def broken(stats):
    raise RuntimeError("no number for this token")


def known_parts(eta=0.4):
    return qt.Target(qt.trust.probability(), qt.residual.guided(eta))


own_rule = qt.Target(doubt, qt.residual.guided(0.2))
broken_rule = qt.Target(broken, qt.residual.teacher())
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The folder of a module ``my_targets``."""
    (tmp_path / "my_targets.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_targets", raising=False)
    yield tmp_path
    sys.modules.pop("my_targets", None)


def of_a_run(target, **manifest):
    """A record whose manifest names the run's target."""
    made = lens_records.of_everything(N)
    made.manifest |= {"target": target, **manifest}
    return made


def entry(made, name, asked=None):
    (found,) = (e for e in page_entries(made, range(N), asked) if e["name"] == name)
    return found


def label(view, key, name):
    options = view.eval_on_selector_all(f"#name-{key} option", "found => found.map(o => [o.value, o.textContent])")
    return dict(options)[name]


@pytest.mark.browser
def test_a_composed_target_of_the_run(open_page, tmp_path):
    """It is chosen, its parts' parameters have sliders, and a slider moves it."""
    made = of_a_run(COMPOSED)
    view = open_page(page.write(made, tmp_path / "lens.html"))
    assert (view.input_value("#name-A"), view.input_value("#name-B")) == ("composed", "sft")
    assert label(view, "A", "composed") == "composed, this run"
    agrees(view.evaluate(JS_FIGURES, ["composed", {}]), qt.Target.from_config(COMPOSED), Replay(made))
    sliders_shown = view.eval_on_selector_all("#objective-A input[type=range]", "found => found.map(e => e.id)")
    assert sliders_shown == ["alpha-A", "kl_weight-A", "eta-A", "temperature-A", "temperature_5-A"]
    moved = json.loads(json.dumps(COMPOSED))
    moved["residual"][0]["guided"] = {"eta": 0.9}
    moved["residual"][1]["teacher"]["temperature"] = 0.5
    view.fill("#eta-A", "0.9")
    view.fill("#temperature_5-A", "0.5")
    assert view.evaluate("lens.state.A.hyper.eta") == 0.9
    got = view.evaluate(JS_FIGURES, ["composed", {"eta": 0.9, "temperature_5": 0.5}])
    agrees(got, qt.Target.from_config(moved), Replay(made))
    results = view.evaluate("() => lens.ready")
    assert list(results) == ["composed", *qt.presets.names()]


@pytest.mark.browser
@pytest.mark.parametrize("config, name, other", [("dft", "dft", "sft"), ("sft", "sft", "target-sft")])
def test_a_preset_of_the_run_is_chosen_and_stands_there_once(open_page, tmp_path, config, name, other):
    view = open_page(page.write(of_a_run(config), tmp_path / "lens.html"))
    assert (view.input_value("#name-A"), view.input_value("#name-B")) == (name, other)
    assert label(view, "A", name) == f"{name}, this run"
    assert sorted(view.evaluate("lens.D.targets.map((e) => e.name)")) == sorted(qt.presets.names())


ALONE = lens_records.random_logits(N, 300)
MODELS = {"teacher": ALONE + lens_records.random_logits(N, 300, 1), "reference": ALONE + 0.3}


@pytest.mark.browser
@pytest.mark.parametrize("captured", [(), ("reference",), ("teacher", "reference")], ids=str)
def test_every_preset_is_shown_or_says_which_model_was_not_captured(open_page, tmp_path, captured):
    models = {name: MODELS[name] for name in captured}
    made = lens_records.record_from_logits(ALONE, lens_records.random_labels(ALONE), **models)
    view = open_page(page.write(made, tmp_path / "lens.html"))
    lacking = {name: {*MODELS} & qt.preset(name).requires - {*captured} for name in qt.presets.names()}
    why = {name: f"no {' and no '.join(sorted(models))} captured" if models else "" for name, models in lacking.items()}
    told = "lens.D.targets.map(({ name }) => [name, lens.hindrance(lens.D, name, lens.startOf(lens.D, name))])"
    assert dict(view.evaluate(told)) == why
    assert [*view.evaluate("() => lens.ready")] == [name for name in why if not why[name]]
    assert view.inner_text("#missing") == ""
    if captured == ("reference",):  # what a choice would need is told beside it
        view.select_option("#name-A", "gift")
        shown = "found => found.map(o => [o.textContent, o.disabled])"
        options = view.eval_on_selector_all("#toward-A option", shown)
        assert options == [["reference", False], ["teacher (no teacher captured)", True]]


@pytest.mark.browser
def test_a_preset_of_the_run_with_its_own_numbers(open_page, tmp_path):
    made = of_a_run({"preset": "target-sft", "eta": 0.3, "teacher_temperature": 9.0})
    view = open_page(page.write(made, tmp_path / "lens.html"))
    name = "target-sft(eta=0.3, teacher_temperature=9.0)"
    assert view.input_value("#name-A") == name
    assert view.input_value("#eta-A") == "0.3" and view.input_value("#teacher_temperature-A") == "9"
    target = qt.preset("target-sft", eta=0.3, teacher_temperature=9.0)
    agrees(view.evaluate(JS_FIGURES, [name, {}]), target, Replay(made))
    assert set(view.evaluate("() => lens.ready")) == {name, *qt.presets.names()}


@pytest.mark.browser
def test_a_rule_of_somebodys_own(open_page, tmp_path, own):
    """Not imported from a capture and named; evaluated where the user names it."""
    made = of_a_run("my_targets:own_rule")
    view = open_page(page.write(made, tmp_path / "lens.html"))
    assert not (own / "imported").exists()
    assert view.input_value("#name-A") == "target-sft"
    why = "my_targets:own_rule is code, which is not run from a capture; name the target with --target"
    assert view.inner_text("#missing") == f"my_targets:own_rule is not shown: {why}."
    assert label(view, "A", "my_targets:own_rule") == "my_targets:own_rule, this run (not shown, see below)"
    assert set(view.evaluate("() => lens.ready")) == {*qt.presets.names()}
    assert why in view.inner_text("#compare-view")

    target = qt.Target.from_config("my_targets:own_rule")
    view = open_page(page.write(made, tmp_path / "lens.html", target=target))
    assert view.input_value("#name-A") == "my_targets:own_rule" and view.inner_text("#missing") == ""
    agrees(view.evaluate(JS_FIGURES, ["my_targets:own_rule", {}]), target, Replay(made))
    assert "my_targets:own_rule, this run" in view.inner_text("#compare-view")


@pytest.mark.browser
def test_what_this_page_does_not_know_is_named(open_page, tmp_path):
    """A rule that is in targets/ and not in targets.js."""
    view = open_page(page.write(of_a_run(COMPOSED), tmp_path / "lens.html"))
    for told, form in (
        ("the rule odd", {"trust": {"odd": {}}}),
        ("the residual odd", {"residual": ["odd"]}),
        ("the divergence odd", {"residual": [{"uniform": {}, "divergence": "odd"}]}),
        ("what odd is next to the residual uniform", {"residual": [{"uniform": {}, "odd": "jsd"}]}),
    ):
        changed = {"forms": [{"when": {}, "sliders": [], "trust": "probability", "residual": ["student"], **form}]}
        view.evaluate("changed => Object.assign(lens.D.targets[0], changed)", changed)
        assert view.evaluate("lens.hindrance(lens.D, 'composed', {})") == f"this page does not know {told}"


def test_a_rule_that_fails_is_named(own):
    failing = qt.Target.from_config("my_targets:broken_rule")
    told = entry(of_a_run(None), "my_targets:broken_rule", failing)
    assert told["reason"] == "my_targets:broken failed: RuntimeError: no number for this token"
    other = qt.Target(lambda stats: stats.teacher_log_p_y.exp(), qt.residual.student())
    assert "without declaring it" in entry(of_a_run(None), "composed", other)["reason"]


def test_a_preset_that_fails_at_its_defaults_is_named(monkeypatch):
    broken = qt.presets.Preset("broken", lambda eta=2.0: qt.Target(1.0, qt.residual.guided(eta)), "", "", "", "")
    monkeypatch.setitem(ENTRIES, "broken", broken)
    assert "broken failed: target broken: eta is 2.0" in entry(of_a_run(None), "broken")["reason"]


def test_two_composed_targets_are_told_apart():
    asked = qt.Target(qt.trust.probability(), qt.residual.uniform())
    made = of_a_run(COMPOSED)
    names = [(e["name"], e.get("own")) for e in page_entries(made, range(N), asked)][:3]
    assert names == [("composed", "this run"), ("composed, asked for", "asked for"), ("sft", None)]
    names = [(e["name"], e.get("own")) for e in page_entries(made, range(N), qt.Target.from_config(COMPOSED))]
    assert names[:2] == [("composed", "this run"), ("sft", None)]


def test_what_a_capture_records_of_its_run(own, tmp_path):
    """The parts of a target whose name is code, schedules as they end, a target for each source."""
    single = manifest_targets(Objective.single("my_targets:known_parts"))
    assert single["target"] == "my_targets:known_parts"
    parts = qt.Target(qt.trust.probability(), qt.residual.guided(0.4))
    assert targets_of_run(of_a_run(**single)) == {"my_targets:known_parts": parts}
    rising = {"preset": "target-sft", "eta": {"schedule": "linear", "from": 0.0, "to": 0.7, "steps": 9}}
    ((name, target),) = targets_of_run(of_a_run(**manifest_targets(Objective.single(rising)))).items()
    assert "eta 0 → 0.7 (linear, 9 steps)" in name and target.hyperparameters["eta"] == 0.7
    mixed = manifest_targets(
        Objective.by_source({"math": "dft", "chat": {"preset": "kd", "temperature": 2.0}}, "source")
    )
    assert [*targets_of_run(of_a_run(**mixed))] == ["math: dft", "chat: kd(temperature=2.0)"]
    assert manifest_targets(Objective.single({"preset": "dft"})) == {"target": "dft"}, (
        "nothing more where the target says it"
    )
    settings = {"target": "my_targets:known_parts", "teacher_model": tiny_models.trained_model(seed=7)}
    made = quick_trainer(tiny_models.trained_model(), tmp_path / "run", tiny_models.conversation_dataset(3), **settings)
    held = record.read(capture.capture(made, tmp_path / "capture", rows=3, top_k=7))
    assert page_entries(held, range(len(held)))[0]["name"] == "my_targets:known_parts"


def test_an_older_capture_of_a_schedule_is_named():
    rising = {"preset": "target-sft", "eta": {"schedule": "linear", "from": 0.0, "to": 0.7}}
    (why,) = targets_of_run(of_a_run(rising)).values()
    assert isinstance(why, str) and why.endswith("; capture again")


# -- sliders -----------------------------------------------------------------------------------------------------


def of(build, **hyperparameters):
    made = qt.presets.Preset("made", build, "", "", "", "")
    return sliders.of_preset(made, hyperparameters)


def test_a_number_in_another_way_has_no_slider():
    """Squared, it does not move; the others do."""

    def build(eta: float = 0.5, sharpness: float = 3.0):
        return qt.Target(qt.trust.probability_power(sharpness**2), qt.residual.guided(eta))

    controls, (form,) = of(build)
    assert [*controls] == form["sliders"] == ["eta"]
    assert form["trust"]["probability_power"]["alpha"] == 9.0
    assert of(build, sharpness=2.0)[1][0]["trust"]["probability_power"]["alpha"] == 4.0


def test_a_bend_is_found():
    """A number that follows its slider near the start and elsewhere does not."""

    def build(eta: float = 0.5):
        return qt.Target(qt.trust.probability(), qt.residual.guided(min(eta, 0.8)))

    assert of(build)[0] == {}


def test_a_range_ends_where_the_preset_refuses():
    def build(tau: float = 0.25):
        return qt.Target(qt.trust.confidence_gap(1 - tau))  # above ½ and below 1

    controls, _ = of(build)
    assert (controls["tau"]["min"], controls["tau"]["max"]) == (0.01, 0.49)


def test_a_hyperparameter_of_a_new_name_has_a_range_around_its_default():
    def build(sureness: float = 2.0, doubt: float = 0.25):
        return qt.Target(qt.trust.probability_power(sureness), qt.residual.guided(1 - doubt))

    controls, (form,) = of(build)
    assert (controls["sureness"]["min"], controls["sureness"]["max"]) == (0.2, 8.0)
    assert (controls["doubt"]["min"], controls["doubt"]["max"]) == (0.01, 1)
    assert form["residual"] == [{"guided": {"eta": {"of": "doubt", "times": -1, "plus": 1}, "temperature": 1.0}}]


@pytest.mark.parametrize("name", qt.presets.names())
def test_a_form_is_the_preset_wherever_its_sliders_stand(name):
    preset = qt.presets.describe(name)
    controls, forms = sliders.of_preset(preset, {})
    for form in forms:
        parts = {key: part for key, part in form.items() if key not in ("when", "sliders")}
        starts = {key: controls[key]["start"] for key in form["sliders"]}
        alone = [key for key in form["sliders"] if key not in ("tau_low", "tau_high")]  # which limit each other
        ends = [{key: controls[key][end]} for key in alone for end in ("min", "max")]
        for numbers in ({}, *ends):
            target = qt.Target.from_config(sliders.filled_in(parts, starts | numbers))
            truth = preset.build(**starts | numbers | form["when"])
            assert (target.trust, target.scale, target.requires) == (truth.trust, truth.scale, truth.requires)
