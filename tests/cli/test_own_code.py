"""Code of the user's own: beside the config and in the current folder, behind everything installed."""

import json
import sys
from pathlib import Path

import pytest

import tiny_models
from qtarget import own_code
from qtarget.cli.__main__ import main
from qtarget.evaluation.grading import Grader
from qtarget.targets.parts import load_object

TARGET = """
import sys

import {name}_helper
from qtarget import Target, residual, trust

assert sys.path[-1] == {folder!r}, "behind everything installed"
my_target = Target(trust=trust.probability(), residual=residual.guided(eta=0.5))


def build(eta: float = 0.3):
    \"\"\"Some of everything.\"\"\"
    return Target(trust=eta)
"""


@pytest.fixture
def module(tmp_path, request, monkeypatch):
    """Writes a module with a helper beside it into a folder; both are forgotten afterwards."""
    path, name = list(sys.path), f"own_{abs(hash(request.node.name))}"

    def write(folder: Path) -> str:
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(TARGET.format(name=name, folder=str(folder)))
        (folder / f"{name}_helper.py").write_text("")
        return name

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    yield write
    assert sys.path == path
    for made in (name, f"{name}_helper"):
        sys.modules.pop(made, None)


def test_beside_the_config(module, tmp_path, capsys):
    name = module(tmp_path / "recipe")
    tiny_models.llama().save_pretrained(tmp_path / "model")
    tiny_models.tokenizer().save_pretrained(tmp_path / "model")
    config = {
        "model_name_or_path": str(tmp_path / "model"),
        "dataset_name": str(tmp_path / "rows.jsonl"),
        "target": f"{name}:build",
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": " b"}) + "\n")
    (tmp_path / "recipe" / "config.yaml").write_text(json.dumps(config))
    assert main(["train", "--config", str(tmp_path / "recipe" / "config.yaml"), "--dry_run", "--gpus", "1"]) == 0
    assert f"target {name}:build" in capsys.readouterr().out


@pytest.mark.parametrize(("what", "trusts"), [("my_target", "probability"), ("build", "0.3")])
def test_in_the_current_folder(what, trusts, module, capsys):
    name = module(Path.cwd())
    assert main(["targets", "show", f"{name}:{what}"]) == 0
    shown = capsys.readouterr().out
    assert trusts in shown and f"your own code, {Path.cwd() / name}.py" in shown
    assert main(["targets", "show", f"{name}:{what}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == f"{name}:{what}"


def test_another_folders_module_of_the_same_name(tmp_path, capsys):
    """In one process: each config has the code that lies beside it."""
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "own_twice.py").write_text(f"from qtarget import Target\nmine = Target(trust=0.{number})\n")
        token = own_code.FOLDERS.set((str(folder),))
        try:
            assert load_object("own_twice:mine", "target").trust.value == number / 10
        finally:
            own_code.FOLDERS.reset(token)
    sys.modules.pop("own_twice")


def test_an_installed_module_is_the_one(monkeypatch, tmp_path):
    (tmp_path / "colorsys.py").write_text("mine = 1\n")
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    token = own_code.FOLDERS.set((str(tmp_path),))
    try:
        assert callable(load_object("colorsys:rgb_to_hsv", "target"))
    finally:
        own_code.FOLDERS.reset(token)


def test_a_verifier_in_its_own_process(tmp_path):
    (tmp_path / "own_judge.py").write_text("def judge(text, row):\n    return text == row['answer']\n")
    token = own_code.FOLDERS.set((str(tmp_path),))
    try:
        with Grader("own_judge:judge", timeout=30) as grade:
            assert grade("4", {"answer": "4"}) and not grade("5", {"answer": "4"}) and grade.errors == 0
    finally:
        own_code.FOLDERS.reset(token)
