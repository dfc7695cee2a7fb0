"""``qtarget compare`` of real logs: lm-evaluation-harness's and lighteval's, made by ``harness_logs/make.sh``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import tiny_models
from qtarget.cli.__main__ import main
from qtarget.errors import ConfigError, StorageError
from qtarget.evaluation import compare

LOGS = Path(__file__).with_name("harness_logs")


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """The folders as the programs write them: a folder for the model, and lighteval's bar in the names."""
    folder = tmp_path_factory.mktemp("logs")
    for model in ("first", "second"):
        shutil.copytree(LOGS / "lm_eval" / model, folder / "lm_eval" / model / model)
        for file in (LOGS / "lighteval" / model).iterdir():
            time = file.stem.rpartition("_")[2]
            to = folder / "lighteval" / model / "details" / model / time
            to.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, to / file.name.replace("_0_", "|0_"))
    return folder


def arms(logs, program):
    return [f"a={logs / program / 'first'}", f"b={logs / program / 'second'}"]


def test_lm_eval(logs):
    """The values are those that lm_eval printed: acc 0 and 3/4, exact_match 1/6 and 4/6."""
    made = compare.compare(arms(logs, "lm_eval"), metric="exact_match:flexible,acc")
    assert made.metrics == {"birds": "acc", "sums": "exact_match:flexible"}
    found = {d.task: (d.measure, d.first, d.other, d.problems) for d in made.differences}
    assert found == {"birds": ("acc", 0, 0.75, 4), "sums": ("exact_match:flexible", pytest.approx(1 / 6), 4 / 6, 6)}
    assert all(d.low <= d.value <= d.high for d in made.differences)


def test_problems_are_paired_whatever_their_order(logs, tmp_path):
    turned = tmp_path / "second"
    turned.mkdir()
    for file in (logs / "lm_eval" / "second" / "second").iterdir():
        (turned / file.name).write_text("".join(f"{line}\n" for line in file.read_text().splitlines()[::-1]))
    words = [arms(logs, "lm_eval")[0], f"b={turned}"]
    made = [compare.compare(one, metric="exact_match:flexible,acc") for one in (arms(logs, "lm_eval"), words)]
    assert made[0].differences == made[1].differences


def test_lighteval(logs):
    made = compare.compare(arms(logs, "lighteval"))
    assert made.metrics == {"birds": "acc", "sums": "em"}
    assert {d.task: (d.first, d.other) for d in made.differences} == {"birds": (0.5, 0.5), "sums": (0, 0)}
    # Both answer two of four birds: other ones, or the interval would be that of equal arms.
    low, high = next((d.low, d.high) for d in made.differences if d.task == "sums")
    assert low < 0 < high


def test_both_programs_by_their_prompts(logs):
    words = [arms(logs, "lm_eval")[0], arms(logs, "lighteval")[1]]
    made = compare.compare(words, metric="exact_match:flexible,em,acc")
    assert made.metrics == {"birds": "acc", "sums": "exact_match:flexible / em"}


def test_a_folder_of_eval_beside_lm_eval_by_id(logs, tmp_path, capsys):
    file = tmp_path / "sums.jsonl"
    rows = [json.loads(line) for line in (LOGS / "tasks" / "sums" / "test.jsonl").read_text().splitlines()]
    file.write_text("".join(json.dumps({**row, "prompt": f"Add {row['question']}"}) + "\n" for row in rows[::-1]))
    model = tmp_path / "model"
    tiny_models.llama().save_pretrained(model)
    tiny_models.tokenizer().save_pretrained(model)
    given = {"model": model, "tasks": file, "verifier": "math", "n": 0, "max_new_tokens": 4, "output": tmp_path / "own"}
    assert main(["eval", *(word for name, value in given.items() for word in (f"--{name}", str(value)))]) == 0
    only = tmp_path / "lm"
    only.mkdir()
    shutil.copy(next((logs / "lm_eval" / "second").rglob("samples_sums*")), only)
    capsys.readouterr()
    assert main(["compare", f"a={tmp_path / 'own'}", f"b={only}", "--metric", "exact_match:flexible"]) == 0
    out = capsys.readouterr().out
    assert "greedy / exact_match:flexible" in out and "66.7" in out and "had different prompts" in out


def test_page_of_other_programs(logs, tmp_path, capsys):
    assert main(["compare", *arms(logs, "lighteval"), "-o", str(tmp_path)]) == 0
    assert "Settings" not in capsys.readouterr().out
    assert {file.name for file in tmp_path.iterdir()} == {"compare.md", "compare.html", "compare.json"}


@pytest.mark.parametrize(
    ("metric", "sentence"),
    [
        (None, r"metric is not set, and task birds has acc, acc_norm in .*; name one of them with --metric"),
        ("acc", r"metric is 'acc', and task sums has exact_match:flexible, exact_match:strict in"),
        ("exact_match,acc", r"metric is 'exact_match,acc', and task sums has exact_match:flexible"),
    ],
)
def test_the_scores_there_are_named(logs, metric, sentence):
    with pytest.raises(ConfigError, match=sentence):
        compare.compare(arms(logs, "lm_eval"), metric=metric)


def test_what_is_refused(logs, tmp_path):
    with pytest.raises(ConfigError, match=r"has the tasks birds, and .* has birds, sums"):
        shutil.copytree(logs / "lm_eval" / "first", tmp_path / "less")
        next((tmp_path / "less").rglob("samples_sums*")).unlink()
        compare.compare([arms(logs, "lm_eval")[0], f"b={tmp_path / 'less'}"], metric="acc")
    with pytest.raises(
        ConfigError, match=r"holds the results of several models, first, second; name the folder of one"
    ):
        shutil.copytree(logs / "lm_eval" / "first" / "first", tmp_path / "both" / "first")
        shutil.copytree(logs / "lm_eval" / "second" / "second", tmp_path / "both" / "second")
        both = tmp_path / "both"
        for file in (both / "second").glob("samples_birds*"):
            file.unlink()
        for file in (both / "first").glob("samples_sums*"):
            file.unlink()
        compare.compare([str(both), arms(logs, "lm_eval")[1]], metric="acc")
    file = next((tmp_path / "less").rglob("samples_birds*"))
    lines = file.read_text().splitlines(keepends=True)
    others = tmp_path / "others"
    others.mkdir()
    (others / file.name).write_text("".join(lines[:3]))
    with pytest.raises(ConfigError, match=r"task birds has 3 problems in .* and 4 in .*, which are not the same"):
        compare.compare([str(tmp_path / "less"), str(others)], metric="acc")
    (others / file.name).write_text("nonsense\n")
    with pytest.raises(StorageError, match=r"is damaged in line 1"):
        compare.compare([str(tmp_path / "less"), str(others)], metric="acc")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "details_birds|0_2026-11-30T17-03-54.337324.parquet").write_bytes(b"PAR1")
    with pytest.raises(StorageError, match=r"cannot be read"):
        compare.compare([str(broken), arms(logs, "lighteval")[1]])
