"""cft's critical tokens: against a search that is slow and plain, in any batch, and killed at any moment."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from datasets import load_dataset
from transformers import AutoModelForCausalLM

import quick_runs
import signal_verifiers
import tiny_models
from qtarget.cli.__main__ import main
from qtarget.signals.decoding import Greedy

PHRASES = ["It is", "Sum is", "So"]  # ways to begin, the likeliest first: to take another does no harm
MAX_NEW = 12


def ids_of(messages: list[dict], prompt_only: bool = False) -> list[int]:
    return tiny_models.tokenizer().apply_chat_template(messages, add_generation_prompt=prompt_only)["input_ids"]


def asked(a: int, b: int) -> list[dict]:
    return [{"role": "user", "content": f"{a}+{b}="}]


def sums() -> list[tuple[int, int]]:
    return [(a, b) for a in range(1, 5) for b in range(1, 4)]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict:
    """A model that answers sums in three ways, and problems of which it gets three wrong."""
    root = tmp_path_factory.mktemp("critical")
    model = tiny_models.llama(width=48)
    rows = []
    for a, b in sums():
        for phrase, times in zip(PHRASES, (4, 2, 1), strict=True):
            said = [*asked(a, b), {"role": "assistant", "content": f"{phrase} {a + b}"}]
            rows += [(ids_of(said), len(ids_of(asked(a, b), True)))] * times
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([line + [0] * (longest - len(line)) for line, _ in rows])
    mask = torch.tensor([[1] * len(line) + [0] * (longest - len(line)) for line, _ in rows])
    labels = torch.tensor([[-100] * n + line[n:] + [-100] * (longest - len(line)) for line, n in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(90):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / 90)
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    # It must not matter: a penalty would make other tokens the likeliest.
    model.generation_config.repetition_penalty = 3.0
    model.save_pretrained(root / "model")
    tiny_models.tokenizer().save_pretrained(root / "model")
    problems = [{"prompt": asked(a, b), "answer": str(a + b), "source": f"s{a}"} for a, b in sums()]
    for wrong in (2, 5, 11):
        problems[wrong]["answer"] = "99"
    data = root / "data"
    data.mkdir()
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    settings = {
        "model_name_or_path": str(root / "model"),
        "dataset_name": str(data),
        "target": "cft",
        "output_dir": str(root / "run"),
        "report_to": "none",
        "use_cpu": True,
    }
    (root / "config.yaml").write_text(yaml.safe_dump(settings))
    return {"root": root, "problems": problems, "config": root / "config.yaml"}


def command(world: dict, folder: Path, *more: object, verifier: str = "last_number") -> list[str]:
    words = ["data", "critical", "--config", world["config"], "--verifier", f"signal_verifiers:{verifier}"]
    return [*map(str, [*words, "--max_new_tokens", MAX_NEW, "-o", folder, *more])]


@pytest.fixture(scope="module")
def found(world, tmp_path_factory) -> Path:
    """What the search finds, one sequence at a time."""
    folder = tmp_path_factory.mktemp("found") / "rows"
    assert main(command(world, folder, "--batch_size", 1)) == 0
    return folder


# -- against the plain one ---------------------------------------------------------------------------------------


def plainly(model, prompt: list[int], beginning: list[int]) -> list[int]:
    """The answer that begins so, decoded greedily without a cache: (ids, whether it ended)."""
    answer = list(beginning)
    for _ in range(MAX_NEW):
        if answer and answer[-1] == tiny_models.tokenizer().eos_token_id:
            break
        with torch.no_grad():
            answer.append(int(model(input_ids=torch.tensor([prompt + answer])).logits[0, -1].argmax()))
    return answer


def judged(answer: list[int], row: dict) -> bool:
    ended = answer[-1] == tiny_models.tokenizer().eos_token_id
    return ended and signal_verifiers.last_number(tiny_models.tokenizer().decode(answer[:-1]), row)


def expected(world: dict, count: int = 2) -> list[dict]:
    """Every alternative of every token tried, with no short cut."""
    model = AutoModelForCausalLM.from_pretrained(world["root"] / "model").eval()
    rows = []
    for row in world["problems"]:
        prompt = ids_of(row["prompt"], True)
        answer = plainly(model, prompt, [])
        if not judged(answer, row):
            continue
        mask = []
        for t in range(len(answer) - 1):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + answer[:t]])).logits[0, -1]
            others = logits.argsort(descending=True)[1 : count + 1].tolist()
            right = [judged(plainly(model, prompt, [*answer[:t], other]), row) for other in others]
            mask.append(int(not any(right)))
        rows.append(
            {
                "input_ids": prompt + answer,
                "labels": [-100] * len(prompt) + answer,
                "critical": [0] * len(prompt) + mask + [0],
                "source": row["source"],
            }
        )
    return rows


def read(folder: Path) -> list[dict]:
    return load_dataset(str(folder))["train"].to_list()


def test_the_mask_is_that_of_the_plain_search(world, found):
    wanted = expected(world)
    assert len(wanted) == 9, "the model does not answer what it was taught"
    masks = [mask for row in wanted for mask in row["critical"]]
    tried = sum(sum(label != -100 for label in row["labels"]) - 1 for row in wanted)
    assert 0 < sum(masks) < tried, "all tokens alike would prove nothing"
    assert read(found) == wanted


@pytest.mark.parametrize(
    "more",
    [
        ["--batch_size", "7"],
        ["--batch_size", "64"],
        ["--use_peft", "true", "--lora_target_modules", "q_proj", "v_proj"],
        ["--teacher_model_name_or_path", "nowhere", "--assistant_only_loss", "false", "--packing", "true"],
    ],
)
def test_what_decides_nothing(world, found, tmp_path, more):
    assert main(command(world, tmp_path / "rows", *more)) == 0
    for name in ("train.parquet", "signal.json"):
        assert (tmp_path / "rows" / name).read_bytes() == (found / name).read_bytes(), name


def test_with_one_alternative_more_tokens_are_critical(world, found, tmp_path):
    assert main(command(world, tmp_path / "rows", "--alternatives", 1)) == 0
    rows = read(tmp_path / "rows")
    assert rows == expected(world, 1)
    assert sum(sum(row["critical"]) for row in rows) > sum(sum(row["critical"]) for row in read(found))


def test_a_verifier_that_fails_is_counted_and_told(world, tmp_path, capsys):
    assert main(command(world, tmp_path / "rows", verifier="no_fours")) == 0
    report = json.loads((tmp_path / "rows" / "signal.json").read_text())["report"]
    fours = sum(row["answer"] == "4" for row in world["problems"])
    assert (report["timeouts"], report["errors"]) == (0, fours)
    assert report["correct"] == 9 - fours
    told = capsys.readouterr().out
    assert f"timed out 0 times, failed {fours} times, most recently with: ValueError: four" in told


def test_it_says_what_it_found(world, tmp_path, capsys):
    assert main(command(world, tmp_path / "rows")) == 0
    told = capsys.readouterr().out
    report = json.loads((tmp_path / "rows" / "signal.json").read_text())["report"]
    share = report["critical"] / report["tokens"]
    assert "12 rows" in told and "about" in told
    assert "problems   12, answered to the end 12, correctly 9" in told
    assert f"critical {report['critical']} ({share:.1%})" in told
    assert "timed out 0 times, failed 0 times" in told
    assert not (tmp_path / "rows" / "progress.jsonl").exists()


def test_training_reads_the_folder(world, found, tmp_path):
    more = {"dataset_name": found, "output_dir": tmp_path / "run", "max_steps": 2, "logging_steps": 1}
    more |= {"save_strategy": "no", "per_device_train_batch_size": 9, "learning_rate": 1e-3}
    flags = list(itertools.chain(*((f"--{name}", str(value)) for name, value in more.items())))
    assert main(["train", "--config", str(world["config"]), *flags]) == 0
    logged = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    rows = read(found)
    share = sum(sum(row["critical"]) for row in rows) / sum(sum(i != -100 for i in row["labels"]) for row in rows)
    assert logged[0]["trust"] == pytest.approx(share, abs=1e-6)


# -- prompts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "2+3="}, "2+3="),
        ({"prompt": asked(2, 3), "completion": [{"role": "assistant", "content": "5"}]}, asked(2, 3)),
        (tiny_models.message_dataset(2)[1], tiny_models.message_dataset(2)[1]["messages"][:3]),
        (tiny_models.from_value_dataset(2)[1], tiny_models.message_dataset(2)[1]["messages"][:3]),
        ({"messages": asked(2, 3)}, asked(2, 3)),
    ],
)
def test_prompts_are_the_trainers(tmp_path, row, prompt):
    greedy = Greedy(quick_runs.quick_trainer(tiny_models.llama(), tmp_path), MAX_NEW)
    wanted = tiny_models.tokenizer()(prompt)["input_ids"] if isinstance(prompt, str) else ids_of(prompt, True)
    assert greedy.prompt(row, 0) == wanted


def test_only_real_tokens_are_decoded(tmp_path):
    model = tiny_models.llama(vocab=len(tiny_models.tokenizer()) + 8, tied=False)
    with torch.no_grad():
        model.lm_head.weight[-8:] = 50 * model.lm_head.weight[:8]
    greedy = Greedy(quick_runs.quick_trainer(model, tmp_path), 4)
    inside = range(len(tiny_models.tokenizer()))
    prompts = [greedy.prompt({"prompt": asked(a, b)}, 0) for a, b in sums()]
    assert any(int(model(input_ids=torch.tensor([p])).logits[0, -1].argmax()) not in inside for p in prompts)
    assert all(index in inside for rest in greedy(prompts) for index in rest)
    assert all(index in inside for p in prompts for line in greedy.alternatives(p, [5, 6], 3) for index in line)


# -- stopped and resumed -----------------------------------------------------------------------------------------


def start(world: dict, folder: Path, calls: Path, hold: int) -> subprocess.Popen:
    tests = str(Path(__file__).parents[1] / "helpers")
    path = os.pathsep.join([tests, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {
        "PYTHONPATH": path,
        "SIGNAL_CALLS": str(calls),
        "SIGNAL_HOLD": str(hold),
        "OMP_NUM_THREADS": "1",
    }
    words = command(world, folder, "--batch_size", 3, verifier="logged")
    return subprocess.Popen(
        [sys.executable, "-m", "qtarget", *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def lines(file: Path) -> list[bytes]:
    return file.read_bytes().split(b"\n")[:-1] if file.exists() else []


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_search_killed_twice_ends_as_one_that_was_not(world, tmp_path, monkeypatch):
    monkeypatch.setenv("SIGNAL_CALLS", str(tmp_path / "calls"))
    whole, folder, calls = tmp_path / "whole", tmp_path / "rows", tmp_path / "calls"
    assert main(command(world, whole, "--batch_size", 3, verifier="logged")) == 0
    progress, hold = folder / "progress.jsonl", len(lines(calls)) // 3
    finished = 0
    for _ in range(2):
        calls.unlink()
        process = start(world, folder, calls, hold)
        while len(lines(progress)) < finished + 2:
            time.sleep(0.005)
            assert process.poll() is None, process.stdout.read().decode()
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kept = lines(progress)
        assert finished + 2 <= len(kept) < 12, "killed too late to prove anything"
        verifier = json.loads(calls.read_text().splitlines()[0])["pid"]
        while is_alive(verifier):  # it looks every second whether its parent lives
            time.sleep(0.05)
        finished = len(kept)
        with progress.open("ab") as stream:  # a line of which only the first half reached the disk
            stream.write(kept[0][: len(kept[0]) // 2])
    done = [json.loads(line)["problem"] for line in kept]
    assert len(set(done)) == len(done)
    calls.unlink()
    assert main(command(world, folder, "--batch_size", 3, verifier="logged")) == 0
    for name in ("train.parquet", "signal.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    assert calls.exists(), "nothing was left to do"


def test_finished_problems_are_not_verified_again(world, tmp_path, monkeypatch):
    monkeypatch.setenv("SIGNAL_CALLS", str(tmp_path / "calls"))
    folder = unfinished(world, tmp_path / "rows", range(3, 12))
    assert main(command(world, folder, verifier="logged")) == 0
    verified = {json.loads(line)["answer"] for line in (tmp_path / "calls").read_text().splitlines()}
    assert verified == {row["answer"] for row in world["problems"][:3]}


def unfinished(world: dict, folder: Path, done: range) -> Path:
    """A folder as a killed search leaves it, with some problems done."""
    assert main(command(world, folder, verifier="logged")) == 0
    manifest = json.loads((folder / "signal.json").read_text())
    (folder / "signal.json").write_text(json.dumps(manifest | {"finished": False}))
    (folder / "train.parquet").unlink()
    records = [{"problem": number, "ended": True, "correct": False} for number in done]
    (folder / "progress.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    Path(os.environ["SIGNAL_CALLS"]).unlink()
    return folder


# -- refusals ----------------------------------------------------------------------------------------------------


def refused(capsys, words: list[str]) -> str:
    capsys.readouterr()
    assert main(words) == 2
    return capsys.readouterr().err


def test_other_settings_do_not_go_on(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SIGNAL_CALLS", str(tmp_path / "calls"))
    folder = unfinished(world, tmp_path / "rows", range(3))
    before = (folder / "progress.jsonl").read_bytes()
    said = refused(capsys, command(world, folder))
    assert (
        "an unfinished run with verifier 'signal_verifiers:logged', and this one has 'signal_verifiers:last_number'"
        in said
    )
    said = refused(capsys, command(world, folder, "--alternatives", 1, verifier="logged"))
    assert "with alternatives 2, and this one has 1; resume with the settings it was started with" in said
    train = ["train", "--config", str(world["config"]), "--dataset_name", str(folder)]
    assert "which qtarget data critical has not finished; run the same command again" in refused(capsys, train)
    assert (folder / "progress.jsonl").read_bytes() == before
    (folder / "progress.jsonl").write_bytes(b"not json\n" + before)
    assert "progress.jsonl is damaged in line 1; delete that line" in refused(
        capsys, command(world, folder, verifier="logged")
    )


@pytest.mark.parametrize(
    ("verifier", "more", "sentence"),
    [
        ("never", [], "no greedy answer is right: of 12 problems 12 were answered to the end and 0 correctly"),
        ("always", [], "no token is critical: of 12 problems 12 were answered correctly, and each of their"),
        (
            "last_number",
            ["--max_new_tokens", "1"],
            "no greedy answer is right: of 12 problems 0 were answered to the end",
        ),
        ("last_number", ["--alternatives", "0"], "alternatives is 0; use a whole number from 1"),
        ("last_number", ["--batch_size", "many"], "batch_size is 'many'; use a whole number from 1"),
        ("last_number", ["--verifier_timeout", "0"], "verifier_timeout is 0; use a number above 0"),
        ("last_number", ["--max_new_tokens", "200"], "the model has 256 positions; lower max_new_tokens"),
        ("last_numbr", [], "signal_verifiers has no 'last_numbr'"),
    ],
)
def test_refusals(world, tmp_path, capsys, verifier, more, sentence):
    assert sentence in refused(capsys, command(world, tmp_path / "rows", *more, verifier=verifier))


def test_a_verifier_is_asked_for(world, tmp_path, capsys):
    words = ["data", "critical", "--config", str(world["config"]), "-o", str(tmp_path / "rows")]
    assert "verifier is not set; use reasoning_gym:TASK, math_verify" in refused(capsys, words)


def test_rows_without_prompts(world, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"text": "2+3=5", "answer": "5"}\n')
    said = refused(capsys, command(world, tmp_path / "rows", "--dataset_name", tmp_path / "data"))
    assert "the train split has columns text, answer, but critical answers prompts" in said
