"""The soak in short, and what it calls flat and bounded."""

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

import tiny_models

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def soak():
    """benchmarks/soak.py as a module."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        spec = importlib.util.spec_from_file_location("benchmark_of_soak", ROOT / "benchmarks" / "soak.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def test_a_short_soak_trains_and_is_told(soak, tmp_path):
    """Twelve steps of real training with a teacher, evaluations, checkpoints and the lens, in a process of its own."""
    model = tmp_path / "demo" / soak.MODEL
    tiny_models.llama().save_pretrained(model)
    tiny_models.tokenizer().save_pretrained(model)
    (tmp_path / "demo" / "data").mkdir()
    for split, rows in (("train", 32), ("test", 4)):
        lines = [json.dumps(row) + "\n" for row in tiny_models.conversation_dataset(rows).to_list()]
        (tmp_path / "demo" / "data" / f"{split}.jsonl").write_text("".join(lines))
    words = ["--steps", "12", "--every", "3", "--width", "32"]
    places = ["--demo", tmp_path / "demo", "--folder", tmp_path / "soak", "--out", tmp_path / "soak.json"]
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "soak.py", *words, *map(str, places)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "too short for a verdict on memory" in done.stdout
    record = json.loads((tmp_path / "soak.json").read_text())
    assert record["steps"] == 12 and record["evaluations"] >= 4
    largest = record["judged"]["largest"]
    assert largest["rss"] > 100e6 and largest["own"] < largest["rss"]
    assert 1 <= largest["checkpoints"] <= 3, "two are kept, a third is there while it is written"
    assert largest["lens_history"] > 0 and largest["log"] > 0
    assert len(record["series"]) == 12 <= soak.KEPT, "a sample a step"
    assert str(tmp_path) not in json.dumps(record)


def samples(seconds, own, **more):
    """An hour of samples whose memory is what ``own`` says of the hour's share."""
    rng = random.Random(0)
    usual = {"rss": 1e9, "descriptors": 3, "threads": 9, "files": 14, "bytes": 8e7, "checkpoints": 2}
    usual |= {"lens_history": 1e4, "log": 1e5}
    return [
        {"seconds": s, **usual, "own": own(s / 3600) + rng.gauss(0, 1e6), **{k: v(s / 3600) for k, v in more.items()}}
        for s in range(0, seconds, 5)
    ]


def test_what_is_flat_and_what_is_not(soak):
    flat = soak.judge(samples(3600, lambda h: 8e8), 60)
    assert flat["ok"] and flat["memory"]["own"]["low"] < 0 < flat["memory"]["own"]["high"]
    leaks = soak.judge(samples(3600, lambda h: 8e8 + 5e7 * h), 60)
    assert leaks["memory"]["own"]["per_hour"] == pytest.approx(5e7, rel=0.05)
    assert leaks["memory_flat"] is False and leaks["ok"] is False
    # What a start takes is no slope: the first sixth is left out.
    assert soak.judge(samples(3600, lambda h: 8e8 - 5e8 * max(0, 0.1 - h)), 60)["ok"]
    # Significant and of no account: a thousandth of memory in an hour.
    assert soak.judge(samples(3600, lambda h: 8e8 + 2e6 * h), 60)["ok"]


@pytest.mark.parametrize("name", ["files", "descriptors", "threads", "checkpoints"])
def test_what_is_bounded_and_what_is_not(name, soak):
    grown = soak.judge(samples(3600, lambda h: 8e8, **{name: lambda h: 10 + int(10 * h)}), 60)
    assert grown[f"{name}_grow"] and grown["ok"] is False
    saving = soak.judge(samples(3600, lambda h: 8e8, **{name: lambda h: 10 + (0.8 < h < 0.82)}), 60)
    assert not saving[f"{name}_grow"] and saving["ok"], "a save in progress is no growth"


def test_a_short_run_has_no_verdict(soak):
    assert soak.judge(samples(300, lambda h: 8e8 + 1e9 * h), 5)["ok"] is None
