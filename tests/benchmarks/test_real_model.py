"""The real-model check: its rows, its verdicts, that finished cells stay, and that its page is what the results say.

The cells here are run on a model made on the spot; nothing is asserted of which target does better.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from real_model import forms, judge, problems, record, report, results, run
from real_model.forms import BASE, CLEAN, NOISY, SFT, TARGET, Cell, Settings

import tiny_models
from qtarget.evaluation import records, tasks
from qtarget.teachers.context import Context

FULL = Settings()
TESTED = problems.tested_keys(FULL.problems)
SMALL = Settings(rows=4, noise=0.5, problems=2, held_out=2, n=2, max_new_tokens=4)
SEEDS = (1, 2, 3)


def problem_rows(seed: int, noise: float = FULL.noise) -> list[dict]:
    return problems.train_rows(FULL.rows, seed, noise, TESTED)


def sums(made: list[dict]) -> list[str]:
    return [row["solution"].partition(" = ")[0] for row in made]


# -- rows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_no_sum_is_both_trained_and_tested(seed):
    trained = {problems.expression_key(expression) for expression in sums(problem_rows(seed))}
    tested = {problems.expression_key(row["id"]) for row in problems.test_problems(FULL.problems)}
    assert not trained & tested
    assert len(trained) == FULL.rows and len(tested) == FULL.problems >= 100
    asked = {json.dumps(row["prompt"]) for row in problem_rows(seed)}
    assert not asked & {json.dumps(row["prompt"]) for row in problems.test_problems(FULL.problems)}


def test_a_sum_turned_round_is_the_same_and_a_difference_is_not():
    assert problems.expression_key("5 + 3") == problems.expression_key("3 + 5")
    assert problems.expression_key("5 - 3") != problems.expression_key("3 - 5")


@pytest.mark.parametrize("noise, wrong", [(0.0, 0), (0.25, 24), (0.5, 48)])
def test_the_share_of_wrong_demonstrations_and_the_solutions(noise, wrong):
    made = problem_rows(1, noise)
    differ = 0
    for row in made:
        expression, _, solution = row["solution"].partition(" = ")
        said, _, label = row["completion"][0]["content"].partition(" = ")
        assert said == expression and row["prompt"] == problems.prompt(expression)
        assert int(solution) == eval(expression)
        differ += label != solution
    assert differ == wrong
    assert sums(made) == sums(problem_rows(1, 0.0))  # in the same order


def test_a_seed_is_its_rows():
    assert problem_rows(2) == problem_rows(2)
    assert sums(problem_rows(2)) != sums(problem_rows(3))
    assert problems.test_problems(FULL.problems) == problems.test_problems(FULL.problems)


def test_the_teacher_reads_the_right_answer_of_a_wrong_demonstration():
    row = next(row for row in problem_rows(1) if row["completion"][0]["content"] != row["solution"])
    tokenizer = tiny_models.tokenizer()
    own = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
    answer = tokenizer(row["completion"][0]["content"] + "<|im_end|>")["input_ids"]
    context = Context({"prompt": FULL.context}, tokenizer)
    read, begin = context.of(row, [*own, *answer], [-100] * len(own) + answer)
    said = tokenizer.decode(read)
    assert f"nothing else: {row['solution']}<" in said and row["completion"][0]["content"] not in said
    assert begin == len(own)


@pytest.mark.parametrize(
    "text, strict, lenient",
    [
        ("59 + 63 = 122", True, True),
        ("122", True, True),
        (" 59 + 63  = 122.\n", True, True),
        ("59 + 63 = 121", False, False),
        ("59 + 63 = 1220", False, False),
        ("59 + 63 = -122", False, False),
        ("63 + 59 = 122", False, True),
        ("The answer is 122.", False, True),
        ("122 apples and 7 pears", False, False),
        ("59 + 63 = 122.5", False, False),
        ("To add 59 and 63,", False, False),
        ("no number", False, False),
    ],
)
def test_verdicts(text, strict, lenient):
    said = judge.result(text, {"id": "59 + 63", "answer": "122"})
    assert (said["strict"], said["lenient"]) == (strict, lenient)


def test_negative_results_and_patterns_in_a_sum():
    assert judge.result("5 - 9 = -4", {"id": "5 - 9", "answer": "-4"})["strict"]
    assert not judge.result("5 - 9 = 4", {"id": "5 - 9", "answer": "-4"})["lenient"]
    assert judge.result("5  - 9 = -4", {"id": "5 - 9", "answer": "-4"})["strict"]
    assert not judge.result("55 + 9 = 14", {"id": "5 + 9", "answer": "14"})["strict"]  # "+" is no pattern


# -- cells ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_models.trained_model().save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    return folder


CELLS = [Cell(0, CLEAN, BASE), Cell(1, CLEAN, SFT), Cell(1, NOISY, TARGET)]


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    assert run.run(CELLS, SMALL, folder, tmp_path_factory.mktemp("scratch"), model) == len(CELLS)
    return folder


def test_finished_cells_are_not_run_again_and_a_lost_one_comes_back_the_same(finished, model, tmp_path):
    files = {file.name: file.read_bytes() for file in finished.iterdir()}
    assert {*files} == {f"{cell.name}.json" for cell in CELLS}
    assert run.run(CELLS, SMALL, finished, tmp_path, model) == 0
    lost = finished / f"{CELLS[2].name}.json"
    lost.unlink()
    assert run.run(CELLS, SMALL, finished, tmp_path, model) == 1
    before, now = json.loads(files[lost.name]), json.loads(lost.read_text())
    for part in ("seed", "condition", "arm", "settings", "training", "answers", "scores"):
        assert now[part] == before[part]
    assert {f.name: f.read_bytes() for f in finished.iterdir() if f != lost} == {
        name: held for name, held in files.items() if name != lost.name
    }
    assert not any((tmp_path / "work").iterdir())  # no weights are left


def test_a_cell_that_is_stopped_leaves_nothing_and_starts_anew(model, tmp_path, monkeypatch):
    whole = run.qtarget

    def stopped(*words: object) -> None:
        if words[0] == "eval":
            raise KeyboardInterrupt
        whole(*words)

    monkeypatch.setattr(run, "qtarget", stopped)
    with pytest.raises(KeyboardInterrupt):
        run.run(CELLS[1:2], SMALL, tmp_path / "results", tmp_path, model)
    assert not (tmp_path / "results").exists()
    monkeypatch.setattr(run, "qtarget", whole)
    assert run.run(CELLS[1:2], SMALL, tmp_path / "results", tmp_path, model) == 1


def test_cells_of_other_settings_are_refused(finished, model, tmp_path):
    with pytest.raises(SystemExit, match=r"base\.json: rows was 4 and is now 5; move the old results away"):
        run.run(CELLS, Settings(**{**vars(SMALL), "rows": 5}), finished, tmp_path, model)


def test_a_cell_gives_back_the_folder_it_was_made_from(model, tmp_path):
    made = run.one(CELLS[1], SMALL, tmp_path / "work", model)
    there, again = tmp_path / "work" / "eval", results.unpack(made, tmp_path / "again")
    for was, now in zip(records.samples(there, record.TASK), records.samples(again, record.TASK), strict=True):
        assert was.pop("entropy") == pytest.approx(now.pop("entropy"), rel=1e-4)
        assert was == now
    assert records.problems(again, record.TASK) == records.problems(there, record.TASK)


# -- results and page ----------------------------------------------------------------------------------------------


def test_the_results_on_record_are_of_these_problems_and_settings():
    cells = results.read(forms.SMALL.results)
    assert Cell(0, CLEAN, BASE) in cells and {*cells} <= {*forms.SMALL.plan()}
    rows = problems.test_problems(FULL.problems)
    made = [tasks.Problem(row["id"], row["prompt"], row) for row in rows]
    digest = tasks.Task(record.TASK, "real_model.judge:result", "", made).digest
    for cell in cells.values():
        assert cell["settings"] == json.loads(json.dumps(record.shared_settings(FULL)))
        assert cell["eval"]["tasks"][record.TASK]["digest"] == digest
        assert [*cell["answers"]] == [row["id"] for row in rows]
        assert {len(answers) for answers in cell["answers"].values()} == {FULL.n + 1}


def test_the_verdicts_on_record_are_those_of_the_verifier():
    for cell in results.read(forms.SMALL.results).values():
        for expression, answers in cell["answers"].items():
            row = {"id": expression, "answer": results.answer(expression)}
            for text, _, ended, _, strict, lenient in answers:
                said = judge.result(text, row)
                assert (strict, lenient) == (ended and said["strict"], ended and said["lenient"]), text


def test_the_page_is_what_the_results_say():
    assert report.PAGE.read_text(encoding="utf-8") == report.page(forms.SMALL.results)
