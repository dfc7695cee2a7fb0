"""The settings that most runs change, for a --help that answers without importing TRL.

qtarget's own are read from the source of ``QTargetConfig``, whose docstring describes them; of TRL's and Transformers'
many, those below are shown. A test holds their names and defaults against the real configs.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import qtarget
from qtarget import docstrings
from qtarget.cli.arguments import entry

if TYPE_CHECKING:
    from qtarget.cli.setup import Run

# group → [(field, default, what it is)]
THEIRS: dict[str, list[tuple[str, Any, str]]] = {
    "model": [
        ("model_name_or_path", None, "the model to train: a folder or hub id"),
        ("model_revision", "main", "branch, tag or commit of the model"),
        ("dtype", "float32", "precision of the weights"),
        ("attn_implementation", None, "such as flash_attention_2"),
        ("use_peft", False, "train LoRA adapters instead of all weights"),
        ("lora_r", 16, "rank of the adapters"),
        ("lora_alpha", 32, "scale of the adapters"),
        ("lora_dropout", 0.05, "dropout of the adapters"),
        ("lora_target_modules", None, "modules that get adapters"),
    ],
    "data": [
        ("dataset_name", None, "a folder of json, csv or parquet files, one such file, or a hub id"),
        ("dataset_config", None, "configuration of the dataset"),
        ("dataset_train_split", "train", "rows to train on"),
        ("dataset_test_split", "test", "rows to evaluate before and after; a missing split is skipped"),
        ("dataset_streaming", False, "stream the dataset instead of loading it whole"),
        ("max_length", 1024, "longest sequence in tokens; longer rows are cut"),
        ("packing", False, "several rows in one sequence"),
        ("completion_only_loss", None, "train the completion only; unset: yes for prompt and completion rows"),
        ("assistant_only_loss", False, "train the assistant's turns only"),
        ("chat_template_path", None, "a chat template to use instead of the tokenizer's own"),
    ],
    "training": [
        ("output_dir", None, "folder of the trained model"),
        ("learning_rate", 2e-5, "peak learning rate"),
        ("lr_scheduler_type", "linear", "shape of the learning rate over time"),
        ("warmup_steps", 0, "steps to the peak; below 1: a share of all steps"),
        ("num_train_epochs", 3.0, "passes over the data"),
        ("max_steps", -1, "optimiser steps; above 0 it overrides epochs"),
        ("per_device_train_batch_size", 8, "rows per device and forward pass"),
        ("gradient_accumulation_steps", 1, "forward passes per optimiser step"),
        ("max_grad_norm", 1.0, "gradient clipping; 0 turns it off"),
        ("weight_decay", 0.0, "AdamW's weight decay"),
        ("gradient_checkpointing", True, "recompute activations to save memory"),
        ("bf16", None, "bfloat16 autocast; unset: where the device has it"),
        ("seed", 42, "seed of the row order and of everything random"),
    ],
    "watching and saving": [
        ("logging_steps", 10, "steps between two log lines"),
        ("eval_strategy", "no", "evaluate during training: no, steps, epoch"),
        ("eval_steps", None, "steps between two evaluations"),
        ("per_device_eval_batch_size", 8, "rows per device in evaluation"),
        ("save_strategy", "steps", "checkpoints: no, steps, epoch, best"),
        ("save_steps", 500, "steps between two checkpoints"),
        ("save_total_limit", None, "checkpoints kept"),
        ("resume_from_checkpoint", None, "a checkpoint folder, or true for the latest"),
        ("report_to", "none", "tracker: wandb, tensorboard, trackio, mlflow, ..."),
        ("run_name", None, "name of the run in the tracker"),
        ("push_to_hub", False, "upload the model"),
    ],
}


@functools.cache
def own() -> list[tuple[str, Any, str]]:
    """(name, default, description) of qtarget's own settings."""
    return docstrings.settings(Path(qtarget.__file__).parent / "training" / "config.py", "QTargetConfig")


def names() -> list[str]:
    """The settings that the help shows, in its order."""
    return [name for rows in (own(), *THEIRS.values()) for name, _, _ in rows]


def common() -> str:
    """The settings most runs touch, as lines of a help; of a description its first sentence."""
    first = [(name, default, re.split(r"\.(?: |$)", text)[0].replace("``", "")) for name, default, text in own()]
    tail = "every setting: qtarget train --help_all      the targets: qtarget targets"
    return f"{_lines({'target': first, **THEIRS})}\n\n{tail}"


def every() -> str:
    """All settings, from the real configs."""
    from qtarget.cli.settings import groups

    grouped: dict[str, list] = {}
    for group, config in groups().items():
        rows = grouped[f"{group} ({config.__name__})"] = []
        for field in dataclasses.fields(config):
            if field.init:
                text = " ".join(str(field.metadata.get("help", "")).replace("%%", "%").replace("``", "").split())
                rows.append((field.name, None if field.default is dataclasses.MISSING else field.default, text))
    return _lines(grouped)


def _lines(grouped: dict[str, list[tuple[str, Any, str]]]) -> str:
    lines = []
    for group, rows in grouped.items():
        lines += ["", f"{group}:"]
        for name, default, text in rows:
            lines += entry(f"--{name}", text if default is None else f"{text} ({shown(default)})")
    return "\n".join(lines[1:])


def shown(value: Any) -> str:
    """A setting's value as it is written."""
    return str(getattr(value, "value", value))


def show_run(run: Run, every: bool) -> None:
    """Print the settings of a run by where they come from: those that differ from their defaults, or all."""
    from qtarget.cli.settings import groups

    configs = zip(groups().values(), (run.config, run.model, run.script), strict=True)
    known = {f.name: (f.default, holder) for cls, holder in configs for f in dataclasses.fields(cls) if f.init}
    placed = {"from the config file": run.settings.given_by("file"), "from flags": run.settings.given_by("flag")}
    if every:
        others = [name for name in known if name not in run.settings.origin]
        placed["defaults"] = {name: getattr(known[name][1], name) for name in others}
    print("settings" if every else "settings that differ from their defaults (--show_settings all shows every one)")
    for place, values in placed.items():
        chosen = [name for name, value in values.items() if every or name not in known or value != known[name][0]]
        for line in [f"  {place}"] * bool(chosen) + [f"    {name:<28}  {shown(values[name])}" for name in chosen]:
            print(line)
    for note in run.notes:
        print(f"note: {note}")
    print()
