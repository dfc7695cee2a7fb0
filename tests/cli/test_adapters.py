"""An adapter on the command line: every verb takes it, and what a run prints at its end works."""

from __future__ import annotations

import io
import json
import shlex
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
import yaml
from peft import PeftModel, PromptTuningConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny_models
from adapter_folders import write_adapter, write_base
from qtarget.cli.__main__ import main
from qtarget.teachers.cache.reader import CachedTeacher

LONG = 2048  # positions, so that a problem of a task and its answer have room
QUESTION = "Tom has 3"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """base, adapter (of PEFT alone), rows and a config that trains."""
    root = tmp_path_factory.mktemp("adapters")
    base = write_base(root / "base")
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": LONG}))
    write_adapter(root / "adapter", base)
    for split in ("train", "test"):
        rows = "".join(json.dumps(row) + "\n" for row in tiny_models.conversation_dataset(6))
        (root / "rows").mkdir(exist_ok=True)
        (root / "rows" / f"{split}.jsonl").write_text(rows)
    (root / "sums.jsonl").write_text('{"prompt": "1 + 1 = ?", "answer": "2"}\n')
    config = {
        "model_name_or_path": str(root / "adapter"),
        "dataset_name": str(root / "rows"),
        "output_dir": str(root / "run"),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
        "gradient_checkpointing": False,
    }
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    return root


def by_peft(world: Path, adapter: str = "adapter"):
    base = AutoModelForCausalLM.from_pretrained(world / "base")
    return PeftModel.from_pretrained(base, world / adapter).eval(), AutoTokenizer.from_pretrained(world / "base")


def answer_of(model, tokenizer, messages, tokens) -> str:
    """Greedy, by Transformers alone; only its end of turn ends it."""
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=tokens, do_sample=False, eos_token_id=[0, 2], pad_token_id=0)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def said(capsys, *words: object) -> str:
    capsys.readouterr()
    status = main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert status == 0, err[-2000:]
    return out


# -- after a run ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adapter", "plain"])
def test_what_the_last_lines_print_works(kind, world, tmp_path, capsys, monkeypatch):
    """Each command as it is printed; eval's with fewer problems and shorter answers."""
    run = tmp_path / "a run"
    start = world / ("adapter" if kind == "adapter" else "base")
    config = ["--config", world / "config.yaml", "--model_name_or_path", start, "--output_dir", run]
    lines = said(capsys, "train", *config).splitlines()
    (model,) = [line for line in lines if line.startswith("model ")]
    assert (f"(an adapter (LORA) for {world / 'base'})" if kind == "adapter" else "(plain Transformers files)") in model
    commands = [shlex.split(line)[1:] for line in lines[lines.index("next") :] if line.startswith("    qtarget ")]
    wanted = ["chat", "eval", "eval", "compare", "lens", "lens", *(["merge"] if kind == "adapter" else [])]
    assert [command[0] for command in commands] == wanted
    for command in commands:
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION}\n"))
        short = ["--problems", "2", "--max_new_tokens", "4"] if command[0] == "eval" else []
        assert said(capsys, *command, *short)
    card = (run / "README.md").read_text()
    assert "None" not in card and f"`{world / 'base'}`" in card.partition("##")[0]
    assert (f"trained further from: adapter `{world / 'adapter'}`" in card) == (kind == "adapter")
    assert ("This is an adapter (LORA) for" in card) == (kind == "adapter")


def test_a_run_with_new_adapters_keeps_the_revision_of_its_base(world, tmp_path, capsys):
    config = [
        "--config",
        world / "config.yaml",
        "--model_name_or_path",
        world / "base",
        "--output_dir",
        tmp_path / "run",
    ]
    said(capsys, "train", *config, "--use_peft", "true", "--lora_r", 4, "--model_revision", "v1", "--max_steps", 1)
    settings = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert settings["revision"] == "v1" and settings["base_model_name_or_path"] == str(world / "base")


# -- verbs ---------------------------------------------------------------------------------------------------------


def test_lens_shows_what_the_adapter_says(world, tmp_path, capsys):
    config = ["--config", world / "config.yaml"]
    said(capsys, "lens", "capture", *config, "--rows", 2, "--top_k", 5, "-o", tmp_path / "capture")
    tokens = pyarrow.parquet.read_table(tmp_path / "capture" / "tokens.parquet").to_pylist()
    rows = pyarrow.parquet.read_table(tmp_path / "capture" / "rows.parquet").to_pylist()
    model, _ = by_peft(world)
    with torch.no_grad():
        for token in tokens:
            ids = torch.tensor([rows[token["row"]]["input_ids"]])
            wanted = model(ids).logits[0, token["position"] - 1].log_softmax(-1)[token["label"]]
            assert token["log_p_y"] == pytest.approx(float(wanted), abs=1e-4)
    manifest = json.loads((tmp_path / "capture" / "manifest.json").read_text())
    assert manifest["model"] == str(world / "adapter")
    said(capsys, "lens", "report", tmp_path / "capture", *config, "-o", tmp_path / "lens.html")


def test_a_cache_is_built_from_an_adapter(world, tmp_path, capsys):
    config = ["--config", world / "config.yaml", "--target", "kd", "--teacher_model_name_or_path", world / "adapter"]
    said(capsys, "cache", "build", *config, "-o", tmp_path / "cache", "--k", 8)
    teacher = CachedTeacher(tmp_path / "cache")
    assert teacher.manifest["teacher"]["name"] == str(world / "adapter") and teacher.manifest["teacher"]["weights"]
    report = said(capsys, "cache", "doctor", *config, "--cache", tmp_path / "cache")
    assert "gradient" in report
    said(capsys, "train", *config, "--teacher_cache", tmp_path / "cache", "--output_dir", tmp_path / "run")


@pytest.mark.parametrize(
    "verb, more",
    [
        (["teacher", "check"], ["--target", "kd", "--teacher_model_name_or_path", "ADAPTER", "--rows", "2"]),
        (["plan"], ["--max_length", "64"]),
        (["train"], ["--dry_run", "--target", "asft", "--reference_model_name_or_path", "ADAPTER"]),
        (["data", "oldlogps"], ["-o", "OUT"]),
        (["data", "weights"], ["-o", "OUT"]),
        (["data", "weights"], ["--fixed", "--reference_model_name_or_path", "BASE", "-o", "OUT"]),
        (["verify"], ["--rows", "2", "--target", "asft"]),
        (["verify"], ["--rows", "2", "--target", "target-sft", "--teacher_model_name_or_path", "ADAPTER"]),
    ],
    ids=lambda words: " ".join(words),
)
def test_every_verb_takes_an_adapter(verb, more, world, tmp_path, capsys):
    places = {"ADAPTER": world / "adapter", "BASE": world / "base", "OUT": tmp_path / "out"}
    words = [places.get(word, word) for word in more]
    out = said(capsys, *verb, "--config", world / "config.yaml", "--output_dir", tmp_path / "run", *words)
    if verb in (["plan"], ["train"]):
        said_of_it = " ".join(out.split())
        assert "the adapter has 512" in said_of_it  # 2 layers, rank 4, 32 inputs and 32 outputs


def test_eval_samples_from_the_adapter(world, tmp_path, capsys):
    tasks = [
        "--tasks",
        world / "sums.jsonl",
        "--verifier",
        "math",
        "--n",
        0,
        "--max_new_tokens",
        6,
        "--instruction",
        "",
    ]
    said(capsys, "eval", "--model", world / "adapter", *tasks, "-o", tmp_path / "results")
    (line,) = (tmp_path / "results" / "samples" / "sums.jsonl").read_text().splitlines()
    model, tokenizer = by_peft(world)
    wanted = answer_of(model, tokenizer, [{"role": "user", "content": "1 + 1 = ?"}], 6)
    assert wanted in json.loads(line).values()


# -- chat ----------------------------------------------------------------------------------------------------------


def test_chat_answers_greedily_turn_by_turn(world, capsys, monkeypatch):
    model, tokenizer = by_peft(world)
    turns = [{"role": "system", "content": "Count."}, {"role": "user", "content": QUESTION}]
    first = answer_of(model, tokenizer, turns, 6)
    words = ["chat", world / "adapter", "--system", "Count.", "--max_new_tokens", 6]
    assert said(capsys, *words, "--prompt", QUESTION) == f"{first}\n"
    turns += [{"role": "assistant", "content": first}, {"role": "user", "content": "And now?"}]
    second = answer_of(model, tokenizer, turns, 6)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION}\n\nAnd now?\n"))
    assert said(capsys, *words) == f"{first}\n{second}\n"


def test_chat_draws_by_seed(world, capsys):
    words = ["chat", world / "adapter", "--prompt", QUESTION, "--max_new_tokens", 8, "--temperature", 1]
    drawn = [said(capsys, *words, "--seed", seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_chat_without_a_template_goes_on_with_the_text(world, tmp_path, capsys, monkeypatch):
    tiny_models.llama().save_pretrained(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "base")
    ids = tokenizer(QUESTION, return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    out = model.generate(**ids, max_new_tokens=5, do_sample=False, eos_token_id=[0, 2], pad_token_id=0)
    wanted = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION}\n{QUESTION}\n"))
    assert said(capsys, "chat", tmp_path / "base", "--max_new_tokens", 5) == f"{wanted}\n{wanted}\n"


def test_a_long_chat_forgets_its_first_turns(world, capsys, monkeypatch):
    """The answer to the last question is that to it alone, where only it has room."""
    model, tokenizer = by_peft(world)
    wanted = answer_of(model, tokenizer, [{"role": "user", "content": QUESTION}], 1990)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{'apples ' * 14}\n{QUESTION}\n"))
    assert main(["chat", str(world / "adapter"), "--max_new_tokens", "1990"]) == 0
    out, err = capsys.readouterr()
    assert "its first turn is dropped" in err
    assert out.endswith(f"{wanted}\n")


@pytest.mark.parametrize("stops", [KeyboardInterrupt, EOFError])
def test_chat_ends_cleanly(stops, world, capsys, monkeypatch):
    def stop(mark=""):
        raise stops

    monkeypatch.setattr("builtins.input", stop)
    assert said(capsys, "chat", world / "adapter") == ""


# -- merge ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_merge_writes_a_plain_model(dtype, world, tmp_path, capsys):
    out = said(capsys, "merge", world / "adapter", "-o", tmp_path / "one", *(["--dtype", dtype] if dtype else []))
    assert f"parameters in {dtype or 'float32'}" in out
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    ids = torch.tensor([tokenizer(QUESTION)["input_ids"]])
    with torch.no_grad():
        got, wanted = plain.eval()(ids).logits.float(), by_peft(world)[0](ids).logits
    assert str(plain.dtype) == f"torch.{dtype or 'float32'}" and not (tmp_path / "one" / "adapter_config.json").exists()
    assert torch.allclose(got, wanted, atol=0.5 if dtype else 1e-5)
    assert tokenizer.chat_template == tiny_models.TEMPLATE and tokenizer.eos_token_id in [
        *torch.tensor(plain.generation_config.eos_token_id).reshape(-1).tolist()
    ]
    assert "merged into its base" in (tmp_path / "one" / "README.md").read_text()
    answers = [
        said(capsys, "chat", model, "--prompt", QUESTION, "--max_new_tokens", 4)
        for model in (tmp_path / "one", world / "adapter")
    ]
    assert dtype or answers[0] == answers[1]


def test_the_end_of_turn_of_the_adapters_tokenizer_is_the_merged_models(world, tmp_path, capsys):
    write_adapter(tmp_path / "adapter", world / "base")
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    tokenizer.eos_token = "<|im_start|>"
    tokenizer.save_pretrained(tmp_path / "adapter")
    said(capsys, "merge", tmp_path / "adapter", "-o", tmp_path / "one")
    settings = json.loads((tmp_path / "one" / "generation_config.json").read_text())
    assert tokenizer.eos_token_id in settings["eos_token_id"] and len(settings["eos_token_id"]) == 2


def test_a_prompt_answers_in_chat_and_eval(world, tmp_path, capsys):
    write_adapter(tmp_path / "prompt", world / "base", PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    model, tokenizer = by_peft(world, str(tmp_path / "prompt"))
    wanted = answer_of(model, tokenizer, [{"role": "user", "content": QUESTION}], 6)
    assert said(capsys, "chat", tmp_path / "prompt", "--prompt", QUESTION, "--max_new_tokens", 6) == f"{wanted}\n"
