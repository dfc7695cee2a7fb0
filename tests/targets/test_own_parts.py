"""Rules, residuals and presets of one's own: docs/targets.md as it stands, from YAML to the engine's gradient."""

import importlib
import json
import re
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import yaml

import qtarget as qt
from engine_and_oracle import assert_engine_is_oracle, ordinary_batch
from qtarget.cli.__main__ import main
from qtarget.targets.presets import entry, labels
from qtarget.targets.schedule import ScheduledTarget

PAGE = (Path(__file__).parents[2] / "docs" / "targets.md").read_text(encoding="utf-8")
RECIPES = [yaml.safe_load(block)["target"] for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.S)]


@pytest.fixture
def my_rules(tmp_path, monkeypatch):
    """The page's Python as a module, imported; what it registers is gone afterwards."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    (tmp_path / "my_rules.py").write_text("\n\n".join(blocks), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(entry, "ENTRIES", dict(entry.ENTRIES))
    yield importlib.import_module("my_rules")
    del sys.modules["my_rules"]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_the_pages_recipes_reach_the_engine(recipe, my_rules):
    target = ScheduledTarget.read(recipe).at(5, 10)
    again = qt.Target.from_config(json.loads(json.dumps(target.to_config())))
    assert again == target and str(again) == str(target)
    assert_engine_is_oracle(ordinary_batch(), target)


def test_the_page_shows_schedules_a_rule_a_residual_a_divergence_and_a_preset():
    assert len(RECIPES) == 7


@pytest.mark.parametrize("named", ["certain", "my_rules:certain"])
def test_a_preset_of_ones_own_is_a_preset(named, my_rules, capsys):
    target = qt.Target.from_config({"preset": named, "power": 2.0})
    assert target == qt.preset("certain", power=2.0) and target.name == named
    assert target.formula == "L = −sg(a) log p_y;  a = (p_y e^(−H))^power"
    assert target.to_config() == {"preset": named, "power": 2.0}
    assert target.to_config(composed=True) == {"trust": {"my_rules:Certainty": {"power": 2.0}}, "residual": "student"}
    assert main(["targets", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[-1]["name"] == "certain"


def test_its_printed_loss_has_the_engines_gradient(my_rules):
    batch, target = ordinary_batch(), qt.Target.from_config("my_rules:certain")
    logits = batch.logits().requires_grad_()
    (printed,) = torch.autograd.grad(qt.presets.printed_loss(target)(logits, batch.labels, {}).sum(), logits)
    leaf = batch.hidden.clone().requires_grad_()
    qt.linear_target_loss(leaf, batch.weight, batch.labels, target, reduction="sum").loss.backward()
    assert torch.allclose(leaf.grad, printed @ batch.weight, rtol=1e-10, atol=1e-12)


def test_a_function_of_statistics_of_whole_rows(tmp_path, monkeypatch):
    code = """
        import qtarget as qt

        @qt.trust.needs("sum_sq", "rank")
        def first_or_sure(stats):
            return (stats.rank == 1) | (stats.sum_sq > 0.5)
    """
    (tmp_path / "rules_of_rows.py").write_text(textwrap.dedent(code), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert_engine_is_oracle(ordinary_batch(), qt.Target.from_config({"trust": "rules_of_rows:first_or_sure"}))


def test_a_preset_without_a_printed_loss(monkeypatch):
    monkeypatch.setattr(entry, "ENTRIES", dict(entry.ENTRIES))
    given = {"formula": "L = −log p_y / 2;  a = ½", "trusts": "½", "rest": "the student", "source": "a test"}
    qt.presets.preset("without", **given)(lambda: qt.Target(0.5))
    assert qt.presets.printed_loss(qt.preset("without")) is None


def test_two_presets_cannot_share_a_name(monkeypatch):
    monkeypatch.setattr(entry, "ENTRIES", dict(entry.ENTRIES))
    given = {"formula": "", "trusts": "", "rest": "", "source": ""}

    def build():
        return qt.Target()

    with pytest.raises(qt.ConfigError, match="preset 'mine' is called 'nll', as 'sft' is; rename it"):
        qt.presets.preset("mine", aliases=("nll",), **given)(build)
    qt.presets.preset("mine", **given)(build)
    qt.presets.preset("mine", **given)(build)  # a cell run again
    with pytest.raises(qt.ConfigError, match="preset 'mine' is called 'mine', as 'mine' is; rename it"):
        qt.presets.preset("mine", **given)(lambda: qt.Target())


def test_a_residual_with_a_coefficient_of_no_model(my_rules):
    class Typo(qt.residual.Residual):
        coefficients = {"techer": 1.0}  # noqa: RUF012

    with pytest.raises(qt.ConfigError, match="coefficient of residual Typo is 'techer'; did you mean 'teacher'"):
        qt.Target(0.5, Typo())

    class NoNumber(qt.residual.Residual):
        coefficients = {"teacher": float("inf")}  # noqa: RUF012

    with pytest.raises(qt.ConfigError, match="coefficient of teacher in residual NoNumber is inf; use a finite number"):
        qt.Target(0.5, NoNumber())


def test_the_preset_of_the_contributors_page(monkeypatch):
    monkeypatch.setattr(entry, "ENTRIES", dict(entry.ENTRIES))
    page = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.S)
    exec(block, dict(vars(labels)))
    batch, target = ordinary_batch(), qt.preset("half", weight=0.25)
    assert target == qt.Target.from_config({"preset": "half", "weight": 0.25}) == qt.Target(0.25)
    logits = batch.logits()
    printed = qt.presets.printed_loss(target)(logits, batch.labels, batch.columns)
    assert torch.allclose(qt.target_loss(logits, batch.labels, target, reduction="none").loss, printed)


def test_a_rule_without_a_trust_is_named():
    class Empty(qt.trust.Rule):
        """Defines nothing."""

    with pytest.raises(qt.ConfigError, match=r"trust rule Empty gives no γ; define __call__\(stats\)"):
        qt.target_loss(torch.zeros(1, 3), torch.tensor([1]), qt.Target(trust=Empty()))
