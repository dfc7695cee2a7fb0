"""The large form of the real-model check: rows, verdicts, pieces, teachers, what is refused.

The cells here are run on a model made on the spot; nothing is asserted of which target does better.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from real_model import (
    expectations_large,
    forms,
    judge,
    judge_worked,
    large_page,
    problems,
    record,
    report,
    results,
    run,
)
from real_model.forms import BASE, CLEAN, KD_CONTEXT, LARGE, LARGE_QUICK, NOISY, SMALL, TARGET, Cell
from real_model.problems import CHAINS

import tiny_models
from qtarget.evaluation import graders

FULL = LARGE.settings
TESTED = problems.tested_keys(FULL.problems, CHAINS)
TINY = replace(LARGE_QUICK.settings, max_new_tokens=6)
CELLS = LARGE_QUICK.plan()
SAME = ("seed", "condition", "arm", "settings", "training", "answers", "scores")


def key(row: dict) -> str:
    return problems.expression_key(row["prompt"][1]["content"].removesuffix(" = ?"))


def read_back(text: str) -> list[tuple[int, str, int, int]]:
    """(value, operation, term, result written) of each step, read without the module that wrote them."""
    steps = [re.fullmatch(r"(-?\d+) ([+-]) (\d+) = (-?\d+)", step) for step in text.split(", ")]
    return [(int(step[1]), step[2], int(step[3]), int(step[4])) for step in steps]


# -- rows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, FULL.noise])
def test_wrong_steps_are_where_they_are_said_to_be_and_the_rest_goes_on_from_them(noise):
    rows = problems.train_rows(600, 2, noise, TESTED, CHAINS)
    found, count = {}, 0
    for row in rows:
        asked = row["prompt"][1]["content"].removesuffix(" = ?").split()
        steps = read_back(row["completion"][0]["content"])
        assert [word for _, operation, term, _ in steps for word in (operation, str(term))] == asked[1:]
        before = int(asked[0])
        for value, operation, term, written in steps:
            assert value == before
            if error := written - (value + term if operation == "+" else value - term):
                found[count] = error
            before, count = written, count + 1
    assert found == problems.wrong_steps(count, 2, noise)
    assert len(found) == round(noise * count) and count > 1500


def test_solutions_are_right_and_rows_of_every_noise_are_the_same_problems():
    noisy, clean = (problems.train_rows(600, 2, noise, TESTED, CHAINS) for noise in (FULL.noise, 0.0))
    assert [row["prompt"] for row in noisy] == [row["prompt"] for row in clean]
    assert [row["solution"] for row in noisy] == [row["completion"][0]["content"] for row in clean]
    for row in clean:
        assert int(row["solution"].rpartition(" = ")[2]) == eval(row["prompt"][1]["content"].removesuffix(" = ?"))
    assert all(row["answer"] == problems.answer(row["id"]) for row in problems.test_problems(FULL.problems, CHAINS))


@pytest.mark.parametrize("seed", [LARGE.seeds[0], LARGE.seeds[-1]])
def test_no_problem_is_both_trained_and_tested_nor_a_students_and_its_teachers(seed):
    student = {key(row) for row in problems.train_rows(FULL.rows, seed, FULL.noise, TESTED, CHAINS)}
    teacher = {key(row) for row in problems.teacher_rows(FULL.teacher_rows, seed, FULL.rows, TESTED, CHAINS)}
    assert (len(student), len(teacher), len(TESTED)) == (FULL.rows, FULL.teacher_rows, FULL.problems)
    assert not student & teacher and not student & TESTED and not teacher & TESTED


def test_where_there_are_few_problems_they_are_shared_out():
    """155 sums of one-digit pairs, of which 110 are used: by chance some would be drawn twice."""
    few = problems.Sums(2, 2, 1, 1)
    tested = problems.tested_keys(20, few)
    student = {key(row) for row in problems.train_rows(60, 1, 0.0, tested, few)}
    teacher = {key(row) for row in problems.teacher_rows(30, 1, 60, tested, few)}
    assert not student & teacher and not student & tested and not teacher & tested


def test_what_is_taken_is_left_out_in_any_order():
    first = problems.train_rows(30, 1, 0.0, frozenset(), CHAINS)
    taken = frozenset(map(key, first[:10]))
    assert not taken & {key(row) for row in problems.train_rows(30, 1, 0.0, taken, CHAINS)}
    assert problems.expression_key("12 + 34 - 5") == problems.expression_key("34 - 5 + 12")
    assert problems.expression_key("12 + 34 - 5") != problems.expression_key("12 - 34 + 5")


@pytest.mark.parametrize(
    "text, strict, lenient",
    [
        ("12 + 34 = 46, 46 - 5 = 41", True, True),
        (" 12 + 34 = 46,  46 - 5 = 41.\n", True, True),
        ("41", True, True),
        ("12 + 34 = 47, 47 - 5 = 41", True, True),  # the end is judged, and the form
        ("12 + 34 = 46, 46 - 5 = 42", False, False),
        ("12 + 34 = 46, 47 - 5 = 41", False, True),  # not from the result before
        ("12 + 34 - 5 = 41", False, True),
        ("46 - 5 = 41", False, True),
        ("12 + 34 = 46, 46 - 5 = 41, 41 + 0 = 41", False, True),
        ("12 + 34 = 46, 46 - 6 = 41", False, True),
        ("The answer is 41.", False, True),
        ("12 + 34 = 46, 46 - 5 = 410", False, False),
        ("no number", False, False),
    ],
)
def test_verdicts(text, strict, lenient):
    said = judge_worked.result(text, {"id": "12 + 34 - 5", "answer": "41"})
    assert (said["strict"], said["lenient"]) == (strict, lenient)


def test_steps_below_zero_are_read():
    row = {"id": "5 - 90 - 3", "answer": "-88"}
    assert judge_worked.result("5 - 90 = -85, -85 - 3 = -88", row)["strict"]
    assert not judge_worked.result("5 - 90 = 85, 85 - 3 = 88", row)["lenient"]


def test_two_terms_are_judged_as_in_the_small_form_whose_verifier_is_the_one_on_record():
    row = {"id": "5 - 9", "answer": "-4"}
    for text in ("5 - 9 = -4", "-4.", "5 - 9 = 4", "9 - 5 = -4", "it is -4", "", "-4 -4"):
        assert judge_worked.result(text, row) == judge.result(text, row)
    on_record = {
        cell["eval"]["tasks"][record.TASK]["verifier_version"] for cell in results.read(SMALL.results).values()
    }
    assert on_record == {graders.version(SMALL.settings.verifier)}


# -- cells and pieces ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_models.save_trained(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory) -> tuple[Path, Path]:
    """Results and scratch folder of the quick form, on a smaller model."""
    folder, scratch = tmp_path_factory.mktemp("results"), tmp_path_factory.mktemp("scratch")
    assert run.run(CELLS, TINY, folder, scratch, model) == len(CELLS)
    return folder, scratch


def test_every_cell_is_a_file_with_its_teacher(finished):
    folder, scratch = finished
    assert {file.name for file in folder.iterdir()} == {*(f"{c.name}.json" for c in CELLS), "teacher_seed1.json"}
    teacher = json.loads((folder / "teacher_seed1.json").read_text())
    assert teacher["training"]["after"]["nll"] < teacher["training"]["before"]["nll"]
    assert {cell.arm: "teacher" in made for cell, made in results.read(folder).items()} == {
        BASE: False,
        TARGET: True,
        KD_CONTEXT: False,
    }
    taught = results.read(folder)[Cell(1, NOISY, TARGET)]
    assert taught["teacher"]["weights"] == teacher["weights"]
    assert taught["settings"]["device"] == "cpu" and "gpu" not in taught["machine"]
    assert len(next(iter(taught["answers"].values()))) == TINY.n + 1
    assert not any((scratch / "work").iterdir())


def test_finished_cells_need_no_teacher_and_a_lost_one_is_made_again_the_same(finished, model, tmp_path):
    folder, _ = finished
    before = {file.name: file.read_text() for file in folder.iterdir()}
    lost = folder / f"{Cell(1, CLEAN, KD_CONTEXT).name}.json"
    lost.unlink()
    assert run.run(CELLS, TINY, folder, tmp_path, model) == 1
    assert not (tmp_path / "teachers").exists()  # no open cell needed it
    lost = folder / f"{Cell(1, NOISY, TARGET).name}.json"
    lost.unlink()
    assert run.run(CELLS, TINY, folder, tmp_path, model) == 1
    assert (tmp_path / "teachers" / "seed1" / "model.safetensors").is_file()
    for name, text in before.items():
        was, now = json.loads(text), json.loads((folder / name).read_text())
        for part in SAME:
            assert now.get(part) == was.get(part), (name, part)
    assert (
        json.loads((folder / "teacher_seed1.json").read_text())["weights"]
        == json.loads(before["teacher_seed1.json"])["weights"]
    )


def test_a_teacher_that_is_not_the_one_on_record_is_made_again(finished, model, tmp_path):
    folder, _ = finished
    cell, here = Cell(1, CLEAN, TARGET), tmp_path / "results"
    run.run([cell], replace(TINY, teacher_rows=8), tmp_path / "others", tmp_path, model)
    here.mkdir()
    shutil.copy(folder / "teacher_seed1.json", here)
    run.run([cell], TINY, here, tmp_path, model)  # the same scratch folder
    taught = [results.read(at)[cell]["teacher"] for at in (tmp_path / "others", here, folder)]
    assert taught[0] != taught[1] == taught[2]


def test_a_piece_stops_between_cells_and_the_same_command_goes_on(model, tmp_path, capsys):
    done = 0
    for left in range(len(CELLS) - 1, 0, -1):
        assert run.run(CELLS, TINY, tmp_path / "results", tmp_path, model, run.Clock(0.0)) == 1  # the first always
        done += 1
        assert len(results.read(tmp_path / "results")) == done
        assert f"cells run in this piece: 1, left: {left}; the same command goes on" in capsys.readouterr().out
        if done == 2:
            break
    assert run.run(CELLS, TINY, tmp_path / "results", tmp_path, model, run.Clock(60.0)) == len(CELLS) - done
    assert "the same command goes on" not in capsys.readouterr().out


def test_the_clock_counts_the_teacher_and_takes_the_longest_for_what_is_unknown(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    clock = run.Clock(minutes=1, started=90.0)  # to 150
    assert clock.allows("sft", "teacher")
    clock.took("sft", 20)
    clock.took("kd", 30)
    clock.took("sft", 10)
    assert clock.allows("sft", "kd") and not clock.allows("sft", "kd", "teacher")
    now = 125.0
    assert clock.allows("sft") and not clock.allows("kd") and not clock.allows("dft")
    assert run.Clock().allows("anything")


# -- what is refused -----------------------------------------------------------------------------------------------


def test_settings_of_other_runs_are_refused_before_any_work(finished, model, tmp_path, monkeypatch):
    folder, _ = finished
    monkeypatch.setattr(run, "qtarget", lambda *words: pytest.fail("it began"))
    cells = [Cell(2, CLEAN, TARGET), *CELLS]  # an open one comes first
    with pytest.raises(SystemExit, match=r"base\.json: device was 'cpu' and is now 'cuda'; move the old results away"):
        run.run(cells, replace(TINY, device="cuda"), folder, tmp_path, model)
    with pytest.raises(SystemExit, match=r"teacher_rows was 16 and is now 32"):
        run.run(cells, replace(TINY, teacher_rows=32), folder, tmp_path, model)
    with pytest.raises(SystemExit, match=r"real_model/base\.json: rows was 96 and is now 16"):
        run.run([Cell(0, CLEAN, BASE)], TINY, SMALL.results, tmp_path, model)  # the small form's


def test_a_package_that_is_missing_is_found_out_before_any_work(model, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "qtarget", lambda *words: pytest.fail("it began"))
    monkeypatch.setattr(record, "PACKAGES", ("torch", "no-such-package"))
    with pytest.raises(PackageNotFoundError, match="no-such-package"):
        run.run(CELLS, TINY, tmp_path / "results", tmp_path, model)


@pytest.mark.parametrize(
    "words, said",
    [
        (["--large", "--device", "cuda"], r"--device cuda: torch \S+ finds no CUDA device here; run it on a machine"),
        (["--device", "cuda"], r"--device cuda is for --large"),
    ],
)
def test_a_card_that_is_not_there_is_refused_before_any_work(words, said, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(run, "run", lambda *given: pytest.fail("it began"))
    with pytest.raises(SystemExit, match=said):
        run.main([*words, "--results", str(tmp_path / "results")])
    assert not any(tmp_path.iterdir())


def test_what_a_card_is_told(tmp_path):
    on_card = replace(FULL, device="cuda")
    trained = run.train_words(Cell(1, CLEAN, TARGET), on_card, tmp_path, tmp_path / "model", tmp_path / "teacher")
    asked = run.eval_words(on_card, tmp_path / "model", tmp_path / "sums.jsonl", tmp_path / "eval")
    assert trained[trained.index("--bf16") + 1] == "true" and trained[trained.index("--target") + 1] == TARGET
    assert trained[trained.index("--teacher_model_name_or_path") + 1] == tmp_path / "teacher"
    assert "--teacher_context" not in trained
    assert asked[asked.index("--dtype") + 1] == "bfloat16" and asked[asked.index("--batch_size") + 1] == 850
    context = run.train_words(Cell(1, CLEAN, KD_CONTEXT), FULL, tmp_path, tmp_path / "model")
    assert context[context.index("--bf16") + 1] == "false" and context[context.index("--target") + 1] == "kd"
    assert context[context.index("--teacher_model_name_or_path") + 1] == tmp_path / "model"
    assert "--teacher_context" in context and "--dtype" not in run.eval_words(FULL, *[tmp_path] * 3)


def test_a_cell_of_a_card_names_it(model, tmp_path, monkeypatch):
    """The CPU can train and answer in bfloat16, too, where it is asked to in so many words."""
    whole = run.qtarget
    monkeypatch.setattr(run, "qtarget", lambda *w: whole(*w, *(["--use_cpu", "true"] if w[0] == "train" else [])))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H200")
    on_card, cell = replace(TINY, device="cuda"), Cell(1, CLEAN, KD_CONTEXT)
    made = run.one(cell, on_card, tmp_path / "work", model)
    assert made["machine"]["gpu"] == "NVIDIA H200" and "cuda" in made["machine"]
    assert made["eval"]["dtype"] == "bfloat16" and made["settings"]["train"]["bf16"] is True


# -- page ----------------------------------------------------------------------------------------------------------


def test_without_results_no_page_is_written(tmp_path, monkeypatch):
    words = ["report", "--large", "--results", str(tmp_path / "none"), "--page", str(tmp_path / "page.md")]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit, match="no training seed of which every arm is finished, and no page is written"):
        report.main()
    assert not any(tmp_path.iterdir())


def test_results_are_read_once_they_are_there(finished, monkeypatch):
    folder, _ = finished
    monkeypatch.setattr(large_page, "LARGE", LARGE_QUICK)
    page = large_page.page(folder)
    base, taught = (results.read(folder)[cell] for cell in (CELLS[0], Cell(1, NOISY, TARGET)))
    assert f"| none | base | {100 * base['scores']['strict']['avg']:.1f} |" in page
    assert f"| noisy | target-sft | {100 * taught['scores']['strict']['avg']:.1f} |" in page
    assert f"| {taught['training']['after']['nll']:.3f} |" in page and taught["teacher"]["weights"] in page
    assert "| kd-context − base | +" in page and "3 to 5 terms" in page and "With one training seed" in page


def test_what_is_expected_is_of_differences_that_are_made():
    cells = {cell: {} for cell in LARGE.plan()}
    made = {(first, other) for _, first, others in results.groups(LARGE, cells) for other in others}
    for expected in expectations_large.EXPECTATIONS:
        assert (expected.first, expected.other) in made
    assert forms.LARGE.results != forms.SMALL.results
