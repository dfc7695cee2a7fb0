"""Version, address, licence and Pythons are the same wherever they stand."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import badges
import qtarget as qt

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
SOURCE = PROJECT["urls"]["Source"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))


def test_the_version_is_written_once_and_dated_by_the_changelog():
    assert "version" in PROJECT["dynamic"] and (ROOT / PYPROJECT["tool"]["hatch"]["version"]["path"]).samefile(
        qt.__file__
    )
    newest = re.search(r"^## (\S+) - (\S+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert newest is not None
    assert (newest[1], newest[2]) == (CITATION["version"], str(CITATION["date-released"]))
    assert newest[1] == qt.__version__


def test_the_citation_is_of_this_project():
    assert (CITATION["title"], CITATION["license"]) == (PROJECT["name"], PROJECT["license"])
    assert CITATION["authors"] == PROJECT["authors"]
    assert CITATION["repository-code"] == SOURCE
    assert [one["url"] for one in CITATION["references"]] == [PROJECT["urls"]["Paper"]]


@pytest.mark.parametrize("page", ["README.md", "docs/install.md", "CITATION.cff", "pyproject.toml"])
def test_the_repository_has_one_address(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert {*re.findall(r"https?://git(?:hub|lab)\.com/[\w-]+/qtarget\b", text)} == {SOURCE}


@pytest.mark.parametrize("page", ["README.md", "docs/install.md"])
def test_the_pip_line_installs_from_there(page):
    assert f'pip install "qtarget[train] @ git+{SOURCE}"' in (ROOT / page).read_text(encoding="utf-8")


def test_the_pythons_are_those_that_were_run():
    named = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", line)]
    assert named == badges.pythons() and len(named) > 1


@pytest.mark.parametrize("name", badges.badges())
def test_the_badges_say_what_the_files_say(name):
    assert (badges.FOLDER / name).read_text(encoding="utf-8") == badges.badges()[name], "python scripts/badges.py"


def test_the_sdist_names_what_is_there():
    assert [
        one for one in PYPROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"] if not (ROOT / one).exists()
    ] == []
