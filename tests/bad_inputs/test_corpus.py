"""The corpus of bad inputs: each is refused in one clear sentence or handled rightly, and nothing is lost."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from bench import Bench, Case, check

KINDS = tuple(sorted(file.stem.removeprefix("bad_") for file in Path(__file__).parent.glob("bad_*.py")))
CORPUS: dict[str, list[Case]] = {kind: importlib.import_module(f"bad_{kind}").CASES for kind in KINDS}
ALL = [(kind, case) for kind, cases in CORPUS.items() for case in cases]


@pytest.mark.parametrize(("kind", "case"), ALL, ids=[f"{kind}-{case.id}" for kind, case in ALL])
def test_bad_input(kind, case, world, tmp_path):
    check(case, Bench(world, tmp_path / "case"))


def test_every_case_has_a_name_of_its_own_and_says_what_is_wrong():
    names = [f"{kind}-{case.id}" for kind, case in ALL]
    assert len(names) == len(set(names))
    assert all(case.wrong for _, case in ALL)


def test_reliability_counts_the_cases():
    """docs/reliability.md has a line a kind; rewrite it with tests/bad_inputs/count.py."""
    import count  # it reads this file

    page = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert count.table() in page
    assert len(ALL) >= 150
