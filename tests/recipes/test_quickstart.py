"""The recipe of the README on a real model and real problems: minutes, so only in `make test-full`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]


pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory) -> Path:
    """The recipe, prepared in a folder of its own and run for a few steps."""
    root = tmp_path_factory.mktemp("quickstart")
    model = root / "SmolLM2-135M-Instruct"
    train = ["-m", "qtarget", "train", "--config", ROOT / "recipes" / "quickstart.yaml", "--max_steps", "4"]
    train += ["--output_dir", root / "run", "--dataset_name", root / "data"]
    train += ["--model_name_or_path", model, "--teacher_model_name_or_path", model]
    for command in (
        [sys.executable, ROOT / "recipes" / "prepare_quickstart.py", "--out", root],
        [sys.executable, *train],
    ):
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
        (root / "said.txt").write_text(done.stdout)
    return root


def test_held_out_likelihood_improves(quickstart):
    figures = json.loads((quickstart / "run" / "before_after.json").read_text())
    assert figures["after"]["nll"] < figures["before"]["nll"] - 0.01
    assert figures["after"]["accuracy"] > figures["before"]["accuracy"]


def test_teacher_and_student_start_equal_and_part(quickstart):
    figures = json.loads((quickstart / "run" / "before_after.json").read_text())
    assert abs(figures["before"]["teacher_kl"]) < 1e-6
    assert figures["after"]["teacher_kl"] > 0.01
    assert "the first step was dft by construction" in (quickstart / "said.txt").read_text()


def test_the_saved_model_is_plain_and_answers(quickstart):
    model = AutoModelForCausalLM.from_pretrained(quickstart / "run")
    tokenizer = AutoTokenizer.from_pretrained(quickstart / "run")
    start = AutoModelForCausalLM.from_pretrained(quickstart / "SmolLM2-135M-Instruct")
    assert not torch.equal(model.get_output_embeddings().weight, start.get_output_embeddings().weight)
    asked = [{"role": "user", "content": "Tom has 3 apples and buys 4 more. How many apples has he now?"}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert any(letter.isdigit() for letter in tokenizer.decode(answer))


def test_the_engine_equals_full_logits_on_a_real_head(quickstart):
    """dH and dW of target-sft on SmolLM2's own hidden states and 49152 tokens, against the oracle in float64."""
    import qtarget as qt

    model = AutoModelForCausalLM.from_pretrained(quickstart / "run")
    teacher = AutoModelForCausalLM.from_pretrained(quickstart / "SmolLM2-135M-Instruct")
    tokenizer = AutoTokenizer.from_pretrained(quickstart / "run")
    row = json.loads((quickstart / "data" / "test.jsonl").read_text().splitlines()[0])
    text = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :48]
    with torch.no_grad():
        hidden, other = (m.base_model(ids).last_hidden_state[0, :-1] for m in (model, teacher))
    weight, other_weight = (
        model.get_output_embeddings().weight.detach(),
        teacher.get_output_embeddings().weight.detach(),
    )
    target = qt.preset("target-sft")
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    qt.linear_target_loss(h, w, ids[0, 1:], target, teacher=qt.Head(other, other_weight)).loss.backward()
    H, W = hidden.double().requires_grad_(), weight.double().requires_grad_()
    teacher_logits = other.double() @ other_weight.double().T
    qt.target_loss(H @ W.T, ids[0, 1:], target, teacher_logits=teacher_logits).loss.backward()
    for got, truth in ((h.grad, H.grad), (w.grad, W.grad)):
        assert float((got.double() - truth).norm() / truth.norm()) < 1e-5
