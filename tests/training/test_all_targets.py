"""Each of the named targets from raw rows, a model and, where named, a teacher: the command line from end to end.

What a target needs besides is made by the project's own verbs: iw-sft's reference, cft's critical tokens, psft's old
policy. In one process each; one of them, and all in the long tests, as commands of their own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny_models
from qtarget.cli.__main__ import main
from qtarget.targets import presets

STEPS = 20
# What each needs beyond a model and rows: a dataset of a verb, or settings.
MADE_BY = {"iw-sft": "weights", "cft": "critical", "psft": "oldlogps"}
SETTINGS: dict[str, list[str]] = {
    "iw-sft": ["--weights", "online"],
    "psft": ["--psft_refresh", "never"],
    "kd-hybrid": ["--teacher_model_name_or_path", "teacher"],
}
AS_COMMANDS = ["target-sft"]
# Another formula on the same number: one run of verify trains them all, and the long tests each from raw rows.
ALIKE = {name for name in presets.names() if presets.build(name).needs <= {"log_p_y", "rest_mass"}} - {"sft", "profit"}
ALIKE -= {name for name in ALIKE if presets.build(name).residual_terms}


def taught(rows: list[dict], steps: int, seed: int, width: int) -> torch.nn.Module:
    model, tokenizer = tiny_models.llama(seed, width=width), tiny_models.tokenizer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    lines = [tokenizer.apply_chat_template(row["prompt"] + row["completion"])["input_ids"] for row in rows]
    prompts = [tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"] for row in rows]
    longest = max(map(len, lines))
    ids = torch.tensor([line + [0] * (longest - len(line)) for line in lines])
    mask = torch.tensor([[1] * len(line) + [0] * (longest - len(line)) for line in lines])
    place = torch.arange(longest)
    begin = torch.tensor([len(prompt) for prompt in prompts])[:, None]
    labels = ids.masked_fill((place < begin) | (mask == 0), -100)
    for _ in range(steps):
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A model that can partly do sums, a teacher that does them better, raw rows, and what the verbs made of them."""
    root = tmp_path_factory.mktemp("targets")
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{a}+{b}="}],
            "completion": [{"role": "assistant", "content": f"It is {a + b}"}],
            "answer": str(a + b),
        }
        for a in range(1, 5)
        for b in range(1, 4)
    ]
    for name, steps, seed, width in (("model", 30, 0, 32), ("teacher", 90, 3, 48)):
        taught(rows, steps, seed, width).save_pretrained(root / name)
        tiny_models.tokenizer().save_pretrained(root / name)
    (root / "raw").mkdir()
    (root / "raw" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "config.yaml").write_text(
        f"model_name_or_path: {root}/model\ndataset_name: {root}/raw\nmax_steps: {STEPS}\nlearning_rate: 1.0e-3\n"
        "lr_scheduler_type: constant\nper_device_train_batch_size: 6\nlogging_steps: 1\nreport_to: none\n"
        "save_strategy: 'no'\nuse_cpu: true\ngradient_checkpointing: false\nmax_length: 64\ndisable_tqdm: true\n"
        f"output_dir: {root}/unused\n"
    )
    config = ["--config", str(root / "config.yaml")]
    for verb, more in {
        "weights": [],
        "oldlogps": [],
        "critical": ["--verifier", "signal_verifiers:last_number", "--max_new_tokens", "8"],
    }.items():
        assert main(["data", verb, *config, "-o", str(root / verb), *more]) == 0
    words = ["--k", "32", "--teacher_model_name_or_path", str(root / "teacher")]
    assert main(["cache", "build", *config, "-o", str(root / "cache"), *words]) == 0
    return root


def command(world: Path, name: str, folder: Path) -> list[str]:
    data = world / MADE_BY.get(name, "raw")
    cached = ["--teacher_cache", "cache"] if "teacher" in presets.build(name).requires else []
    settings = [str(world / word) if word in ("cache", "teacher") else word for word in SETTINGS.get(name, cached)]
    words = ["train", "--config", str(world / "config.yaml"), "--dataset_name", str(data), "--target", name]
    return [*words, "--output_dir", str(folder), *settings]


def check(world: Path, name: str, folder: Path) -> None:
    """Twenty steps were trained toward this target, each finite, and the label became likelier."""
    target = json.loads((folder / "target.json").read_text())
    assert (target["preset"] if isinstance(target, dict) else target) == name
    state = json.loads((folder / "trainer_state.json").read_text())
    lines = [line for line in state["log_history"] if "nll" in line]
    assert len(lines) == STEPS == state["global_step"]
    assert all(abs(line["loss"]) < 1e4 and line["nll"] < 1e4 for line in lines), "a NaN compares as false"
    first, last = (sum(line["nll"] for line in part) / 4 for part in (lines[:4], lines[-4:]))
    assert last < first, f"nll went from {first} to {last}"
    if name == "cft":  # trained on fewer tokens than there are
        assert 0 < lines[0]["trust"] < 1
    if "teacher" in presets.build(name).requires:
        assert lines[0]["residual_mass"] > 0.02
    before = AutoModelForCausalLM.from_pretrained(world / "model").state_dict()
    after = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert any(not torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full) if name in ALIKE else name for name in presets.names()]
)
def test_from_raw_rows(name, world, tmp_path):
    assert main(command(world, name, tmp_path / "run")) == 0
    check(world, name, tmp_path / "run")


@pytest.mark.parametrize(
    "name",
    [name if name in AS_COMMANDS else pytest.param(name, marks=pytest.mark.full) for name in presets.names()],
)
def test_as_a_command(name, world, tmp_path):
    words = [sys.executable, "-m", "qtarget", *command(world, name, tmp_path / "run")]
    ran = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    check(world, name, tmp_path / "run")
