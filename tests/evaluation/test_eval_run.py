"""``qtarget eval`` from the command line: files, resume, processes, faults of verifiers and of what was asked for."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from reasoning_gym.factory import DATASETS

import tiny_models
from qtarget import files
from qtarget.cli import terminal
from qtarget.cli.__main__ import main
from qtarget.cli.verbs import eval as cli_eval
from qtarget.errors import ConfigError
from qtarget.evaluation import graders, records, running, sampling, suites, tasks

FIELDS = (
    "task problem sample seed text finish tokens entropy parsed lenient_parsed strict lenient fault verifier_version"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_models.save_trained(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tiny_models.save_sums(tmp_path_factory.mktemp("rows") / "sums.jsonl")


def words(model, file, folder, /, **settings):
    given = {
        "model": model,
        "tasks": file,
        "verifier": "signal_verifiers:last_number",
        "n": 3,
        "max_new_tokens": 12,
        "batch_size": 4,
        "verifier_processes": 1,
        "output": folder,
        **settings,
    }
    return ["eval", *(word for name, value in given.items() for word in (f"--{name}", str(value)))]


@pytest.fixture(scope="module")
def finished(model, file, tmp_path_factory):
    """A finished folder, run once for all tests that read one."""
    folder = tmp_path_factory.mktemp("results") / "run"
    assert main(words(model, file, folder)) == 0
    return folder


def lines(folder, task="sums"):
    return [json.loads(line) for line in (folder / "samples" / f"{task}.jsonl").read_text().splitlines()]


# -- the folder ----------------------------------------------------------------------------------------------------


def test_each_sample_is_a_line(finished):
    rows = lines(finished)
    assert len(rows) == 5 * (3 + 1)
    assert all({*FIELDS.split()} <= row.keys() for row in rows)
    assert [row["sample"] for row in rows[:4]] == ["greedy", 0, 1, 2]
    assert all((row["seed"] is None) == (row["sample"] == "greedy") for row in rows)
    assert {row["verifier_version"][:7] for row in rows} == {"sha256-"}
    assert not any(row["strict"] for row in rows if row["finish"] == "length")
    assert not list((finished / "samples").glob("*.part"))
    scores = json.loads((finished / "scores.json").read_text())["tasks"]["sums"]
    assert scores["problems"] == 5 and len(scores["strict"]["pass"]) == 3
    assert scores["strict"]["avg"] == pytest.approx(
        sum(row["strict"] for row in rows if row["sample"] != "greedy") / 15
    )


def test_a_finished_folder_tells_its_scores_again(finished, model, file, capsys):
    before = (finished / "samples" / "sums.jsonl").read_bytes()
    assert main(words(model, file, finished)) == 0
    out = capsys.readouterr().out
    assert "is already finished" in out and "avg@n" in out
    assert (finished / "samples" / "sums.jsonl").read_bytes() == before


def test_batches_of_another_size_give_the_same_file(finished, model, file, tmp_path):
    assert main(words(model, file, tmp_path / "one", batch_size=1)) == 0
    strip = lambda rows: [{k: v for k, v in row.items() if k != "entropy"} for row in rows]  # noqa: E731
    assert strip(lines(tmp_path / "one")) == strip(lines(finished))


def test_the_order_of_problems_does_not_matter(finished, model, file, tmp_path):
    turned = tmp_path / "sums.jsonl"
    turned.write_text("\n".join(file.read_text().splitlines()[::-1]))
    assert main(words(model, turned, tmp_path / "out")) == 0
    key = lambda row: (row["problem"], str(row["sample"]))  # noqa: E731
    wanted = [(key(row), row["text"]) for row in sorted(lines(finished), key=key)]
    assert [(key(row), row["text"]) for row in sorted(lines(tmp_path / "out"), key=key)] == wanted


# -- killed and resumed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.13, 0.5, 0.77, 1.0])
def test_a_run_killed_anywhere_ends_with_the_same_bytes(finished, model, file, tmp_path, share):
    """What a killed process leaves: some whole lines and most often half of one."""
    whole = (finished / "samples" / "sums.jsonl").read_bytes()
    folder = begun(finished, tmp_path)
    (folder / "samples" / "sums.0.part").write_bytes(whole[: int(share * len(whole))])
    assert main(words(model, file, folder)) == 0
    assert (folder / "samples" / "sums.jsonl").read_bytes() == whole
    assert json.loads((folder / records.FILE).read_text())["finished"]


def test_parts_of_a_run_in_several_processes_are_gone_on_with_in_one(finished, model, file, tmp_path):
    whole = (finished / "samples" / "sums.jsonl").read_bytes().splitlines(keepends=True)
    folder = begun(finished, tmp_path)
    (folder / "samples" / "sums.0.part").write_bytes(b"".join(whole[:3]))
    (folder / "samples" / "sums.1.part").write_bytes(b"".join(whole[4:7]) + whole[7][:20])
    assert main(words(model, file, folder)) == 0
    assert (folder / "samples" / "sums.jsonl").read_bytes() == b"".join(whole)


def begun(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "samples" / "sums.jsonl").unlink()
    (folder / "scores.json").unlink()
    manifest = json.loads((folder / records.FILE).read_text())
    (folder / records.FILE).write_text(json.dumps({**manifest, "finished": False}))
    return folder


def start(arguments, **environment):
    path = os.pathsep.join([str(Path(__file__).parents[1] / "helpers"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, "-m", "qtarget", *arguments],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.full
def test_a_run_that_was_killed_goes_on(model, file, tmp_path, monkeypatch):
    """SIGKILL while samples are being written, twice: the verifier waits for it."""
    monkeypatch.setenv("SIGNAL_CALLS", str(tmp_path / "calls"))
    settings = {"verifier": "signal_verifiers:logged", "batch_size": 2}
    assert main(words(model, file, tmp_path / "whole", **settings)) == 0
    folder = tmp_path / "run"
    arguments = words(model, file, folder, **settings)
    part = folder / "samples" / "sums.0.part"
    for written in (2, 8):
        with start(arguments, SIGNAL_HOLD="8") as process:
            while not (part.is_file() and part.read_bytes().count(b"\n") >= written):
                assert process.poll() is None, process.stdout.read()
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
        assert written <= part.read_bytes().count(b"\n") < 20
    with part.open("ab") as stream:  # a write that was cut
        stream.write(b'{"task": "sums", "pro')
    assert main(arguments) == 0
    for name in ("samples/sums.jsonl", "problems/sums.jsonl", "scores.json", records.FILE):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_shares_of_two_processes_make_the_file_of_one(finished, model, file, tmp_path):
    """Both shares, one after the other, the second process first."""
    whole = (finished / "samples" / "sums.jsonl").read_bytes()
    folder = begun(finished, tmp_path)
    made = tasks.load(str(file), verifier="signal_verifiers:last_number")
    sampler = sampling.Sampler(str(model), max_new_tokens=12, temperature=1.0, top_p=1.0)
    prompts = tasks.prompts(made, sampler.tokenizer, "auto", 256, 12)
    settings = {"n": 3, "seed": 0, "prompts": prompts, "batch_size": 4, "timeout": 30.0}
    first, second = (running.Run(made, folder, rank=rank, world=2, **settings) for rank in range(2))
    for run in (second, first):
        run.sample(sampler)
        assert len(list((folder / "samples").glob("*.part"))) == (2 if run is first else 1)
    first.wait()
    first.finish()
    assert (folder / "samples" / "sums.jsonl").read_bytes() == whole


@pytest.mark.full
def test_two_processes_give_the_file_of_one(finished, model, file, tmp_path):
    folder = tmp_path / "run"
    arguments = words(model, file, folder)
    both = [start(arguments, RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    outputs = [process.communicate(timeout=240)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert (folder / "samples" / "sums.jsonl").read_bytes() == (finished / "samples" / "sums.jsonl").read_bytes()
    assert "avg@n" in outputs[0] and "avg@n" not in outputs[1]


def test_each_process_has_a_share(model, file, tmp_path):
    (tmp_path / "samples").mkdir()
    made = tasks.load(str(file), verifier="signal_verifiers:always")
    settings = {"n": 3, "seed": 0, "prompts": {}, "batch_size": 4, "timeout": 1.0}
    shares = [running.Run(made, tmp_path, rank=rank, world=2, **settings).batches() for rank in range(2)]
    keys = [{key for _, batch in share for key in batch} for share in shares]
    assert len(keys[0]) == 12 and len(keys[1]) == 8 and not keys[0] & keys[1]


# -- again, without a model ----------------------------------------------------------------------------------------


def test_rescoring_needs_no_model(finished, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    rows = lines(folder)
    rows[1] |= {"text": "so 0", "finish": "stop", "strict": False}
    (folder / "samples" / "sums.jsonl").write_text("".join(map(files.line, rows)))
    assert main(["eval", "--rescore", str(folder), "--verifier", "signal_verifiers:last_number"]) == 0
    assert "verdicts   1 changed of 20" in capsys.readouterr().out
    assert lines(folder)[1]["strict"] is True
    assert json.loads((folder / "scores.json").read_text())["tasks"]["sums"]["strict"]["avg"] >= 1 / 15
    manifest = json.loads((folder / records.FILE).read_text())
    assert manifest["finished"]
    (folder / records.FILE).write_text(json.dumps({**manifest, "finished": False}))
    with pytest.raises(ConfigError, match="is unfinished; run the same qtarget eval command again"):
        running.rescore(folder, 1.0)


# -- verifiers that fail -------------------------------------------------------------------------------------------


def sample(text, finish="stop"):
    return {"problem": "p", "sample": 0, "text": text, "finish": finish}


def test_a_verifier_that_hangs_raises_or_dies_is_counted():
    with running.Graders("signal_verifiers:moody", 600.0, 2) as open_graders:
        said = open_graders([(sample(text), {}) for text in ("right", "raise", "die", "right", "left")], "v")
        for grader in open_graders._graders:
            grader.timeout = 0.1
        said += open_graders([(sample("hang"), {})], "v")
    assert [one["strict"] for one in said] == [True, False, False, True, False, False]
    assert [one["fault"] for one in said] == [None, "error", "error", None, None, "timeout"]
    assert open_graders.last_error


def test_faults_of_verifiers_are_counted_and_shown(model, file, tmp_path, capsys):
    """Of a run's texts, changed to what the verifier hangs at, raises at and dies of."""
    folder = tmp_path / "run"
    assert main(words(model, file, folder, verifier="signal_verifiers:moody", n=1)) == 0
    rows = lines(folder)
    for row, text in zip(rows, ["hang", "raise", "die", "right"], strict=False):
        row |= {"text": text, "finish": "stop"}
    (folder / "samples" / "sums.jsonl").write_text("".join(map(files.line, rows)))
    capsys.readouterr()
    again = ["eval", "--rescore", str(folder), "--verifier", "signal_verifiers:moody", "--verifier_timeout", "2"]
    assert main(again) == 0
    out = capsys.readouterr().out
    assert "sums: the verifier timed out 1 times, failed 2 times" in out
    assert "verdicts   1 changed of 10" in out
    scores = json.loads((folder / "scores.json").read_text())["tasks"]["sums"]
    assert (scores["timeouts"], scores["errors"]) == (1, 2)
    assert [row["fault"] for row in lines(folder)[:4]] == ["timeout", "error", "error", None]
    assert [row["strict"] for row in lines(folder)[:4]] == [False, False, False, True]


def test_a_model_that_never_stops_is_wrong_and_counted(file, tmp_path, capsys):
    import torch

    endless = tiny_models.llama(tied=False)
    with torch.no_grad():
        endless.lm_head.weight.zero_()  # every token alike: an end token is rare, and 9 tokens are soon over
    endless.save_pretrained(tmp_path / "model")
    tiny_models.tokenizer().save_pretrained(tmp_path / "model")
    given = words(tmp_path / "model", file, tmp_path / "run", verifier="signal_verifiers:always", max_new_tokens=9)
    assert main(given) == 0
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())["tasks"]["sums"]
    rows = [row for row in lines(tmp_path / "run") if row["sample"] != "greedy"]
    assert scores["truncated"] > 0.5
    assert scores["truncated"] == pytest.approx(sum(row["finish"] == "length" for row in rows) / len(rows))
    assert all(row["tokens"] == 9 and not row["strict"] for row in rows if row["finish"] == "length")
    right = [row["finish"] == "stop" and bool(row["text"].strip()) for row in rows]
    assert scores["strict"]["avg"] == pytest.approx(sum(right) / len(rows))
    assert f"{scores['truncated']:.1%} cut off" in capsys.readouterr().out


def judged_in_turn(bomb):
    """The bomb, which is given a second, then a right answer by the same grader, which is given all the time it needs."""
    with running.Graders("math", 1.0) as open_graders:
        said = open_graders([(sample(bomb), {"answer": "7"})], "v")
        open_graders._graders[0].timeout = 600.0
        return said + open_graders([(sample("\\boxed{7}"), {"answer": "7"})], "v")


@pytest.mark.parametrize(
    "bomb",
    ["\\boxed{9^{9^{9^{9}}}}", "\\boxed{(((2^{99999})^{99999})^{99999})!}"],
)
def test_a_huge_power_is_ended_and_counted(bomb):
    said = judged_in_turn(bomb)
    assert [one["strict"] for one in said] == [False, True]
    assert said[0]["fault"] in ("timeout", "error") and said[1]["fault"] is None


@pytest.mark.parametrize("depth", [200, 10_000])
def test_deep_nesting_is_ended_and_counted(depth):
    bomb = "\\boxed{" + "\\frac{1}{1+" * depth + "1" + "}" * depth + "}"
    said = judged_in_turn(bomb)
    assert [one["strict"] for one in said] == [False, True]
    assert depth < 10_000 or said[0]["fault"] in ("timeout", "error")


def test_what_was_cut_off_or_empty_is_wrong():
    with running.Graders("math", 600.0) as open_graders:
        said = open_graders(
            [(sample("\\boxed{7} and", "length"), {"answer": "7"}), (sample(" "), {"answer": "7"})], "v"
        )
    assert [(one["parsed"], one["strict"], one["lenient"]) for one in said] == [
        ("7", False, False),
        (None, False, False),
    ]


def test_an_output_of_100_kb_travels_to_the_verifier_and_back():
    with running.Graders("math", 600.0) as open_graders:
        said = open_graders([(sample("x" * 100_000 + "\\boxed{7}" + "y" * 100_000), {"answer": "7"})], "v")
    assert said[0]["strict"] and said[0]["fault"] is None


def test_a_verifier_may_say_what_it_read():
    said = graders._verdict("m:f", {"strict": True, "parsed": 7})
    assert said == {"parsed": "7", "lenient_parsed": "7", "strict": True, "lenient": True}
    with pytest.raises(ConfigError, match="without 'strict'"):
        graders._verdict("m:f", {"right": True})


def test_the_time_left_is_told(capsys, monkeypatch):
    """On a terminal by the bar; elsewhere once, after the first batch."""
    clock = iter([0.0, 30.0])
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock, 99.0))
    step = cli_eval._progress(40)
    step(10)
    step(20)
    told = capsys.readouterr().out
    assert told.count("answers, by the first 10") == 1 and "for the other 30 answers" in told
    assert told.startswith("about 1 min 30 s for"), told


# -- tasks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["chain_sum", "gsm_symbolic", "spell_backward", "countdown", "mini_sudoku", "knights_knaves"]
)
def test_gold_answers_of_generated_tasks_are_right(name):
    task = tasks.load(name, problems=3)[0]
    grade = graders.load(task.grader)
    for problem in task.problems:
        if problem.row["answer"] is not None:
            assert grade(f"<answer>{problem.row['answer']}</answer>", problem.row)["strict"]
            assert not grade("<answer>nonsense</answer>", problem.row)["strict"]


def test_generated_tasks_are_the_same_each_time_and_differ_by_seed():
    first, again, other = (tasks.load("chain_sum", problems=3, task_seed=seed)[0] for seed in (0, 0, 1))
    assert first.digest == again.digest != other.digest
    assert "chain_sum" in DATASETS


def fake_hub(monkeypatch, rows):
    import datasets

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *words, **more: asked.append((words, more)) or rows)
    return asked


def test_a_benchmark_has_its_number_of_items(monkeypatch):
    asked = fake_hub(monkeypatch, [{"problem": f"{i}?", "answer": str(i)} for i in range(30)])
    task = tasks.load("aime24")[0]
    assert (task.grader, len(task.problems), task.instruction) == ("math", 30, tasks.BOXED)
    assert asked == [(("HuggingFaceH4/aime_2024", None), {"split": "train"})]
    fake_hub(monkeypatch, [{"problem": "1?", "answer": "1"}] * 29)
    with pytest.raises(ConfigError, match="gives 29 items and the published numbers are from 30"):
        tasks.load("aime24")


def test_the_suites_hold_what_the_papers_used():
    counts = {suite: [suites.BENCHMARKS[name].counts[0] for name in names] for suite, names in suites.SUITES.items()}
    assert counts["math5"] == [272, 675, 30, 40, 500]
    assert counts["med10"] == [4183, 1273, 1000, 1535, 412, 308, 308, 1449, 603, 390]
    assert suites.BENCHMARKS["hle"].counts == (158,) and "hle" not in suites.SUITES["med10"]


@pytest.mark.parametrize(
    "row",
    [
        {"question": "?", "opa": "w", "opb": "x, y", "opc": "y", "opd": "z", "cop": 1},
        {"question": "?", "options": {"A": "w", "B": "x, y", "C": "y"}, "answer_idx": "B", "answer": "x, y"},
        {"question": "?", "options": ["w", "x, y"], "answer_index": 1, "answer": "B"},
        {"question": "?", "options": '{"A": "w", "B": "x, y"}', "answer": "x, y"},
        {"question": "?", "options": [{"key": "A", "value": "w"}, {"key": "B", "value": "x, y"}], "answer": "B"},
    ],
)
def test_choices_are_read_from_the_columns_that_sets_have(row):
    read = suites.choice_row(row)
    assert (read["answer"], read["options"][1]) == ("B", "x, y")


def test_columns_that_are_not_understood_are_named(monkeypatch):
    assert suites.choice_row({"question": "?", "options": ["a", "b"], "answer": "E"}) is None
    fake_hub(monkeypatch, [{"aufgabe": "1?", "answer": "1"}] * 30)
    with pytest.raises(ConfigError, match="row 0 of HuggingFaceH4/aime_2024 has columns aufgabe, answer"):
        tasks.load("aime24")


def test_prompts():
    problem = tasks.Problem("p", "2 + 2?", {})
    tokenizer = tiny_models.tokenizer()
    read = lambda style, instruction="": tokenizer.decode(tasks.prompt_ids(tokenizer, style, problem, instruction))  # noqa: E731
    assert read("plain") == "2 + 2?"
    assert read("plain", "Box it.") == "2 + 2?\nBox it.\n"
    assert read("auto", "Box it.") == "<|im_start|>user\n2 + 2?\nBox it.<|im_end|>\n<|im_start|>assistant\n"
    assert read("qwen-boxed").startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>")
    assert "2 + 2?\nPlease reason step by step" in read("qwen-boxed")


# -- refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"tasks": "gsm_symbolc"}, "task is 'gsm_symbolc'; did you mean 'gsm_symbolic'?"),
        ({"tasks": ""}, "tasks is not set; write --tasks"),
        ({"tasks": ","}, "tasks is not set; name"),
        ({"tasks": "chain_sum,chain_sum"}, "tasks names 'chain_sum' twice"),
        ({"tasks": "nowhere.jsonl"}, "task is 'nowhere.jsonl', which is not a file"),
        ({"tasks": "aime24"}, "task is 'aime24', whose data HuggingFaceH4/aime_2024 cannot be loaded"),
        ({"model": "/nowhere"}, "model is '/nowhere'"),
        ({"verifier": "mth"}, "verifier is 'mth'; did you mean 'math'?"),
        ({"n": "-1"}, "n is -1; use a whole number from 0"),
        ({"temperature": "0"}, "temperature is 0; the greedy answer is always included"),
        ({"top_p": "1.5"}, "top_p is 1.5; use a number above 0 to 1"),
        ({"max_new_tokens": "4000"}, "max_new_tokens is 4000: the prompt of problem"),
        ({"prompt": "caht"}, "prompt is 'caht'; did you mean 'chat'?"),
        ({"dtype": "fp4"}, "dtype is 'fp4'"),
        ({"problem": "3"}, "option of eval is '--problem'; did you mean '--problems'?"),
        ({"verifier_timeout": "0"}, "verifier_timeout is 0;"),
    ],
)
def test_refusals(model, file, tmp_path, capsys, changed, sentence):
    assert main(words(model, file, tmp_path / "out", **changed)) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "which has no problem"),
        ('{"prompt": "a", "answer": "b"}\n{"prompt"', "line 2, is not JSON"),
        ('{"prompt": "a"}', "line 1, has no 'answer'"),
        ('{"prompt": "", "answer": "1"}', "line 1, has the prompt ''"),
        ("[1]", "line 1, has no 'prompt'"),
        ('{"prompt": "a", "answer": "1", "id": 7}\n{"prompt": "b", "answer": "1", "id": 7}', "id '7' appears twice"),
    ],
)
def test_files_that_are_refused(tmp_path, text, sentence):
    file = tmp_path / "rows.jsonl"
    file.write_text(text)
    with pytest.raises(ConfigError) as refused:
        tasks.load(str(file), verifier="math")
    assert sentence in str(refused.value)


def test_a_file_needs_a_verifier(file):
    with pytest.raises(ConfigError, match=r"verifier is not set, and .* needs one"):
        tasks.load(str(file))


def test_another_run_is_not_mixed_in(finished, model, file, tmp_path, capsys):
    assert main(words(model, file, finished, temperature="0.5")) == 2
    assert "holds a run with temperature 1.0, and this one has 0.5" in capsys.readouterr().err
    (tmp_path / "own.txt").write_text("mine")
    assert main(words(model, file, tmp_path)) == 2
    assert "which is not an empty folder" in capsys.readouterr().err
    assert (tmp_path / "own.txt").read_text() == "mine"


def test_a_begun_run_goes_on_with_other_batches(finished, model, file, tmp_path):
    whole = (finished / "samples" / "sums.jsonl").read_bytes().splitlines(keepends=True)
    folder = begun(finished, tmp_path)
    (folder / "samples" / "sums.0.part").write_bytes(b"".join(whole[:7]))
    assert main(words(model, file, folder, batch_size=2)) == 0
    strip = lambda rows: [{k: v for k, v in row.items() if k != "entropy"} for row in rows]  # noqa: E731
    assert strip(lines(folder)) == strip(lines(finished))
    assert (folder / "samples" / "sums.jsonl").read_bytes().splitlines(keepends=True)[:7] == whole[:7]


def test_a_finished_run_goes_on_with_more_samples(finished, model, file, tmp_path, capsys):
    """What is there stays byte for byte, and what is added is what a run of so many makes."""
    folder = tmp_path / "more"
    shutil.copytree(finished, folder)
    before = {(row["problem"], row["sample"]): row for row in lines(folder)}
    assert main(words(model, file, folder, n=5)) == 0
    assert "30 answers of up to 12 tokens, 10 to do" in capsys.readouterr().out
    assert main(words(model, file, tmp_path / "fresh", n=5)) == 0
    strip = lambda rows: [{k: v for k, v in row.items() if k != "entropy"} for row in rows]  # noqa: E731
    assert strip(lines(folder)) == strip(lines(tmp_path / "fresh"))
    assert before.items() <= {(row["problem"], row["sample"]): row for row in lines(folder)}.items()
    manifest = json.loads((folder / records.FILE).read_text())
    assert (manifest["n"], manifest["finished"]) == (5, True)
    assert len(json.loads((folder / "scores.json").read_text())["tasks"]["sums"]["strict"]["pass"]) == 5
    assert main(words(model, file, folder, n=3)) == 2
    assert "holds a run with n 5, and this one has 3" in capsys.readouterr().err


def test_few_problems_are_said_to_be_few(finished, model, file, capsys):
    assert main(words(model, file, finished)) == 0
    assert "Task sums has 5 problems: too few for a reliable interval." in capsys.readouterr().out


def test_generated_tasks_need_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)  # what Python does for a package that cannot be imported
    assert main(["eval", "--model", "m", "--tasks", "chain_sum", "-o", "out"]) == 2
    said = capsys.readouterr().err
    assert "task is 'chain_sum', which is none of" in said
    assert 'reasoning-gym, which is not installed, come with pip install "qtarget[eval]"' in said


def test_a_damaged_line_is_named(finished, model, file, tmp_path, capsys):
    folder = begun(finished, tmp_path)
    (folder / "samples" / "sums.0.part").write_text('{"problem": 1}\nnonsense\n{}\n')
    assert main(words(model, file, folder)) == 2
    assert "sums.0.part is damaged in line 2; delete that line" in capsys.readouterr().err
