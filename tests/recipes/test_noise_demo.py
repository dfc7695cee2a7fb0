"""`make noise-demo`: how many of its demonstrations are wrong, what it writes, and that the page quotes its record."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "recipes" / "noise_demo.py"
ARMS = ("sft", "dft", "target-sft")


@pytest.fixture(scope="module")
def demo():
    before = [*sys.path]
    spec = importlib.util.spec_from_file_location("noise_demo", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path[:] = before


@pytest.fixture(scope="module")
def record():
    return json.loads((ROOT / "benchmarks" / "results" / "noise_demo.json").read_text())


def is_wrong(demonstration):
    """By a calculator of the test's own, from the text: ``7+3*4-2>w0=7+3;w0=0*4;w8=0-2;#8``."""
    asked, written = demonstration.split(">")
    value, wrong = int(asked[0]), False
    for operation, line in zip(re.findall(r"[-+*]\d", asked), written.split(";"), strict=False):
        result, first, step = re.fullmatch(r"w(\d)=(\d)([-+*]\d)", line).groups()
        assert int(first) == value and step == operation
        wrong |= int(result) != eval(f"({value}{operation}) % 10")
        value = int(result)
    assert written.endswith(f";#{value}")
    return wrong


@pytest.mark.parametrize("seed", [1, 5])
def test_15_percent_of_the_demonstrations_are_wrong(demo, record, seed):
    pairs = demo.cells.demonstrations(demo.DEMO, seed, 4800, (3,))
    wrong = sum(is_wrong(demo.written(*pair)) for pair in pairs)
    assert 0.14 < wrong / len(pairs) < 0.16
    (recorded,) = [one for one in record["seeds"] if one["seed"] == seed]
    assert (recorded["demonstrations"], recorded["wrong"]) == (len(pairs), wrong)


def test_the_quick_form_writes_table_and_curves(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, "--quick", "--out", tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    (demonstrations, wrong) = re.search(r"seed 1: (\d+) demonstrations, (\d+) of them wrong", done.stdout).groups()
    assert int(demonstrations) == 12 * 32 and 0.12 < int(wrong) / int(demonstrations) < 0.18
    (made,) = json.loads((tmp_path / "results.json").read_text())["seeds"]
    for arm in ARMS:
        scores = [value.bit_count() / 2 for value in made["arms"][arm]["right"]]
        assert len(scores) == 12 and made["arms"][arm]["curve"][-1] == [12, pytest.approx(sum(scores) / 12, abs=1e-5)]
        assert len(made["arms"][arm]["curve"]) == 13 and len(made["arms"][arm]["greedy"]) == 12
        row = re.search(rf"^{arm} +([\d.]+) +([\d.]+) +\[", done.stdout, re.M)
        assert float(row[2]) == pytest.approx(100 * sum(scores) / 12, abs=0.051)
    assert "a = sft" in done.stdout and "share of the 12 steps" in done.stdout
    assert "Not shown: what a model that you would use gains." in done.stdout
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_quick_form_is_not_recorded(demo, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["noise_demo.py", "--quick", "--record"])
    with pytest.raises(SystemExit):
        demo.main()
    assert "--record is for the full form" in capsys.readouterr().err


# -- what is on record ---------------------------------------------------------------------------------------------


def test_the_record_is_of_this_script(demo, record):
    """Its settings, and the learning rates of the study's page."""
    assert record["settings"] == json.loads(json.dumps(demo.FULL.record()))
    assert record["rates"] == demo.published_rates()
    page = (ROOT / "docs" / "study.md").read_text()
    table = page[page.index("### Learning rates\n") :]
    for arm, rate in record["rates"].items():
        assert re.search(rf"^\| {arm} \|.*\| {rate:g} \|$", table, re.M)


def test_the_picture_is_drawn_from_the_record(demo, record, tmp_path):
    demo.pictures.save(demo.curves(record), tmp_path / "curves.svg")
    assert (tmp_path / "curves.svg").read_bytes() == demo.PICTURE.read_bytes()


def test_the_page_says_what_is_on_record(demo, record):
    page = (ROOT / "docs" / "first-run.md").read_text()
    section = page[page.index("make noise-demo") : page.index("## Your own model and rows")]
    sft = demo.shares(record, "sft")
    for name in ("base", "teacher", *ARMS):
        (row,) = re.findall(rf"^\| {name} \|(.*)\|$", section, re.M)
        value, low, high = demo.estimate(demo.shares(record, name))
        rate, right, against, greedy = (cell.strip() for cell in row.split("|"))
        assert right == f"{value:.1f} [{low:.1f}, {high:.1f}]"
        assert greedy == f"{100 * demo.shares(record, name, 'greedy').mean():.1f}"
        assert rate == (f"{record['rates'][name]:g}" if name in ARMS else "")
        if name in ("dft", "target-sft"):
            value, low, high = demo.estimate(demo.shares(record, name) - sft, difference=True)
            assert against == f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"
            assert low > 0
    text = " ".join(section.split())
    held = demo.order(record).removeprefix("By seeds: ")
    assert held == "dft above sft in 5 of 5, target-sft above sft in 5 of 5, dft above target-sft in 5 of 5."
    assert "dft was above sft in 5 of 5, target-sft above sft in 5 of 5, and dft above target-sft in 5 of 5." in text
    base = 100 * demo.shares(record, "base", "greedy").mean()
    assert f"The base already scored {base:.1f}." in text
    assert all(100 * demo.shares(record, arm, "greedy").mean() < base for arm in ARMS)
    study = " ".join((ROOT / "docs" / "study.md").read_text().split())
    right, wrong = re.search(r"strong base gives right unique tokens ([\d.]+) and wrong ones ([\d.]+),", study).groups()
    assert f"has no alternative a probability of {right}, and a wrong digit {wrong} (" in text
    settings, machine = record["settings"], record["machine"]
    assert f"{settings['continued_steps'] * settings['pretraining_batch']:,} clean solutions" in text
    assert f"{settings['test_problems']} test problems, {settings['dev_samples']} samples each" in text
    assert f"an {machine['processor']} with two cores, torch {machine['torch']}" in text and machine["cores"] == 2
    assert "about a minute on two cores" in text and all(30 < seed["seconds"] < 75 for seed in record["seeds"])


def test_the_model_has_the_size_it_is_said_to_have(demo):
    assert round(demo.models.parameters(demo.models.build(demo.FULL, "student", 1)) / 1e6, 1) == 0.1
    assert demo.FULL.student == demo.FULL.teacher  # the teacher starts as the base
