"""A preset and a divergence that are registered while the tests run go through every room by their entries alone."""

import importlib
import json
import re
import sys

import pytest
import torch

import qtarget as qt
import quick_runs
import teacher_caches
import tiny_models
from engine_and_oracle import assert_engine_is_oracle, ordinary_batch
from lens_pages import JS_FIGURES, agrees
from qtarget.cli.__main__ import main
from qtarget.lens import record
from qtarget.lens.replay import Replay
from qtarget.targets.divergence import Divergence
from qtarget.targets.presets import entry
from teacher_caches import VOCAB, build_cache, wider_teacher

NAME = "half-guided"
# A class that is registered, and a function of d.
BY = {"chi_square": {"chi_square": {"share": 0.3}}, "my_presets:bent": "my_presets:bent"}
MODULE = '''"""An objective of somebody's own, of a rule and a residual that the library has."""

from dataclasses import dataclass

from qtarget import Target, presets, residual, trust
from qtarget.targets.divergence import Divergence
from qtarget.targets.parts import named
from qtarget.targets.presets.printed import kl, label_log_p


@named("chi_square")
@dataclass(frozen=True)
class ChiSquare(Divergence):
    """½ Σ (p − R)²/(s p + (1 − s) R)"""

    share: float = 0.5

    def score(self, d):
        x = d.exp()
        middle = 1 + self.share * (x - 1)
        return (x - 1) / middle - 0.5 * self.share * ((x - 1) / middle) ** 2

    def times_p(self, p, log_p, d):
        return p * self.score(d.clamp(max=300))

    def value(self, p, R, d):
        return 0.5 * (p - R) ** 2 / (self.share * p + (1 - self.share) * R).clamp(min=1e-300)


def bent(d):
    return d + 0.5 * d.tanh()


def printed(logits, labels, *, alpha, doubt, teacher_logits=None, vocab_size=None):
    """(1 − p_y^α)/α + (1 − sg p_y^α) KL(sg R ‖ p),  R = softmax((1 − d) z_T + d z)"""
    log_p_y = label_log_p(logits, labels)
    loss = -(alpha * log_p_y).expm1() / alpha
    log_t = teacher_logits[:, :vocab_size].log_softmax(-1)
    log_r = ((1 - doubt) * log_t + doubt * logits.log_softmax(-1)[:, :vocab_size]).log_softmax(-1)
    return loss + (1 - (alpha * log_p_y).exp().detach()) * kl(log_r, logits.log_softmax(-1))


@presets.preset(
    "half-guided",
    formula="L = (1 − p_y^α)/α + (1 − p_y^α) KL(R ‖ p),  R = softmax((1 − d) z_T + d z)",
    trusts="p_y^alpha",
    rest="teacher^(1 − doubt) · student^doubt",
    source="a test",
    printed=printed,
)
def half_guided(alpha: float = 0.5, doubt: float = 0.25) -> Target:
    """Trust the likely label, and let a teacher that is half believed steer the rest."""
    return Target(trust=trust.probability_power(alpha), residual=residual.guided(1 - doubt))
'''


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    """The preset's module is imported; what it registers is gone afterwards."""
    folder = tmp_path_factory.mktemp("preset")
    (folder / "my_presets.py").write_text(MODULE, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setattr(entry, "ENTRIES", dict(entry.ENTRIES))
        patch.setattr(Divergence, "known", dict(Divergence.known))
        yield importlib.import_module("my_presets")
        del sys.modules["my_presets"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return teacher_caches.write_world(tmp_path_factory.mktemp("world"))


def test_python_and_yaml_know_it(preset):
    assert qt.presets.names()[-1] == NAME
    target = qt.preset(NAME, alpha=2.0)
    assert str(target) == "half-guided(alpha=2.0, doubt=0.25)" and target.requires == {"teacher"}
    assert qt.Target.from_config(json.loads(json.dumps(target.to_config()))) == target
    assert qt.Target.from_config(target.to_config(composed=True)) == target
    assert qt.Target.from_config({"preset": "my_presets:half_guided", "alpha": 2.0}) == target
    assert qt.preset(NAME, doubt=1.0).requires == frozenset(), "the student alone"
    with pytest.raises(qt.ConfigError, match="parameter of half-guided is 'alhpa'; did you mean 'alpha'"):
        qt.preset(NAME, alhpa=2.0)
    with pytest.raises(qt.ConfigError, match="target is 'half-guied'; did you mean 'half-guided'"):
        qt.preset("half-guied")


def test_the_command_line_lists_it(preset, capsys):
    assert main(["targets"]) == 0
    assert NAME in capsys.readouterr().out
    assert main(["targets", "show", NAME]) == 0
    shown = capsys.readouterr().out
    assert "Trust the likely label" in shown and "alpha: 0.5, doubt: 0.25" in shown and "teacher" in shown
    assert main(["targets", "show", NAME, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["formula"].startswith("L = (1 − p_y^α)/α")


@pytest.mark.parametrize("given", [{}, {"alpha": 2.0, "doubt": 0.7}], ids=str)
def test_oracle_and_engine_have_the_gradient_of_its_printed_loss(preset, given):
    batch, target = ordinary_batch(), qt.preset(NAME, **given)
    logits = batch.logits().requires_grad_()
    printed = qt.presets.printed_loss(target)(logits, batch.labels, batch.oracle_inputs(target))
    (wanted,) = torch.autograd.grad(printed.sum(), logits)
    oracle = qt.target_loss(logits, batch.labels, target, reduction="none", **batch.oracle_inputs(target))
    (got,) = torch.autograd.grad(oracle.loss.sum(), logits)
    assert torch.allclose(got, wanted, rtol=1e-10, atol=1e-12)
    assert torch.allclose(oracle.loss, printed, rtol=1e-10)
    hidden = batch.hidden.clone().requires_grad_()
    engine = qt.linear_target_loss(hidden, batch.weight, batch.labels, target, **batch.engine_inputs(target))
    engine.loss.backward()
    assert torch.allclose(hidden.grad, wanted @ batch.weight / len(batch.labels), rtol=1e-10, atol=1e-12)
    assert_engine_is_oracle(batch, target)


def test_verify_reads_its_printed_loss(preset, world, capsys):
    words = ["verify", "--config", world / "config.yaml", "--target", f"{{preset: {NAME}, doubt: 0.4}}", "--json", "-"]
    assert main([str(word) for word in words]) == 0
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    found = checks["published formula"]
    assert found["status"] == "pass" and list(found["figures"])[2:] == [f"{NAME}(alpha=0.5, doubt=0.4)"]


@pytest.mark.browser
def test_the_lens_shows_it(preset, world, open_page, tmp_path, capsys):
    """Captured, replayed, and on the page in a browser: chosen, with sliders that move it, and among all methods."""
    words = f"lens capture --config {world}/config.yaml --rows 6 -o {tmp_path}/capture --target {NAME}"
    assert main(words.split()) == 0
    assert main(["lens", "show", str(tmp_path / "capture")]) == 0
    assert f"target {NAME}(alpha=0.5, doubt=0.25)" in capsys.readouterr().out
    assert main(["lens", "report", str(tmp_path / "capture"), "-o", str(tmp_path / "lens.html")]) == 0
    view = open_page(tmp_path / "lens.html")
    assert (view.input_value("#name-A"), view.input_value("#name-B")) == (NAME, "sft")
    assert view.text_content("#objective-A .formula") == qt.presets.describe(NAME).formula
    assert view.text_content("#objective-A .says") == f"{qt.presets.describe(NAME).summary} a test"
    replay = Replay(record.read(tmp_path / "capture"))
    view.fill("#alpha-A", "1.5")
    view.fill("#doubt-A", "0.4")
    view.wait_for_function("() => lens.state.A.summary")
    truth = replay.summary(replay.figures(qt.preset(NAME, alpha=1.5, doubt=0.4)))
    shown = view.inner_text("#figures-A")
    assert re.search(rf"mean trust\s+{truth.trust:.3f}", shown), shown
    script = JS_FIGURES.replace("{ length: 40 }", "{ length: 0 }")  # its texts are no ids
    for given in ({}, {"alpha": -0.5, "doubt": 0.99}):
        agrees(view.evaluate(script, [NAME, given]), qt.preset(NAME, **given), replay)
    results = view.evaluate("() => lens.ready")
    assert {*results} == {name for name in qt.presets.names() if "reference" not in qt.preset(name).requires}
    assert f"{NAME}, this run" in view.inner_text("#compare-view")


@pytest.mark.parametrize("by", BY)
def test_a_divergence_in_python_yaml_oracle_and_engine(preset, by):
    target = qt.preset("kd-hybrid", divergence=BY[by])
    assert qt.Target.from_config(json.loads(json.dumps(target.to_config()))) == target
    assert qt.Target.from_config(target.to_config(composed=True)) == target
    assert_engine_is_oracle(ordinary_batch(), target)


@pytest.fixture(scope="module")
def cache(world, tmp_path_factory):
    """Of the whole vocabulary."""
    return build_cache(world, tmp_path_factory.mktemp("cache") / "whole", "--k", VOCAB, "--cache_dtype", "float32")


TRAINED = [{"preset": NAME}, *({"preset": "kd", "divergence": by} for by in BY.values())]


@pytest.mark.parametrize("target", TRAINED, ids=str)
def test_a_step_of_the_trainer_and_from_a_cache_is_autograds(preset, cache, tmp_path, target):
    def loss(logits, labels, **given):
        return qt.target_loss(logits, labels, qt.Target.from_config(target), reduction="none", **given).loss

    rows = quick_runs.tokenised_rows(tiny_models.conversation_dataset(4))
    settings = {"target": target, "max_length": 120}  # the cache's
    wanted = quick_runs.change_by_autograd(tiny_models.trained_model(), rows, loss, teacher=wider_teacher())
    for name, teacher in (("live", {"teacher_model": wider_teacher()}), ("cached", {"teacher_cache": str(cache)})):
        got = quick_runs.change_by_training(tiny_models.trained_model(), tmp_path / name, **settings, **teacher)
        quick_runs.assert_same_change(got, wanted)


@pytest.mark.parametrize("by", BY)
def test_verify_passes_with_a_divergence_and_names_what_is_not_printed(preset, world, by, capsys):
    target = json.dumps({"preset": "kd", "divergence": BY[by]})
    words = ["verify", "--config", world / "config.yaml", "--target", target, "--json", "-"]
    assert main([str(word) for word in words]) == 0
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["gradient is p - Q"]["status"] == checks["step is autograd's"]["status"] == "pass"
    assert "has no printed loss" in checks["published formula"]["told"]


@pytest.mark.browser
@pytest.mark.parametrize("by", BY)
def test_the_lens_shows_a_divergence(preset, world, open_page, tmp_path, by):
    """By a table; from a capture alone a function's code is not run, so it is asked for."""
    target = qt.preset("kd", divergence=BY[by])
    asked = json.dumps(target.to_config())
    assert main(["lens", "capture", "--config", f"{world}/config.yaml", "--rows", "6", "-o", f"{tmp_path}/c"]) == 0
    assert main(["lens", "report", f"{tmp_path}/c", "-o", f"{tmp_path}/lens.html", "--target", asked]) == 0
    view = open_page(tmp_path / "lens.html")
    name = view.input_value("#name-B")
    assert name == str(target), "beside the run's own"
    script = JS_FIGURES.replace("{ length: 40 }", "{ length: 0 }")
    agrees(view.evaluate(script, [name, {}]), target, Replay(record.read(tmp_path / "c")))
