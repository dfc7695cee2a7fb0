"""qtarget verify: it passes what is right, and each deliberate fault is caught by the checks that should catch it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import qtarget as qt
import tiny
from qtarget.cli.__main__ import main
from qtarget.data import preparation
from qtarget.data.columns import TokenColumnCollator
from qtarget.losses import heads
from qtarget.losses.backends import torch_chunked
from qtarget.targets import presets
from qtarget.training import QTargetTrainer, denominator, forward
from qtarget.training import other_models as other_models_module
from qtarget.training import trainer as trainer_module
from qtarget.verification import formulas, report

HERE = Path(__file__).parent
NAMES = [check.name for check in report.CHECKS]
P_Q, FORMULA, STEP, MICRO, PADDING, FREE, PACKING, CHUNKS, WORLD = NAMES[:9]
IN_PLACE, PROMPT, ANSWER, END, TEACHER, REFERENCE, NEIGHBOURS, BF16, MEMORY = NAMES[9:]
TARGET_SFT = {"target": {"preset": "target-sft", "eta": 0.5}}
ALL_ROWS = {"target": "dft"}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A student whose head has padded rows, a teacher, rows of several shapes and a cache of 8 tokens."""
    root = tmp_path_factory.mktemp("verify")
    models = {"model": tiny.taught(vocab=len(tiny.tokenizer()) + 13), "teacher": tiny.taught(seed=7, width=48, tied=False)}
    for name, model in models.items():
        model.save_pretrained(root / name)
        tiny.tokenizer().save_pretrained(root / name)
    tiny.tokenizer().save_pretrained(root / "marked")
    (root / "marked" / "chat_template.jinja").write_text(tiny.MARKED_TEMPLATE)
    chats = tiny.conversations(6).to_list()
    many: dict[str, Iterable[dict]] = {
        "chats": chats,
        "texts": tiny.texts(6),
        "turns": tiny.turns(6),
        "prompts": tiny.prompts(6),
        "weights": [{**row, "weight": 0.3 + number % 3} for number, row in enumerate(chats)],
        "sources": [{**row, "source": ("math", "chat")[number % 2]} for number, row in enumerate(chats)],
    }
    ids = [tiny.tokenizer()(text)["input_ids"][:24] for text in tiny.SENTENCES[:6]]
    critical = [[(place + number) % 3 == 0 for place in range(len(row))] for number, row in enumerate(ids)]
    many["critical"] = [
        {"input_ids": row, "labels": row, "critical": mask} for row, mask in zip(ids, critical, strict=True)
    ]
    for name, rows in many.items():
        (root / name).mkdir()
        (root / name / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "model_name_or_path": str(root / "model"),
        "dataset_name": str(root / "chats"),
        "max_length": 128,
        "use_cpu": True,
    }
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    return root


def verify(world: Path, capsys, **settings: Any) -> tuple[int, dict[str, Any]]:
    """(exit status, the JSON) of the command in this process."""
    words = [word for name, value in settings.items() for word in (f"--{name}", _flag(value))]
    capsys.readouterr()
    status = main(["verify", "--config", str(world / "config.yaml"), "--json", "-", *words])
    out = capsys.readouterr()
    return status, json.loads(out.out) if status != 2 else {"error": out.err}


def _flag(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (dict, bool)) else str(value)


def statuses(made: dict[str, Any]) -> dict[str, str]:
    return {check["name"]: check["status"] for check in made["checks"]}


def failed(made: dict[str, Any]) -> set[str]:
    return {name for name, status in statuses(made).items() if status == "fail"}


def taught_by(world: Path) -> dict[str, str]:
    return {"teacher_model_name_or_path": str(world / "teacher")}


# -- what is right passes ------------------------------------------------------------------------------------------

RIGHT: dict[str, Callable[[Path], dict[str, Any]]] = {
    "target-sft": lambda w: TARGET_SFT | taught_by(w),
    "kd at T = 2": lambda w: {"target": {"preset": "kd", "temperature": 2.0}} | taught_by(w),
    "sft on texts": lambda w: {"target": "sft", "dataset_name": w / "texts"},
    "dft on plain prompts": lambda w: {"target": "dft", "dataset_name": w / "prompts"},
    "sft-kl": lambda w: {"target": "sft-kl"},
    "psft": lambda w: {"target": "psft"},
    "iw-sft, online": lambda w: {"target": "iw-sft", "weights": "online"},
    "iw-sft, a column": lambda w: {"target": "iw-sft", "dataset_name": w / "weights"},
    "cft, kept": lambda w: {"target": "cft", "dataset_name": w / "critical", "denominator": "kept"},
    "its own average": lambda w: TARGET_SFT | {"teacher_ema_decay": 0.9},
    "a context": lambda w: TARGET_SFT | taught_by(w) | {"teacher_context": "Think. {{ prompt }}"},
    "a pool": lambda w: TARGET_SFT | {"teachers": {str(w / "teacher"): 0.7, str(w / "model"): 0.3}},
    "by source": lambda w: {
        "targets": {"math": {"preset": "target-sft", "eta": 0.5}, "chat": "gem"},
        "dataset_name": w / "sources",
    }
    | taught_by(w),
    "a schedule": lambda w: {
        "target": {"preset": "target-sft", "eta": {"schedule": "linear", "from": 0, "to": 1, "steps": 10}},
        "max_steps": 10,
    }
    | taught_by(w),
    "lora": lambda w: {"target": "dft", "use_peft": True, "lora_target_modules": "all-linear"},
    "composed": lambda w: {"target": {"trust": "probability", "residual": {"uniform": {}}}},
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_passes(name, world, capsys):
    status, made = verify(world, capsys, **RIGHT[name](world))
    assert status == 0, made.get("error") or [c for c in made["checks"] if c["status"] == "fail"]
    assert made["passed"] and not failed(made)
