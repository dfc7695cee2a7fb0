"""What the documents say is what the code says."""

from __future__ import annotations

import doctest
import importlib.util
import json
import re
from pathlib import Path

import pytest

import qtarget as qt
from qtarget.targets import presets, residual, target, trust

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def targets_table() -> str:
    """The README's table of objectives, from the presets."""
    lines = ["| target | formula | defaults | needs | source |", "|---|---|---|---|---|"]
    for name in presets.names():
        entry = presets.describe(name)
        defaults = ", ".join(f"{key} {value}" for key, value in entry.parameters.items() if value is not None)
        needs = ", ".join(sorted(presets.build(name).requires)).replace("_", " ")
        formula = entry.formula.replace("|", "\\|")
        lines.append(f"| {name} | {formula} | {defaults or '-'} | {needs or '-'} | {entry.source} |")
    return "\n".join(lines)


def test_readme_lists_the_targets_as_they_are():
    written = re.search(r"test_docs\.py -->\n(.*)\n<!-- end of targets", README, re.S)
    assert written is not None
    assert written[1] == targets_table(), f"write this into README.md:\n{targets_table()}"


@pytest.mark.parametrize("module", [presets, residual, target, trust], ids=lambda module: module.__name__)
def test_docstring_examples(module):
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("link", re.findall(r"\]\(((?!http)[^)#]+)\)", README))
def test_readme_links_lead_somewhere(link):
    assert (ROOT / link).exists()


def test_the_picture_shows_what_the_targets_are():
    numbers = json.loads((ROOT / "docs" / "assets" / "one_token.json").read_text(encoding="utf-8"))
    p, q = numbers["student p"], numbers["Q of dft"]
    p_y = p["Melbourne"]
    assert q["Canberra"] == pytest.approx((1 - p_y) * p["Canberra"], rel=1e-9)
    assert q["Melbourne"] == pytest.approx(p_y + (1 - p_y) * p_y, rel=1e-9)


def load_example(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["sft", "dft", "target-sft"])
def test_the_plain_loop_learns(name):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    records = load_example("plain_loop").train(LlamaForCausalLM(config), 25, qt.preset(name), 3e-3)
    assert records[-1]["nll"] < 0.6 * records[0]["nll"]
    if name == "target-sft":  # the teacher is the start: the first step is dft's
        first = load_example("plain_loop").train(LlamaForCausalLM(config), 1, qt.preset("dft"), 3e-3)
        assert set(first[0]) == set(records[0])
