"""Runs the scripts of ``examples/trainers`` as they stand, and trains the same rows in the same order by ours."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

import tiny_models
from qtarget import QTargetTrainer
from quick_runs import Weights, copied_weights, quick_trainer, weight_change

SCRIPTS = Path(__file__).parents[2] / "examples" / "trainers"
LEARNING_RATE = 1e-2  # in place of the scripts' 1e-5, with which three steps are lost in float32's rounding


def write_inputs(folder: Path, rows: int) -> None:
    """A small model and a file of rows."""
    tiny_models.save_trained(folder / "model")
    tiny_models.conversation_dataset(rows).to_json(folder / "rows.jsonl")


def prepare_script(name: str, folder: Path, target: str = '"dft"') -> list[str]:
    """Write a script there with its learning rate and target replaced; returns the words of its command line."""
    text = (SCRIPTS / name).read_text(encoding="utf-8")
    for there, here in (("1e-5", str(LEARNING_RATE)), ('"dft"', target)):
        assert text.count(there) == 1, there
        text = text.replace(there, here)
    (folder / name).write_text(text, encoding="utf-8")
    return [str(folder / each) for each in (name, "model", "rows.jsonl", "trained")]


def run_script(name: str, folder: Path, target: str = '"dft"') -> dict[str, Any]:
    """Run it in this process; returns its variables."""
    before, sys.argv = sys.argv, prepare_script(name, folder, target)
    try:
        return runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        sys.argv = before


def change_by_script(folder: Path) -> Weights:
    """By how much the script that ran there moved the weights, as it saved them."""
    before = copied_weights(AutoModelForCausalLM.from_pretrained(folder / "model"))
    return weight_change(before, AutoModelForCausalLM.from_pretrained(folder / "trained"))


def rows_in_order(rows: int) -> Dataset:
    """The rows as the scripts' loaders draw them."""
    drawn = DataLoader(range(rows), batch_size=None, shuffle=True, generator=torch.Generator().manual_seed(0))
    return tiny_models.conversation_dataset(rows).select(list(drawn))


def by_our_trainer(folder: Path, data: Dataset, **settings: Any) -> tuple[QTargetTrainer, Weights]:
    """The same by ``QTargetTrainer``, and how far it moved the weights."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    before = copied_weights(model)
    settings = dict(max_steps=3, learning_rate=LEARNING_RATE, optim="adamw_torch", max_grad_norm=1.0) | settings
    trainer = quick_trainer(model, folder / "ours", data, **settings)
    trainer.train()
    return trainer, weight_change(before, model)
