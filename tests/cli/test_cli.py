"""The command line as users meet it: real processes, real models, every refusal by its sentence."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM
from trl import ScriptArguments

import qtarget as qt
import tiny_models
from qtarget.cli import fields, setup
from qtarget.cli import settings as reading
from qtarget.cli.__main__ import VERBS

QTARGET = [sys.executable, "-m", "qtarget"]


def run(*arguments: object, launcher: list[str] | None = None) -> subprocess.CompletedProcess:
    command = [*(launcher or QTARGET), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def rows_file(folder: Path, name: str, rows: list[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def token_rows(**columns) -> list[dict]:
    """Rows of token ids, all supervised, with further columns given as functions of the ids."""
    ids = [tiny_models.tokenizer()(sentence)["input_ids"][:20] for sentence in tiny_models.SENTENCES[:4]]
    return [{"input_ids": row, "labels": row, **{name: make(row) for name, make in columns.items()}} for row in ids]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Path]:
    """A model, teachers and datasets on disk, and a config that trains."""
    root = tmp_path_factory.mktemp("cli")
    for name, model, tokenizer in (
        ("model", tiny_models.llama(), tiny_models.tokenizer()),
        ("teacher", tiny_models.llama(3, width=16), tiny_models.tokenizer()),
        ("stranger", tiny_models.llama(3), tiny_models.tokenizer(extra="zebra quagga ")),
        ("broken", tiny_models.llama(), tiny_models.tokenizer()),
    ):
        if name == "broken":
            with torch.no_grad():
                model.model.norm.weight.fill_(float("nan"))
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    chats = tiny_models.conversation_dataset(8).to_list()
    data = rows_file(root / "data", "train", chats)
    rows_file(data, "test", chats[:2])
    rows_file(root / "wrong", "train", [{"question": "1 + 1?", "answer": "2"}])
    rows_file(root / "far", "train", [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 9999, 8]}] * 4)
    rows_file(root / "ignored", "train", [{"input_ids": [5, 6, 7], "labels": [-100, -100, -100]}] * 4)
    rows_file(root / "weights", "train", token_rows(weight=lambda ids: 0.5 + len(ids) % 2))
    rows_file(root / "negative", "train", token_rows(weight=lambda ids: -1.0))
    rows_file(root / "short", "train", token_rows(weight=lambda ids: [1.0] * (len(ids) - 2)))
    uneven = token_rows(weight=lambda ids: [1.0] * len(ids))
    uneven[2]["weight"] = uneven[2]["weight"][2:]
    rows_file(root / "one_short", "train", uneven)
    rows_file(root / "packed", "train", [{**row, "seq_lengths": [8, 12]} for row in token_rows()])
    rows_file(
        root / "sources",
        "train",
        [{**row, "source": s} for row, s in zip(token_rows(), ["math", "chat"] * 2, strict=True)],
    )
    share = {"schedule": "linear", "from": 0.0, "to": 1.0, "steps": 9}
    for name, target in (("stopped", "dft"), ("scheduled", {"preset": "dft", "share": share})):
        checkpoint = rows_file(root / name / "checkpoint-5", "state", [])
        (checkpoint / "trainer_state.json").write_text("{}")
        (checkpoint / "qtarget.json").write_text(json.dumps({"target": target, "denominator": "all_labels"}))
    (root / "a_file").write_text("not a folder")
    rows_file(root / "other_run" / "checkpoint-5", "state", [])
    (root / "not_yaml.yaml").write_text("target: [dft\nlearning_rate: 1")
    settings = {
        "model_name_or_path": str(root / "model"),
        "dataset_name": str(data),
        "target": "target-sft",
        "teacher_model_name_or_path": str(root / "teacher"),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "gradient_checkpointing": False,
    }
    (root / "config.yaml").write_text(yaml.safe_dump(settings))
    return {"root": root, "config": root / "config.yaml"}


# What is asked for beyond the config that trains → what the sentence must say. ROOT is the fixture's folder.
REFUSALS: dict[str, tuple[list[str], list[str]]] = {
    "unknown target": (["--target", "target-stf"], ["target is 'target-stf'; did you mean 'target-sft'?"]),
    "unknown parameter": (
        ["--target", "{preset: eaft, topk: 3}"],
        ["parameter of eaft is 'topk'", "did you mean 'top_k'"],
    ),
    "out of range": (["--target", "{preset: target-sft, eta: 1.5}"], ["eta is 1.5; use a number from 0 to 1"]),
    "unknown flag": (["--learning_rat", "1"], ["--learning_rat; did you mean learning_rate?"]),
    "wrong type": (["--learning_rate", "fast"], ["learning_rate is 'fast'; use a number"]),
    "no teacher": (
        ["--target", "kd", "--teacher_model_name_or_path", "none"],
        ["target kd(temperature=1.0) needs a teacher and got none; set teacher_model_name_or_path"],
    ),
    "no weight column": (["--target", "iw-sft"], ["needs weights", "has no column 'weight'"]),
    "no critical column": (["--target", "cft"], ["needs a mask of critical tokens", "no column 'critical'"]),
    "no old policy": (
        ["--target", "psft", "--psft_refresh", "never"],
        ["needs the old policy's log-probabilities", "no column 'old_logps'", "set psft_refresh to a number of steps"],
    ),
    "psft that is sft": (["--target", "psft", "--psft_refresh", "1"], ["r = 1 and the clip never acts"]),
    "other tokenizer": (
        ["--teacher_model_name_or_path", "ROOT/stranger"],
        ["has another tokenizer: id ", "use a teacher of the same family"],
    ),
    "columns that cannot be trained": (
        ["--dataset_name", "ROOT/wrong"],
        ["has columns answer, question; give it one of"],
    ),
    "nothing supervised": (["--target", "sft", "--dataset_name", "ROOT/ignored"], ["has no supervised token"]),
    "everything cut": (["--target", "sft", "--max_length", "4"], ["has no supervised token", "max_length"]),
    "label out of range": (
        ["--target", "sft", "--dataset_name", "ROOT/far"],
        ["row 0 of the train dataset: labels holds 9999, outside the vocabulary"],
    ),
    "not a number": (
        ["--target", "sft", "--model_name_or_path", "ROOT/broken"],
        ["logits are NaN or infinite at row 0, position"],
    ),
    "negative weight": (
        ["--target", "iw-sft", "--dataset_name", "ROOT/negative"],
        ["weight holds -1; weights must be 0 or more"],
    ),
    "weights too short": (
        ["--target", "iw-sft", "--dataset_name", "ROOT/short"],
        ["row 0 of the train dataset: column weight has 18 numbers for 20 tokens"],
    ),
    "one weight in the middle too short": (
        ["--target", "iw-sft", "--dataset_name", "ROOT/one_short"],
        ["row 2 of the train dataset: column weight has 18 numbers for 20 tokens"],
    ),
    "no generation markers": (
        ["--assistant_only_loss", "true", "--target", "sft"],
        ["the chat template has no {% generation %} markers"],
    ),
    "packed under an all-ones mask": (
        ["--target", "sft", "--dataset_name", "ROOT/packed"],
        ["the train dataset is packed (column seq_lengths), but its batches would get an all-ones mask"],
    ),
    "unknown source": (
        ["--target", "none", "--targets", "{math: dft}", "--dataset_name", "ROOT/sources"],
        ["row 1 of the train dataset: source is 'chat', which targets does not name; add it there (it has math)"],
    ),
    "a schedule out of range": (
        ["--target", "{preset: target-sft, eta: {schedule: linear, from: 0, to: 2}}"],
        ["on the schedule eta 0 → 2 (linear, the whole run)", "eta is 2.0; use a number from 0 to 1"],
    ),
    "resume with another target": (
        ["--output_dir", "ROOT/stopped", "--resume_from_checkpoint", "true"],
        [
            'target is {"preset": "target-sft", "eta": 0.5',
            "but the checkpoint",
            "was trained with 'dft'; resume with that, or start a new run",
        ],
    ),
    "resume with another schedule": (
        [
            *("--output_dir", "ROOT/scheduled", "--resume_from_checkpoint", "true"),
            *("--target", "{preset: dft, warmup_from_sft: 5}"),
        ],
        ['"to": 1.0, "steps": 5}}, but the checkpoint', '"to": 1.0, "steps": 9}}; resume with that'],
    ),
    "adapter on the head": (
        ["--use_peft", "--lora_target_modules", "q_proj", "lm_head"],
        ["lora_target_modules holds 'lm_head'; an adapter on the head is not supported"],
    ),
    "cannot write": (["--output_dir", "ROOT/a_file/run"], ["which cannot be written; choose a folder you own"]),
    "another run": (
        ["--output_dir", "ROOT/other_run"],
        ["which holds another run (checkpoint-5)", "resume_from_checkpoint"],
    ),
    "contradiction": (["--loss_type", "dft"], ["the settings contradict each other", "loss_type dft means dft"]),
    "no such dataset": (["--dataset_name", "ROOT/nowhere"], ["dataset_name is", "cannot be loaded"]),
    "not YAML": (["--config", "ROOT/not_yaml.yaml"], ["which is not YAML at line"]),
    "several at once": (
        ["--target", "dftt", "--learning_rat", "1", "--denominator", "some"],
        ["did you mean 'dft'?", "did you mean learning_rate?", "denominator is 'some'"],
    ),
}


# One sentence each, but where both the train and the test split lack something, or several things are wrong.
MORE_THAN_ONE = {
    "no weight column": 2,
    "no critical column": 2,
    "no old policy": 2,
    "everything cut": 2,
    "several at once": 3,
}


@pytest.fixture(scope="module")
def refused(world) -> dict[str, subprocess.CompletedProcess]:
    """All refusals, in one process of their own."""
    asked = []
    for name, (words, _) in REFUSALS.items():
        words = [word.replace("ROOT", str(world["root"])) for word in words]
        output = [] if "--output_dir" in words else ["--output_dir", str(world["root"] / f"out {name}")]
        asked.append(["train", "--config", str(world["config"]), *output, *words])
    batch = Path(__file__).parents[1] / "helpers" / "cli_batch.py"
    done = subprocess.run([sys.executable, batch], input=json.dumps(asked), capture_output=True, text=True, timeout=300)
    answers = json.loads(done.stdout.splitlines()[-1])
    return {name: subprocess.CompletedProcess([], *answer) for name, answer in zip(REFUSALS, answers, strict=True)}


@pytest.mark.parametrize("name", REFUSALS)
def test_bad_input_is_refused_in_a_sentence(name, refused):
    done = refused[name]
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("qtarget train: ")]
    for part in REFUSALS[name][1]:
        assert any(part in line for line in said), f"{part!r} is not in {said}"
    assert len(said) == (MORE_THAN_ONE.get(name, 1)), said


def test_what_only_training_can_see_names_the_step(refused):
    assert re.search(r"step 1: ", refused["not a number"].stderr)


def test_a_refusal_is_the_exit_status_of_the_process(world):
    done = run("train", "--config", world["config"], "--target", "target-stf")
    assert done.returncode == 2
    assert done.stdout == ""
    (sentence,) = done.stderr.splitlines()
    assert "did you mean 'target-sft'?" in sentence


def test_debug_shows_the_traceback(world):
    done = run("train", "--config", world["config"], "--target", "dftt", "--debug")
    assert done.returncode != 0
    assert "Traceback" in done.stderr


@pytest.fixture(scope="module")
def trained(world) -> tuple[subprocess.CompletedProcess, Path]:
    folder = world["root"] / "run"
    words = ["--output_dir", folder, "--learning_rate", "2e-3", "--target", "{preset: target-sft, eta: 0.3}"]
    return run("train", "--config", world["config"], *words), folder


def test_train_ends_with_a_model_a_table_and_a_picture(trained):
    done, folder = trained
    assert done.returncode == 0, done.stderr[-3000:]
    assert "target target-sft(eta=0.3, teacher_temperature=1.0): Q = p_y δ" in done.stdout
    assert "denominator all_labels; teacher " in done.stdout
    assert re.search(r"nll of the label \(nats\)\s+\d", done.stdout)
    assert "Student and teacher were" in done.stdout
    assert "\nnext\n  talk to the model\n    qtarget chat " in done.stdout
    assert (folder / "curves.png").stat().st_size > 10_000
    figures = json.loads((folder / "before_after.json").read_text())
    assert figures["after"]["nll"] != figures["before"]["nll"]
    assert json.loads((folder / "target.json").read_text())["eta"] == 0.3
    card = (folder / "README.md").read_text()
    assert "- eta: 0.3" in card and f"{figures['after']['nll']:.4f} |" in card
    model = AutoModelForCausalLM.from_pretrained(folder)
    start = tiny_models.llama()
    assert not torch.equal(model.get_output_embeddings().weight, start.get_output_embeddings().weight)


def test_a_peers_spelling_is_read_and_said(world):
    words = ["--use_eaft", "--teacher_model_name_or_path", "none", "--target", "none"]
    done = run("train", "--config", world["config"], *words, "--output_dir", world["root"] / "spelled")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "note: use_eaft (axolotl) is read as eaft(top_k=20, power=1.0, normalizer=none)" in done.stdout


def test_columns_reach_the_loss(world):
    words = ["--target", "iw-sft", "--dataset_name", world["root"] / "weights", "--output_dir", world["root"] / "iw"]
    done = run("train", "--config", world["config"], *words)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_folder_with_the_name_of_a_file_reader_is_the_folder(tmp_path, monkeypatch):
    """For ``datasets`` "text" alone is what reads .txt files."""
    rows_file(tmp_path / "text", "train", [{"text": "one"}, {"text": "two"}])
    (tmp_path / "train.txt").write_text("another\n")
    monkeypatch.chdir(tmp_path)
    datasets = setup.load_datasets(ScriptArguments(dataset_name="text"), faults := [])
    assert not faults and datasets["train"]["text"] == ["one", "two"]


@pytest.mark.parametrize(
    "launcher",
    [
        ["-m", "torch.distributed.run", "--nproc_per_node", "1", "-m", "qtarget"],
        ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m", "qtarget"],
    ],
    ids=["torchrun", "accelerate"],
)
def test_train_under_a_launcher(world, launcher):
    words = ["train", "--config", world["config"], "--max_steps", "1", "--output_dir", world["root"] / launcher[1]]
    done = run(*words, launcher=[sys.executable, *launcher])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("target target-sft(") == 1


@pytest.mark.parametrize("words", [["--help"], *([verb, "--help"] for verb in VERBS)], ids=" ".join)
def test_help_answers_without_what_is_slow_to_import(words):
    done = run(*words, launcher=[sys.executable, "-X", "importtime", "-m", "qtarget"])
    assert done.returncode == 0
    assert "usage" in done.stdout
    imported = set(re.findall(r"\| +([\w.]+)$", done.stderr, re.M))
    assert "qtarget.cli" in imported, "importtime lists what is imported"
    assert not imported & {
        "torch",
        "transformers",
        "trl",
        "datasets",
        "peft",
        "numpy",
        "pandas",
        "matplotlib",
        "requests",
    }


def test_help_needs_no_torch():
    asked = "; ".join(f"main(['{verb}', '--help'])" for verb in VERBS)
    probe = f"import sys; from qtarget.cli.__main__ import main; {asked}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize("verb", VERBS)
def test_help_names_every_option(verb):
    declared = importlib.import_module(f"qtarget.cli.verbs.{verb}").VERB
    assert declared.name == verb
    for command in declared.commands.values():
        assert f"qtarget {verb} {command.word}".rstrip() in declared.help()
        for option in command.options:
            assert re.search(rf"--{option.name}\b.*", declared.help()) and option.help, option.name


def test_no_verb_imports_a_verb():
    for file in (Path(qt.__file__).parent / "cli" / "verbs").glob("*.py"):
        assert "cli.verbs" not in file.read_text(encoding="utf-8"), file.name


@pytest.mark.parametrize(("module", "loads"), [("qtarget.cli.__main__", False), ("qtarget.losses", True)])
def test_who_loads_torch(module, loads):
    probe = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe]).returncode == int(loads)


def test_help_table_agrees_with_the_fields():
    from trl import ModelConfig, ScriptArguments

    known = {f.name: f for cls in (qt.QTargetConfig, ModelConfig, ScriptArguments) for f in dataclasses.fields(cls)}
    for rows in fields.THEIRS.values():
        for name, default, _ in rows:
            actual = known[name].default
            assert getattr(actual, "value", actual) == default, name


def test_every_own_field_is_in_the_help_table():
    from trl import SFTConfig

    own = {f.name for f in dataclasses.fields(qt.QTargetConfig)} - {f.name for f in dataclasses.fields(SFTConfig)}
    assert own <= set(fields.names())


def test_help_all_names_every_field():
    done = run("train", "--help_all")
    assert done.returncode == 0
    missing = [f.name for f in dataclasses.fields(qt.QTargetConfig) if f"--{f.name} " not in done.stdout]
    assert not missing


def test_targets_lists_all():
    done = run("targets", "--json")
    assert [record["name"] for record in json.loads(done.stdout)] == qt.presets.names()


@pytest.mark.parametrize("word", ["formula", "trusts", "the rest", "defaults", "needs", "source", "or in parts"])
def test_targets_show_says_everything(word):
    done = run("targets", "show", "eaft")
    assert done.returncode == 0
    assert re.search(rf"^{word} ", done.stdout, re.M)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["trian"], "verb is 'trian'; did you mean 'train'?"),
        (["targets", "show", "eatf"], "target is 'eatf'; did you mean 'eaft'?"),
        (["targets", "shwo"], "did you mean 'show'?"),
        (["env", "now"], "'now' belongs to no option; write options of env as --name value"),
    ],
)
def test_a_mistyped_word_is_answered(words, sentence):
    done = run(*words)
    assert done.returncode == 2
    assert sentence in done.stderr


def test_all_faults_of_the_options_at_once():
    done = run("plan", "--gpus", "none", "--k", "0", "--tflops", "-1")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "qtarget plan: gpus is 'none'; use a whole number from 1",
        "qtarget plan: k is 0; use a whole number from 1",
        "qtarget plan: tflops is -1; use a number above 0",
    ]


# -- the teacher as one mapping ------------------------------------------------------------------------------------


def flat(settings) -> dict[str, tuple]:
    """setting → (value, origin) of those that were given."""
    return {name: (settings.values["training"][name], origin) for name, origin in settings.origin.items()}


@pytest.mark.parametrize(
    ("file", "flags", "expected"),
    [
        ("teacher: org/a", [], {"teacher_model_name_or_path": ("org/a", "file")}),
        (
            "teacher: {cache: kept, tail: even, check_rows: 3, ema_decay: 1e-1}",
            [],
            {
                "teacher_cache": ("kept", "file"),
                "teacher_tail": ("even", "file"),
                "teacher_check_rows": (3, "file"),
                "teacher_ema_decay": (0.1, "file"),
            },
        ),
        ("teacher: {models: {a: 0.7, b: 0.3}}", [], {"teachers": ({"a": 0.7, "b": 0.3}, "file")}),
        ("{}", ["--teacher", "org/a"], {"teacher_model_name_or_path": ("org/a", "flag")}),
        (
            "{}",
            ["--teacher", "{model: org/a, init_kwargs: {dtype: bfloat16}}"],
            {
                "teacher_model_name_or_path": ("org/a", "flag"),
                "teacher_model_init_kwargs": ({"dtype": "bfloat16"}, "flag"),
            },
        ),
        (
            "{}",
            ["--teacher.model", "org/a", "--teacher.context=the answer is {{ answer }}"],
            {
                "teacher_model_name_or_path": ("org/a", "flag"),
                "teacher_context": ("the answer is {{ answer }}", "flag"),
            },
        ),
        (  # flags win setting by setting, whatever their form
            "teacher: {model: org/a, tail: even}",
            ["--teacher_model_name_or_path", "org/b"],
            {"teacher_model_name_or_path": ("org/b", "flag"), "teacher_tail": ("even", "file")},
        ),
        (
            "{teacher_model_name_or_path: org/a, teacher_tail: even}",
            ["--teacher", "org/b"],
            {"teacher_model_name_or_path": ("org/b", "flag"), "teacher_tail": ("even", "file")},
        ),
        (  # the same twice is no contradiction
            "{teacher: {check_rows: 3}, teacher_check_rows: 3}",
            [],
            {"teacher_check_rows": (3, "file")},
        ),
    ],
)
def test_a_teacher_as_one_mapping(file, flags, expected, tmp_path):
    (tmp_path / "config.yaml").write_text(file)
    read = reading.read(["--config", str(tmp_path / "config.yaml"), *flags])
    assert not read.faults
    assert flat(read) == expected


@pytest.mark.parametrize(
    ("file", "flags", "sentences"),
    [
        (
            "{teacher: {model: org/a}, teacher_model_name_or_path: org/b}",
            [],
            ["teacher.model is 'org/a' and teacher_model_name_or_path is 'org/b'; keep one of them"],
        ),
        (
            "{}",
            ["--teacher", "{tail: even}", "--teacher.tail", "student"],
            ["teacher.tail is 'student' and teacher_tail is 'even'; keep one of them"],
        ),
        (
            "teacher: {modle: org/a, cahce: kept}",
            [],
            ["teacher's key is 'modle'; did you mean 'model'?", "teacher's key is 'cahce'; did you mean 'cache'?"],
        ),
        (
            "teacher: [org/a]",
            [],
            ["teacher is ['org/a']; write a folder or hub id, or a mapping, as in {model: org/name"],
        ),
        ("teacher: {ema_decay: slow}", [], ["teacher_ema_decay is 'slow'; use a number"]),
    ],
)
def test_a_mapping_that_cannot_be_read(file, flags, sentences, tmp_path):
    (tmp_path / "config.yaml").write_text(file)
    read = reading.read(["--config", str(tmp_path / "config.yaml"), *flags])
    assert len(read.faults) == len(sentences)
    for fault, sentence in zip(read.faults, sentences, strict=True):
        assert fault.startswith(sentence)


def test_env_names_versions():
    done = run("env")
    assert done.returncode == 0
    assert re.search(r"^torch +\d", done.stdout, re.M)
    assert re.search(r"^trl +1\.16", done.stdout, re.M)
