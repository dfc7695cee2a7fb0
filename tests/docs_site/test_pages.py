"""A page for each objective and divergence, which says what the library says, and whose examples work."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import divergence_pages
import objective_pages
import pictures
import qtarget as qt
import references
import studied
import tiny_models
import worked_tokens
from qtarget.targets import peers, presets
from qtarget.targets.divergence import Divergence
from qtarget.targets.schedule import ScheduledTarget

ROOT = Path(__file__).parents[2]
OBJECTIVES = objective_pages.pages()
DIVERGENCES = divergence_pages.pages()


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.S | re.M)


def targets(page: str) -> list[qt.Target]:
    """Those of the page's recipes, each as it is when its schedules have ended."""
    return [ScheduledTarget.read(yaml.safe_load(block)["target"]).final for block in blocks(page, "yaml")]


def test_every_objective_and_divergence_has_its_page_and_its_place():
    placed = [path for group in objective_pages.navigation() for paths in group.values() for path in paths]
    assert list(OBJECTIVES) == presets.names()
    assert sorted(placed) == sorted(f"objectives/{name}.md" for name in presets.names())
    assert list(DIVERGENCES) == list(Divergence.known)
    assert divergence_pages.navigation() == [f"divergences/{name}.md" for name in Divergence.known]
    assert all(f"({name}.md)" in objective_pages.table() for name in presets.names())
    assert all(f"({name}.md)" in divergence_pages.table() for name in Divergence.known)


@pytest.mark.parametrize("name", presets.names())
def test_an_objectives_page_says_what_its_preset_says(name):
    page, entry = OBJECTIVES[name], presets.describe(name)
    assert page.startswith(f"# {name}\n\n{entry.summary}")
    assert entry.formula in blocks(page, "text")[0] and "g = a (p − δ) + Σ b" in blocks(page, "text")[0]
    assert f"**The label's trust a**: {entry.trusts}." in page and f"**The rest**: {entry.rest}." in page
    assert all(f"`{parameter}`: " in page for parameter in entry.parameters)
    assert entry.defaults in page and entry.traps[1:] in page
    assert page.count("<svg") == 3 + ("over p_y alone" not in page)
    whole, parts, *_ = targets(page)
    assert whole == qt.preset(name) and str(whole) == str(qt.preset(name))
    assert parts == qt.preset(name)


@pytest.mark.parametrize("name", list(Divergence.known))
def test_a_divergences_page_says_what_its_class_says(name):
    page, divergence = DIVERGENCES[name], Divergence.known[name]()
    assert divergence.equation in blocks(page, "text")[0]
    assert ("Q may leave the simplex" in page) == (divergence.reach is None)
    assert ("such a row is refused" in page) == divergence.needs_full_support
    assert ">>>" not in page and page.count("<svg") == 4
    of_kd, of_parts = targets(page)
    assert of_kd == qt.preset("kd", divergence=name)
    assert [term.divergence for term in of_parts.residual] == [divergence]


def test_an_arm_of_the_study_says_when_it_helps():
    with_section = {name for name, page in OBJECTIVES.items() if "avg@16 − sft's" in page}
    assert with_section == set(studied.results()[2]) & set(OBJECTIVES) - {"sft"}
    assert {name for name, page in DIVERGENCES.items() if "avg@16 − sft's" in page} == {"reverse_kl", "jsd"}
    found = dict(re.findall(r"^\| (\w+ base) \| (\S+ \[.*?\]) ", OBJECTIVES["dft"], re.M))
    choosing = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    assert list(found) == ["weak base", "middle base", "strong base"]
    assert all(difference in choosing for difference in found.values())
    assert "target: {preset: gift, beta: 4.0, toward: teacher}" in OBJECTIVES["gift"]


@pytest.mark.parametrize("name", presets.names())
def test_an_objectives_python_runs(name, capsys):
    assert ran(OBJECTIVES[name], capsys) == qt.preset(name)


@pytest.mark.parametrize("name", presets.names())
def test_an_objectives_line_for_any_trainer_is_accepted(name):
    line = re.search(r"^    (qt\.apply_target\(.*\))$", OBJECTIVES[name], re.M)[1]
    model = eval(line, {"qt": qt, "model": tiny_models.llama(), "teacher": tiny_models.llama(seed=1)})
    assert qt.applied_to(model).target.final == qt.preset(name)


@pytest.mark.parametrize("name", list(Divergence.known))
def test_a_divergences_python_runs(name, capsys):
    assert ran(DIVERGENCES[name], capsys) == qt.preset("kd", divergence=name)


def ran(page: str, capsys) -> qt.Target:
    """The target of the page's example, which has given a finite gradient and printed its trust."""
    (code,) = blocks(page, "python")
    names: dict = {}
    exec(compile(code, "example", "exec"), names)
    assert names["logits"].grad.isfinite().all() and capsys.readouterr().out.startswith("tensor(")
    return names["target"]


def test_what_moves_in_published_runs_is_on_the_page():
    moving = {name for name in presets.names() if presets.describe(name).schedule}
    assert moving == {name for name, page in OBJECTIVES.items() if "In the published runs they move" in page}
    assert all(len(blocks(OBJECTIVES[name], "yaml")) == 3 for name in moving)


def test_every_flag_of_another_library_is_on_a_page():
    text = "".join(OBJECTIVES.values())
    assert sorted(flag for flag in peers.FLAGS if f"{{{flag}: " not in text) == []
    assert "`{use_asft_loss: true}`: use_asft_loss (LLaMA-Factory) is read as asft" in OBJECTIVES["asft"]
    assert "## What other libraries call it" not in OBJECTIVES["tailr"]


def test_the_study_is_linked_where_it_has_the_arm():
    assert "(../study.md)" in OBJECTIVES["dft"] and "(../choosing.md)" in OBJECTIVES["dft"]
    assert "(../study.md)" not in OBJECTIVES["poly"]


def test_the_pictures_show_the_librarys_numbers():
    """dft by hand: Q = p + p_y (δ − p)."""
    free = worked_tokens.taught(qt.preset("dft"))[2]
    p_y = free[1][1]
    assert p_y == pytest.approx(0.25)
    assert [Q for _, _, Q in free] == pytest.approx([p + p_y * (word == "Thus") - p_y * p for word, p, _ in free])
    assert sum(Q for _, _, Q in free) == pytest.approx(1)
    assert ">0.25 → 0.44<" in pictures.worked(qt.preset("dft"))[2]
    curve = dict(objective_pages.trust_curve(qt.preset("beyond-log", alpha=2.0)))
    assert [a for a in curve.values()] == pytest.approx([p_y**2 for p_y in curve])


def test_a_negative_target_is_drawn_to_the_left():
    """gem's Q leaves the simplex; no bar may begin beyond the picture or have a negative width."""
    assert min(Q for rows in worked_tokens.taught(qt.preset("gem")) for _, _, Q in rows) < -0.01
    for name in ("gem", "poly", "sft-kl"):
        for picture in pictures.worked(qt.preset(name)):
            bars = re.findall(r'<rect x="([\d.-]+)" width="([\d.-]+)"', picture)
            assert len(bars) == 10
            assert all(float(x) >= 78 and float(x) + float(width) <= 238.1 and float(width) >= 0 for x, width in bars)


def test_pages_are_the_same_each_time():
    for name in ("eaft", "target-sft", "psft"):
        assert objective_pages.page(name) == OBJECTIVES[name]
    assert divergence_pages.pages() == DIVERGENCES


def test_no_picture_holds_an_empty_line():
    """Markdown would take the rest of it for text."""
    for page in [*OBJECTIVES.values(), *DIVERGENCES.values()]:
        assert all("\n\n" not in figure for figure in re.findall(r"<figure.*?</figure>", page, re.S))


def test_every_public_name_is_on_a_page_of_the_reference():
    assert references.faults() == []


def test_a_public_name_without_page_or_docstring_is_noticed(monkeypatch, tmp_path):
    (tmp_path / "losses.md").write_text("::: qtarget.losses.target_loss\n")
    monkeypatch.setattr(references, "FOLDER", tmp_path)
    monkeypatch.setattr(qt.target_loss, "__doc__", None)
    faults = references.faults()
    assert "qtarget.target_loss has no docstring; write one" in faults
    assert [fault for fault in faults if "qtarget.target_loss is on no page" in fault] == []
    assert "qtarget.Head is on no page of docs/reference; add a line ::: with where it is defined" in faults
