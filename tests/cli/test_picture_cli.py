"""The picture of what is trained as users see it: the dry run, training, plan, the lens and verify."""

from __future__ import annotations

import copy
import json
import re
import textwrap
from pathlib import Path

import pytest
import yaml
from datasets import Dataset

import tiny_models
from qtarget import QTargetConfig, QTargetTrainer
from qtarget.cli import picture
from qtarget.cli.__main__ import main

DOCS = Path(__file__).parents[2] / "docs" / "training.md"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A model, conversations of which some are cut, and a config."""
    root = tmp_path_factory.mktemp("picture")
    tiny_models.llama().save_pretrained(root / "model")
    tiny_models.tokenizer().save_pretrained(root / "model")
    tiny_models.message_dataset(300).to_json(root / "data" / "train.jsonl")
    settings = {
        "model_name_or_path": str(root / "model"),
        "dataset_name": str(root / "data"),
        "target": "dft",
        "max_length": 60,
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "output_dir": str(root / "run"),
    }
    (root / "config.yaml").write_text(yaml.safe_dump(settings))
    return root


@pytest.fixture
def said(root, capfd):
    """What a verb prints: (status, output with its spaces made one, errors)."""

    def run(verb: str, *words: object) -> tuple[int, str, str]:
        status = main([*verb.split(), "--config", str(root / "config.yaml"), *map(str, words)])
        out, err = capfd.readouterr()
        return status, " ".join(out.split()), err

    return run


def test_the_dry_run_reads_the_first_rows_and_writes_nothing(root, said):
    before = sorted(root.rglob("*"))
    status, out, err = said("train", "--dry_run", "--gpus", 1)
    assert (status, err) == (0, "")
    assert "300 rows with messages" in out and "rows read the first 256, prepared as training prepares them" in out
    assert re.search(r"trained [\d,]+ of [\d,]+ tokens, 98.0%, in 256 rows by role system [\d,]+ of [\d,]+, user", out)
    assert "whole conversations are trained; assistant_only_loss: true trains only the assistant's turns" in out
    assert "ends with <|im_end|> in 128 of 128 rows; generation stops at it" in out
    assert "128 of 256 rows are cut at max_length (trained tokens lost: 2,516, ends of a row lost: 128)" in out
    assert "<|im_start|>«system Count.<|im_end|>" in out and out.endswith("no contradictions found")
    assert sorted(root.rglob("*")) == before


def test_a_run_on_many_gpus_is_checked_on_none(said, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")  # Transformers sets it, and nobody takes it back
    status, out, err = said("train", "--dry_run", "--fsdp", "full_shard")
    assert status == 0, err
    assert "rows read the first 256" in out


def test_a_precision_of_gpus_is_checked_on_none(said):
    words = ["--use_cpu", "false", "--bf16", "true", "--tf32", "true"]
    for verb, flags, told in (("train", ["--dry_run"], "rows read"), ("plan", ["--gpus", 8], "mean of 300 rows")):
        status, out, err = said(verb, *flags, *words)
        assert status == 0, err
        assert "FSDP2" in out and told in out


@pytest.mark.parametrize("number", [0, 2])
def test_as_many_rows_as_asked_for(number, said):
    assert len(re.findall(r"row \d+, \d+ tokens", said("train", "--dry_run", "--show_rows", number)[1])) == number


def test_a_stream_is_read_as_a_stream(said):
    status, out, err = said("train", "--dry_run", "--gpus", 1, "--dataset_streaming", "true")
    assert status == 0, err
    assert "the first rows of a stream: " in out and "in 256 rows" in out
    assert "128 of 256 rows are cut at max_length" in out


def test_training_shows_it_once_before_its_first_step(said, tmp_path):
    status, out, err = said("train", "--output_dir", tmp_path / "run")
    assert status == 0, err
    assert out.index("by role system") < out.index("target dft: L = ")
    assert "150 of 300 rows are cut at max_length" in out and "are cut" not in err
    assert out.count("whole conversations") == 1


def test_another_process_says_nothing(said, tmp_path, monkeypatch):
    monkeypatch.setattr("qtarget.cli.terminal.is_main", lambda: False)
    assert "by role" not in said("train", "--output_dir", tmp_path / "run")[1]


def test_the_lens_verify_and_plan_show_it(said, tmp_path):
    status, out, err = said("lens capture", "--rows", 3, "--top_k", 2, "-o", tmp_path / "capture")
    assert status == 0, err
    assert "trained 141 of 144 tokens, 97.9%, in 3 rows by role system 15 of 16" in out
    status, out, err = said("verify", "--rows", 2, "--show_rows", 0)
    assert status == 0, err
    assert "trained 92 of 94 tokens, 97.9%, in 2 rows by role" in out and "row 0" not in out
    status, out, err = said("plan", "--gpus", 1)
    assert status == 0, err
    assert "warning 128 of 256 rows are cut at max_length" in out


def test_a_tokenizer_that_is_not_here_is_said(root, said, hub_configs):
    status, out, err = said("train", "--dry_run", "--model_name_or_path", "Qwen/Qwen2.5-7B")
    assert (status, err) == (0, "")
    assert "what the rows train and what max_length cuts: the tokenizer of Qwen/Qwen2.5-7B is not here" in out


def test_a_teacher_that_is_not_here_leaves_the_rows_to_be_read(said, hub_configs):
    words = ["--target", "kd", "--teacher_model_name_or_path", "Qwen/Qwen2.5-7B"]
    status, out, err = said("train", "--dry_run", *words)
    assert (status, err) == (0, "")
    assert "rows read the first 256" in out and "whether student and teacher have the same tokens" in out


def test_a_template_with_tokens_of_its_own_is_taken_over_without_weights(said, tmp_path):
    other = copy.deepcopy(tiny_models.tokenizer())
    other.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    other.chat_template = other.chat_template.replace("<|im_start|>", "<|turn|>")
    other.save_pretrained(tmp_path / "template")
    status, out, err = said("train", "--dry_run", "--chat_template_path", tmp_path / "template")
    assert status == 0, err
    assert "<|turn|>«system Count.<|im_end|>" in out


def test_a_terminal_has_colours_in_place_of_marks(said, monkeypatch):
    monkeypatch.setattr("rich.console.Console._environ", {"FORCE_COLOR": "1", "TERM": "xterm-256color"})
    out = said("train", "--dry_run")[1]
    assert "\x1b[32m" in out and "trained in green" in out and "«" not in out


def test_a_row_is_shown_by_its_beginning_and_end_and_obeyed_by_no_terminal(tmp_path, capsys):
    long = "\x1b[2J" + " ".join(tiny_models.SENTENCES * 12)
    config = QTargetConfig(str(tmp_path), max_length=None, use_cpu=True, report_to="none")
    rows = Dataset.from_list([{"text": long}])
    own = tiny_models.tokenizer()
    trainer = QTargetTrainer(tiny_models.llama(), config, train_dataset=rows, processing_class=own)
    picture.show(trainer.picture(), 1)
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\\u{1b}" in out
    shown = out[out.index("«") :]
    assert f"[... {len(long) + len('<|im_end|>') - 2000:,} characters ...]" in shown
    assert "2 slices each.<|im_end|>»" in shown


# -- the page ----------------------------------------------------------------------------------------------------

ROWS = [
    ("Be brief.", "What is 12 times 11?", "It is 132.", "And half of that?", "66."),
    ("Be brief.", "How many legs have three cats?", "12."),
]


def test_the_page_shows_a_real_picture(tmp_path, capsys):
    """docs/training.md, word for word."""
    roles = ["system", "user", "assistant", "user", "assistant"]
    rows = [{"messages": [{"role": r, "content": c} for r, c in zip(roles, row, strict=False)]} for row in ROWS]
    config = QTargetConfig(str(tmp_path), max_length=90, use_cpu=True, report_to="none")
    own = tiny_models.tokenizer()
    trainer = QTargetTrainer(tiny_models.llama(), config, train_dataset=Dataset.from_list(rows), processing_class=own)
    capsys.readouterr()
    picture.show(trainer.picture(), 1)
    printed = textwrap.indent(capsys.readouterr().out.rstrip(), "  ")
    assert printed in DOCS.read_text(encoding="utf-8"), printed


def test_a_users_rule_that_fails_is_one_sentence(root, said, tmp_path, monkeypatch):
    """Before a model is loaded and in the dry run: a name that is not there, a statistic not declared, a wrong
    shape.
    """
    code = """
        import torch
        def misspelt(stats): return stats.log_p_y.exq()
        def unknown(stats): return nothing
        def undeclared(stats): return stats.entropy
        def a_number(stats): return 0.5
        def too_many(stats): return torch.ones(7)
    """
    (tmp_path / "five_rules.py").write_text(textwrap.dedent(code))
    monkeypatch.syspath_prepend(tmp_path)
    for name, part in [
        ("misspelt", "failed with AttributeError: 'Tensor' object has no attribute 'exq'"),
        ("unknown", "failed with NameError: name 'nothing' is not defined"),
        ("undeclared", "add 'entropy' to the rule's needs"),
        ("a_number", "the trust rule gave 0.5; return one number per token"),
        ("too_many", "the trust rule gave a tensor of shape [7]"),
    ]:
        target = json.dumps({"trust": f"five_rules:{name}"})
        for dry in (["--dry_run"], ["--output_dir", tmp_path / "run"]):
            status, _, err = said("train", "--target", target, *dry)
            assert (status, len(err.splitlines())) == (2, 1), err
            assert f"trust five_rules:{name}, tried on two tokens" in err and part in err
    assert not (tmp_path / "run").exists()
