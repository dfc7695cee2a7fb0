"""The layers that qtarget installs in: each imports what it declares, and says what is missing."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import blocked
from qtarget.cli.__main__ import VERBS
from qtarget.extras import EXTRAS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DECLARED = PROJECT["optional-dependencies"]
# a build of torch for GPUs brings it; without it the engine has another backend
WITH_TORCH = {"torch", "triton"}
CORE = WITH_TORCH | {"qtarget"}
TRAIN = {*EXTRAS["train"]}
# Trainers of other people: they import our part for them, so that they are there.
HOSTS = {"axolotl"}
# Modules that cannot be imported without an extra of their own.
OF_AN_EXTRA = {
    "server": {
        "qtarget.evaluation.served",
        "qtarget.models.server",
        "qtarget.teachers.server.answers",
        "qtarget.teachers.server.client",
    }
}


@cache
def torch_alone() -> frozenset[str]:
    return frozenset({"qtarget", *blocked.with_what_it_needs("torch")})


# -- what is imported is declared --------------------------------------------------------------------------------------


def imported(text: str) -> set[str]:
    """The packages that a module imports, at its top or later."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names - {"qtarget"}


def users() -> dict[str, set[str]]:
    """Package → the folders of src/qtarget that import it."""
    found = defaultdict(set)
    for path in (ROOT / "src" / "qtarget").rglob("*.py"):
        for name in imported(path.read_text(encoding="utf-8")):
            found[name].add(path.relative_to(ROOT / "src" / "qtarget").parts[0])
    return found


def requirements(extra: str) -> list[Requirement]:
    return [one for one in map(Requirement, DECLARED[extra]) if one.name != "qtarget"]


def test_the_search_sees_every_form_of_import():
    text = "import os, a.b\ndef f():\n    from c.d import e\n    import g as h\nfrom . import i\nimport qtarget.x"
    assert imported(text) == {"a", "c", "g"}


def test_every_package_that_src_imports_is_declared_and_no_other():
    extras = {module for names in EXTRAS.values() for module in names}
    assert {*users()} == extras | WITH_TORCH | HOSTS


def test_targets_and_losses_import_torch_alone():
    assert {name for name, folders in users().items() if folders & {"targets", "losses"}} == WITH_TORCH


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_declares_what_the_table_says(extra):
    assert {one.name for one in requirements(extra)} == {*EXTRAS[extra].values()}
    assert extra == "train" or "qtarget[train]" in DECLARED[extra]


def test_torch_is_all_that_the_core_declares():
    assert [Requirement(line).name for line in PROJECT["dependencies"]] == ["torch"]


@pytest.mark.parametrize("file", ["constraints.txt", *(f"locks/{path.name}" for path in (ROOT / "locks").iterdir())])
def test_the_locks_are_within_the_bounds(file):
    locked = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / file).read_text(encoding="utf-8"), re.M))
    locked = {canonicalize_name(name): version for name, version in locked.items()}
    asked = [*map(Requirement, PROJECT["dependencies"]), *(one for extra in EXTRAS for one in requirements(extra))]
    within = {one.name: one.specifier.contains(locked[one.name]) for one in asked if one.name in locked}
    assert all(within.values()), within
    assert {"torch", "trl", "transformers", "peft", "requests"} <= within.keys()


# -- what is imported is there -----------------------------------------------------------------------------------------


def test_the_core_works_with_torch_alone():
    done = blocked.python(
        """
import torch
import qtarget as qt

hidden, head, labels = torch.randn(5, 4), torch.randn(7, 4, requires_grad=True), torch.arange(5)
qt.linear_target_loss(hidden, head, labels, target=qt.preset("dft")).loss.backward()
assert head.grad.abs().sum() > 0
found = qt.induced_target(lambda z, y: torch.nn.functional.cross_entropy(z, y), torch.randn(5, 7), labels)
print(found.on_simplex.all().item(), "numpy" in sys.modules)
""",
        only=torch_alone(),
    )
    assert done.stdout.split() == ["True", "False"], done.stderr


@pytest.mark.parametrize("name", ["numpy", "transformers", "yaml"])
def test_there_nothing_else_can_be_imported(name):
    done = blocked.python(f"import {name}", only=torch_alone())
    assert f"ModuleNotFoundError: No module named {name!r}" in done.stderr


def test_the_trainer_needs_no_other_extra():
    others = {extra: {*names} for extra, names in EXTRAS.items() if extra != "train"}
    done = blocked.python(
        f"""
import importlib, pkgutil
import qtarget
places = {{module: extra for extra, modules in {others!r}.items() for module in modules}}
for found in pkgutil.walk_packages(qtarget.__path__, "qtarget."):
    if ".device" not in found.name and not found.name.endswith("__main__"):  # the kernels want triton; main runs
        try:
            importlib.import_module(found.name)
        except ModuleNotFoundError as error:
            print(places.get(error.name, error.name), found.name)
""",
        missing=set().union(*others.values()),
    )
    lines = [tuple(line.split()) for line in done.stdout.splitlines()]
    assert {*lines} == {(extra, name) for extra, names in OF_AN_EXTRA.items() for name in names}, done.stderr


# -- what is missing is said -------------------------------------------------------------------------------------------


SEVERAL = """
from qtarget.cli.__main__ import main
for words in {commands!r}:
    print(main(words), flush=True)
"""


def test_help_needs_torch_alone():
    commands = [["--help"], *([verb, "--help"] for verb in VERBS)]
    done = blocked.python(SEVERAL.format(commands=commands), only=torch_alone())
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("usage: qtarget") == len(commands)


def test_a_verb_says_what_it_lacks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text("model_name_or_path: model\n")
    commands = [
        ["train", "--config", "recipe.yaml"],
        ["train", "--dry_run", "--config", "recipe.yaml"],
        ["plan", "--config", "recipe.yaml"],
        ["targets"],
        ["verify", "--config", "recipe.yaml"],
        ["eval", "--model", ".", "--tasks", "gsm_symbolic", "-o", "out"],
        ["lens", "capture", "--config", "recipe.yaml", "-o", "out"],
    ]
    done = blocked.python(SEVERAL.format(commands=commands), only=torch_alone())
    assert done.stdout.split() == ["2"] * len(commands), done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("qtarget ")]  # torch warns about numpy
    said = [
        re.fullmatch(r'(.*) needs [\w-]+, which is not installed; pip install "qtarget\[train\]"', s) for s in lines
    ]
    assert [found and found[1] for found in said] == [f"qtarget {words[0]}" for words in commands]


def test_a_verb_that_lacks_transformers_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text("model_name_or_path: model\n")
    done = blocked.verb("train", "--config", "recipe.yaml", missing=["transformers"])
    assert done.stderr == 'qtarget train needs transformers, which is not installed; pip install "qtarget[train]"\n'


@pytest.mark.parametrize("name", ["QTargetTrainer", "QTargetConfig"])
def test_a_public_name_says_what_it_lacks(name):
    done = blocked.python(
        f"""
import qtarget as qt
try:
    qt.{name}
except ImportError as error:
    print(isinstance(error, qt.QTargetError), error)
""",
        missing=["trl"],
    )
    assert done.stdout == f'True qtarget.{name} needs trl, which is not installed; pip install "qtarget[train]"\n'


def test_a_server_needs_requests(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("eval", "--model", ".", "--tasks", "math5", "--server", "http://127.0.0.1:9", "-o", "out")
    done = blocked.verb(*words, missing=["requests"])
    assert done.stderr == 'qtarget eval needs requests, which is not installed; pip install "qtarget[server]"\n'


def test_a_missing_package_that_no_extra_brings_keeps_its_own_error():
    done = blocked.verb("env", missing=["platform"])
    assert "ModuleNotFoundError: No module named 'platform'" in done.stderr


def test_debug_shows_where_a_package_is_missing():
    done = blocked.verb("targets", "--debug", missing=["rich"])
    assert "Traceback" in done.stderr
    assert 'qtarget targets needs rich, which is not installed; pip install "qtarget[train]"' in done.stderr
