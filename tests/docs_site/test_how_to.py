"""The how-to pages, and those for a start: every block runs or is read, and what they say of the study is in it."""

from __future__ import annotations

import dataclasses
import importlib
import re
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest
import yaml

from qtarget.cli import settings
from qtarget.targets.schedule import ScheduledTarget

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted((DOCS / "how-to").glob("*.md")), DOCS / "install.md", DOCS / "first-run.md", DOCS / "index.md"]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.S | re.M)


def blocks(page: Path, language: str) -> list[str]:
    found = FENCE.findall(page.read_text(encoding="utf-8"))
    return [textwrap.dedent(text) for _, written_in, text in found if written_in == language]


@pytest.fixture
def my_parts(tmp_path, monkeypatch):
    """The Python of docs/how-to/own-parts.md, as the module it speaks of."""
    code = "\n\n".join(blocks(DOCS / "how-to" / "own-parts.md", "python"))
    (tmp_path / "my_parts.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("my_parts")
    del sys.modules["my_parts"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_is_of_a_kind_that_is_tested(page):
    tested = {"python", "yaml", "json", "jinja"}  # the last two by test_how_to_rows.py
    assert {language for _, language, _ in FENCE.findall(page.read_text(encoding="utf-8"))} <= tested


@pytest.mark.parametrize("page", ["learning-rate", "reading-the-log"])
def test_a_pages_python_runs(page, capsys):
    (code,) = blocks(DOCS / "how-to" / f"{page}.md", "python")
    exec(compile(code, page, "exec"), {})


def test_parts_of_ones_own_are_what_the_page_says(my_parts):
    import torch

    import qtarget as qt

    (sure,), (undecided,) = (
        qt.target_loss(torch.tensor([logits]), torch.tensor([1]), qt.Target(trust=my_parts.doubtful)).stats["trust"]
        for logits in ([8.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0])
    )
    assert float(sure) < 0.1 and float(undecided) > 0.8


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_recipes_are_read(page, my_parts):
    known = {field.name for config in settings.groups().values() for field in dataclasses.fields(config)}
    for text in blocks(page, "yaml"):
        recipe = yaml.safe_load(text)
        assert set(recipe) <= known, text
        assert ScheduledTarget.read(recipe["target"]).final.formula


def test_what_the_page_says_of_learning_rates_is_in_the_study():
    table = (DOCS / "study.md").read_text(encoding="utf-8").partition("### Learning rates\n")[2]
    rates = [float(rate) for rate in re.findall(r"\d+\.\d+", re.search(r"^\| arm \|(.*)\|$", table, re.M)[1])]
    kept = {arm: float(rate) for arm, rate in re.findall(r"^\| ([\w-]+) \|.*\| ([\d.]+) \|$", table, re.M)}
    assert [kept[arm] for arm in ("dft", "beyond-log", "profit", "target-sft")] == [max(rates)] * 4
    assert kept["sft"] == min(rates) and len(rates) == 3


def test_the_extras_are_those_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    page = (DOCS / "install.md").read_text(encoding="utf-8")
    named = re.findall(r'`pip install "\.\[(\w+)\]"` \|', page)
    assert {*named, "dev"} == set(project["optional-dependencies"])  # dev is what make env installs
    assert project["requires-python"] == ">=3.11" and "Python 3.11 or newer" in page
