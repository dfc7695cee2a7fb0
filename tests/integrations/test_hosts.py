"""What is on record of other people's trainers says what the documentation says of them."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOSTS = json.loads((ROOT / "benchmarks/results/hosts.json").read_text(encoding="utf-8"))


def test_llama_factory_trains_the_target_and_is_stopped_with_a_loss_of_its_own():
    found = HOSTS["LLaMA-Factory"]
    for steps in found["steps"].values():
        assert len(steps["own"]) == len(steps["ours"]) == 3
        for own, ours in zip(steps["own"], steps["ours"], strict=True):
            assert all(abs(ours[name] - own[name]) <= 1e-5 * abs(own[name]) for name in ("loss", "grad_norm"))
    assert found["steps"]["dft"]["own"] != found["steps"]["sft"]["own"]
    assert "did not train the loss of target dft" in found["its own loss beside a target"]
    page = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    assert f"LLaMA-Factory {found['versions']['llamafactory']}" in page


def test_axolotl_trains_the_target_and_refuses_its_own_losses():
    """The page's figures, too, are those on record."""
    found = HOSTS["axolotl"]
    for name, steps in found["steps"].items():
        assert len(steps["own"]) == len(steps["ours"]) == 3, name
        for own, ours in zip(steps["own"], steps["ours"], strict=True):
            assert all(abs(ours[key] - own[key]) <= 1e-5 * abs(own[key]) for key in ("loss", "grad_norm")), name
    assert len({steps["own"][0]["loss"] for name, steps in found["steps"].items() if "LoRA" not in name}) == 5
    held_out = found["held-out loss"]
    assert held_out["ours"] == pytest.approx(held_out["own"], rel=1e-6)
    assert len(held_out["own"]) == 2  # before the first step, and after the last
    for line, step in zip(found["logged"], found["steps"]["target-sft"]["ours"], strict=True):
        assert {*line} == {f"target/{figure}" for figure in ("nll", "trust", "update", "entropy", "accuracy")}
        assert line["target/nll"] != step["loss"]
    assert found["moved by LoRA"]["base"] == []
    assert len(found["moved by LoRA"]["adapters"]) == 4
    assert "computes a loss of its own, so that the target would not be trained" in found["refused"]["trainer_cls"]
    assert "which has another tokenizer" in found["refused"]["another tokenizer"]
    assert found["dft by a plugin that cannot be imported"] == found["steps"]["sft"]["own"]  # the page warns of it
    page = (ROOT / "docs/trainers/axolotl.md").read_text(encoding="utf-8")
    assert f"axolotl {found['versions']['axolotl']} with Transformers {found['versions']['transformers']}" in page
    differences = [f"{value:.0e}" for value in found["largest relative difference"].values()]
    assert re.findall(r"\| (\S+e-\d+) \|$", page, re.M) == differences
