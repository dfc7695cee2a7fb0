"""What the trials of other people's trainers share: a small model, rows, the comparison and the record.

Each trial runs in an environment of its host's own, on a CPU: with the host's own loss, and with a target in its place.
Both must give the same loss and gradient norm in each step. ``hosts.json`` holds both, and the versions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import qtarget as qt
import tiny_models

RESULTS = Path(__file__).resolve().parents[1] / "results" / "hosts.json"
STEPS = 3
PAIRS = [(f"Tom has {i}", f"A box holds {i + 9}") for i in range(24)]  # questions and answers
TRAINING = {  # what a host's run has in common, by Transformers' names
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": STEPS,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "seed": 1,
}
Steps = list[dict[str, float]]


def make_model(folder: Path) -> str:
    """Write a small trained Llama and its tokenizer into ``folder``/model; returns where."""
    return str(tiny_models.save_trained(folder / "model"))


def steps_of(history: Iterable[Mapping[str, Any]]) -> Steps:
    """Loss and gradient norm of each step, from a Transformers trainer's ``log_history``."""
    return [{key: float(line[key]) for key in ("loss", "grad_norm")} for line in history if "grad_norm" in line]


def largest(ours: Steps, own: Steps) -> float:
    """The largest relative difference of a step's loss or gradient norm."""
    pairs = [(a[key], b[key]) for a, b in zip(ours, own, strict=True) for key in a]
    return max(abs(a - b) / abs(b) for a, b in pairs)


def stopped(run: Callable[[], object]) -> str | None:
    """What qtarget says where it stops a run; None: it did not."""
    try:
        run()
    except qt.ConfigError as error:
        return str(error)
    return None


def record(host: str, packages: Iterable[str], steps: Mapping[str, Mapping[str, Steps]], **more: object) -> None:
    """Write a host's part of ``hosts.json``; the other hosts' parts stay.

    Args:
        steps: for each target the steps with it ("ours"), and those that they must equal, under their owner's name.
        more: entries of the host's own.
    """
    content = {
        "versions": {name: version(name) for name in packages},
        "steps": steps,
        "largest relative difference": {
            name: largest(runs["ours"], other)
            for name, runs in steps.items()
            for whose, other in runs.items()
            if whose != "ours"
        },
        **{name.replace("_", " "): value for name, value in more.items()},
    }
    there = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps({**there, host: content}, indent=1) + "\n")
    print(host, json.dumps(content["largest relative difference"]))
