"""What the documents say is what the code says."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import pkgutil
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import docs_tree
import qtarget as qt
import tiny_models
from qtarget.targets import presets

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


# The README shows ten; docs/targets.md has all of them.
TEN = ["sft", "dft", "eaft", "iw-sft", "label-smoothing", "asft", "psft", "gem", "kd", "target-sft"]


def targets_table(names: list[str]) -> str:
    """Objectives as a table, from the presets."""
    lines = ["| target | formula | defaults | needs | source |", "|---|---|---|---|---|"]
    for name in names:
        entry = presets.describe(name)
        defaults = ", ".join(f"{key} {value}" for key, value in entry.parameters.items() if value is not None)
        needs = ", ".join(sorted(presets.build(name).requires)).replace("_", " ")
        formula = entry.formula.replace("|", "\\|")
        lines.append(f"| {name} | {formula} | {defaults or '-'} | {needs or '-'} | {entry.source} |")
    return "\n".join(lines)


@pytest.mark.parametrize(("page", "names"), [("README.md", TEN), ("docs/targets.md", presets.names())])
def test_pages_list_the_targets_as_they_are(page, names):
    assert targets_table(names) in (ROOT / page).read_text(encoding="utf-8"), (
        f"write into {page}:\n{targets_table(names)}"
    )


def test_readme_is_short():
    assert len(README.splitlines()) <= 150
    assert f"[{len(presets.names())}](docs/targets.md#all-of-them)" in README


def recorded(name: str):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", ["README.md", "docs/performance.md"])
def test_pages_have_the_cost_of_a_step_as_it_was_measured(page):
    measured = recorded("train_step")
    memory = {line["method"]: line["ratio"] for line in measured["memory"]}
    text = (ROOT / page).read_text(encoding="utf-8")
    for name in ("sft", "dft", "target-sft"):
        row = re.search(rf"^\| {name} \| ([\d.]+) \| ([\d.]+) \|$", text, re.M)
        assert row is not None
        figures = measured["time"]["ratio"][f"qtarget {name}"], memory[f"qtarget {name}"]
        assert [float(row[1]), float(row[2])] == pytest.approx(figures, abs=0.0051)


def test_evaluation_page_has_the_demos_scores_as_they_were_measured():
    scored = recorded("eval_demo")
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    differences = {made["measure"]: made for made in scored["compare"]["differences"]}
    for measure, label in (("strict", "avg@4, strict"), ("lenient", "avg@4, lenient"), ("greedy", "greedy, strict")):
        made = differences[measure]
        row = re.search(rf"^\| {label}.*$", page, re.M)
        assert row is not None
        *_, first, other, difference, interval, reading = (cell.strip() for cell in row[0].strip("|").split("|"))
        figures = [made[name] for name in ("first", "other", "difference", "low", "high")]
        written = [first, other, difference, *interval.split(" to ")]
        assert [float(figure) for figure in written] == pytest.approx([100 * figure for figure in figures], abs=0.0501)
        assert reading == made["reading"]
    row = re.search(r"^\| samples without an answer, strict \| ([\d.]+) \| ([\d.]+)", page, re.M)
    assert row is not None
    missing = [scored[arm]["tasks"]["sums"]["strict"]["no_answer"] for arm in ("before", "after")]
    assert [float(row[1]), float(row[2])] == pytest.approx([100 * share for share in missing], abs=0.0501)


def test_first_run_has_the_demos_figures_as_they_were_measured():
    page = " ".join((ROOT / "docs" / "first-run.md").read_text(encoding="utf-8").split())
    before, after = (recorded("quickstart")[when] for when in ("before", "after"))
    assert f"went from {before['nll']:.3f} to {after['nll']:.3f}" in page
    assert f"likeliest token from {before['accuracy']:.3f} to {after['accuracy']:.3f}" in page
    assert f"ended {after['teacher_kl']:.3f} nats" in page


@pytest.mark.parametrize("link", re.findall(r"\]\(((?!http)[^)#]+)\)", README))
def test_readme_links_lead_somewhere(link):
    assert (ROOT / link).exists()


def test_the_picture_shows_what_the_targets_are():
    numbers = json.loads((ROOT / "docs" / "assets" / "one_token.json").read_text(encoding="utf-8"))
    p, q = numbers["student p"], numbers["Q of dft"]
    p_y = p["Melbourne"]
    assert q["Canberra"] == pytest.approx((1 - p_y) * p["Canberra"], rel=1e-9)
    assert q["Melbourne"] == pytest.approx(p_y + (1 - p_y) * p_y, rel=1e-9)


def load(file: Path):
    spec = importlib.util.spec_from_file_location(file.stem, file)
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
    records = load(ROOT / "examples" / "plain_loop.py").train(LlamaForCausalLM(config), 25, qt.preset(name), 3e-3)
    assert records[-1]["nll"] < 0.6 * records[0]["nll"]
    if name == "target-sft":  # the teacher is the start: the first step is dft's
        first = load(ROOT / "examples" / "plain_loop.py").train(LlamaForCausalLM(config), 1, qt.preset("dft"), 3e-3)
        assert set(first[0]) == set(records[0])


def test_training_page_lists_our_settings_as_they_are():
    """The table is the one that the script writes, and the script knows every field that TRL's config has not."""
    from trl import SFTConfig

    from qtarget.cli import fields

    settings = load(ROOT / "scripts" / "docs_settings.py")
    page = settings.PAGE.read_text(encoding="utf-8")
    assert page == settings.written(page), "make docs-settings"
    theirs = {field.name for field in dataclasses.fields(SFTConfig)}
    ours = {field.name: field.default for field in dataclasses.fields(qt.QTargetConfig) if field.init}
    assert {name: default for name, default, _ in fields.own()} == {
        name: default for name, default in ours.items() if name not in theirs or name == "loss_type"
    }
    assert all(text for _, _, text in fields.own())


def test_settings_are_described_where_peers_look_for_it():
    """TRL's and Transformers' parsers take a field's help from its metadata: it is the docstring's entry."""
    from qtarget.cli import fields

    metadata = {field.name: field.metadata for field in dataclasses.fields(qt.QTargetConfig)}
    assert {name: metadata[name]["help"] for name, _, _ in fields.own()} == {
        name: text for name, _, text in fields.own()
    }
    assert metadata["denominator"]["choices"] == ["all_labels", "kept", "micro_batch"]
    assert metadata["learning_rate"]["help"] == "The initial learning rate for AdamW."


def test_the_page_prints_the_lora_run_as_it_is():
    page = (ROOT / "docs" / "how-to" / "lora.md").read_text(encoding="utf-8")
    assert textwrap.indent((ROOT / "recipes" / "lora.sh").read_text(encoding="utf-8"), "    ") in page


@pytest.mark.parametrize("script", sorted((ROOT / "examples" / "trainers").glob("*.py")), ids=lambda file: file.stem)
def test_the_pages_of_other_trainers_print_their_scripts_as_they_are(script):
    pages = [page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "trainers").glob("*.md")]
    assert sum(f"```python\n{script.read_text(encoding='utf-8')}```" in page for page in pages) == 1, script.name


def test_links_of_the_pages_lead_somewhere():
    for page in (ROOT / "docs").rglob("*.md"):
        for link in re.findall(r"\]\(((?!http)[^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_tree_is_that_of_the_docstrings():
    assert docs_tree.faults() == []
    assert docs_tree.page() == docs_tree.PAGE.read_text(encoding="utf-8"), "make docs-tree"


WRITTEN = [page.relative_to(ROOT).as_posix() for page in sorted((ROOT / "docs").rglob("*.md"))]
PAGES = ["README.md", "CONTRIBUTING.md", *WRITTEN]


@pytest.mark.parametrize("page", PAGES)
def test_files_and_names_in_a_page_exist(page):
    """``kernels.py`` or ``benchmarks/engine.py``, and ``qtarget.training.config``; ``my_...`` are the reader's own."""
    text = (ROOT / page).read_text(encoding="utf-8")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    there = {"/".join(file.split("/")[at:]) for file in tracked for at in range(file.count("/") + 1)}
    named = set(re.findall(r"(?<![\w./-])(?:\.\./)?([\w/-]+\.py)\b", text))
    assert sorted(name for name in named if name not in there and not name.startswith("my_")) == []
    for name in set(re.findall(r"\bqtarget(?:\.\w+){2,}", text)):
        pkgutil.resolve_name(name)


def test_trls_own_script_with_two_lines_changed(tmp_path):
    """As it stands, but for the names of model and dataset: no hub is asked in a test."""
    model, data = tmp_path / "model", tmp_path / "data"
    tiny_models.llama().save_pretrained(model)
    tiny_models.tokenizer().save_pretrained(model)
    data.mkdir()
    rows = [{"messages": row["prompt"] + row["completion"]} for row in tiny_models.conversation_dataset(4)]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    script = (ROOT / "examples" / "two_lines.py").read_text(encoding="utf-8")
    for name, folder in (("Qwen/Qwen3-0.6B", model), ("trl-lib/Capybara", data)):
        assert name in script
        script = script.replace(name, str(folder))
    (tmp_path / "script.py").write_text(script)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "target dft: L = −sg(p_y) log p_y" in done.stdout
    assert (tmp_path / "model-QTarget" / "checkpoint-3" / "qtarget.json").exists()


PAGES = ["README.md", *WRITTEN]


@pytest.mark.parametrize("page", PAGES)
def test_flags_in_the_pages_are_those_of_the_commands(page):
    from qtarget.cli import settings
    from qtarget.cli.__main__ import VERBS

    everywhere = {field.name for config in settings.groups().values() for field in dataclasses.fields(config)}
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"^ {4}(?: {4})?(?:.*&& )?(?:\$ )?qtarget (\w+) (.*)$", text, re.M)
    for verb, words in commands:
        assert verb in VERBS, words
        taken = importlib.import_module(f"qtarget.cli.verbs.{verb}").VERB.commands
        command = taken.get(words.split()[0], taken.get(""))
        known = {option.name for option in command.options} | ({"config", *everywhere} if command.settings else set())
        assert set(re.findall(r"--(\w+)", words.split("#")[0])) <= known, words


def test_the_evaluation_page_has_the_items_of_the_suites():
    from qtarget.evaluation import suites

    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    for suite, names in suites.SUITES.items():
        row = re.search(rf"^\| {suite} \| (.*?) \|$", page, re.M)
        assert row is not None
        items = {name: f"{' or '.join(map(str, suites.BENCHMARKS[name].counts))}" for name in names}
        assert row[1] == ", ".join(f"{name} {count}" for name, count in items.items())
