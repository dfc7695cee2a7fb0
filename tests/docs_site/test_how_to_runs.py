"""What the how-to pages say that runs do, held against runs of small models."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path

import pytest
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, rewrite_logs

import teacher_caches
from qtarget.cli.__main__ import main

PAGES = Path(__file__).parents[2] / "docs" / "how-to"


def page(name: str) -> str:
    return (PAGES / f"{name}.md").read_text(encoding="utf-8")


def block(name: str, language: str, number: int = 0) -> str:
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", page(name), re.S | re.M)
    return textwrap.dedent(found[number][1])


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Student, teacher, rows of two sources and a config, in folders of the names that the pages use."""
    root = teacher_caches.write_world(tmp_path_factory.mktemp("how_to"))
    sources = ("math", "chat")
    rows = [{**row, "source": sources[i % 2]} for i, row in enumerate(teacher_caches.rows_with_hints(8))]
    teacher_caches.write_rows(root / "data", rows)
    return root


def train(world: Path, folder: Path, *words: object) -> None:
    more = ["--max_steps", 2, "--logging_steps", 1, "--save_strategy", "no", "--per_device_train_batch_size", 4]
    command = ["train", "--config", world / "config.yaml", "--output_dir", folder, *more, *words]
    assert main([str(word) for word in command]) == 0


# -- trackers ------------------------------------------------------------------------------------------------------


def test_trackers_get_the_figures_that_the_page_names(world, tmp_path, monkeypatch, capsys):
    targets = "{math: {preset: target-sft, eta: {schedule: linear, from: 0, to: 0.5}}, chat: sft}"
    train(world, tmp_path / "my_run", "--target", "none", "--targets", targets)
    history = json.loads((tmp_path / "my_run" / "trainer_state.json").read_text())["log_history"]
    logged = {name for line in history for name in rewrite_logs(line)}
    table = page("trackers").partition("3. **Plot these.**")[2].partition("[All names]")[0]
    named = set(re.findall(r"`((?:train|eval)/[\w/]+)`", table))
    assert named - logged == {"train/target/eta"}  # that of a run with one target
    assert (tmp_path / "my_run" / "curves.png").exists()
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(compile(block("trackers", "python"), "trackers", "exec"), {})
    trained, evaluated = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\[\(1, [\d.]+\), \(2, [\d.]+\)\]", trained)
    assert re.fullmatch(r"\[\(2, [\d.]+\)\]", evaluated)
    assert {"nll"} < set(json.loads(Path("my_run/before_after.json").read_text())["before"])


def test_the_page_names_every_tracker():
    text = page("trackers")
    table = set(re.findall(r"^\| `(\w+)` \|", text.partition("\n|---|---|---|---|\n")[2], re.M))
    others = re.search(r"takes:\n(.*?)\.\n", text, re.S)
    assert others is not None
    assert table | set(re.split(r",\s+| and ", others[1])) == set(INTEGRATION_TO_CALLBACK)
