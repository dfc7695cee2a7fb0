"""LLaMA-Factory's own SFT run with ``qt.TargetCallback``, beside its own losses; writes benchmarks/results/hosts.json.

It runs in an environment of LLaMA-Factory's own, on a CPU, with a model made here:

    python -m venv build/llama-factory
    build/llama-factory/bin/pip install torch==2.13.0 transformers==5.6.0 trl==0.24.0 peft==0.18.1 accelerate==1.11.0 \
        datasets==4.0.0 torchdata==0.11.0 "tyro<0.9" sentencepiece einops omegaconf fire scipy matplotlib protobuf \
        hf-transfer modelscope
    build/llama-factory/bin/pip install --no-deps llamafactory==0.9.5
    PYTHONPATH=src:tests/helpers build/llama-factory/bin/python benchmarks/hosts/llama_factory.py

It has a dft of its own (use_dft_loss), so that each step's loss and gradient norm can be held against ours.
"""

from __future__ import annotations

import importlib.machinery
import json
import os
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

from common import LEARNING_RATE, PAIRS, STEPS, Steps, make_model, record, steps_of, stopped

import qtarget as qt

PACKAGES = ("llamafactory", "torch", "transformers", "trl", "peft", "accelerate", "datasets")
SETTINGS = {
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "full",
    "dataset": "rows",
    "template": "default",
    "cutoff_len": 64,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": STEPS,
    "learning_rate": LEARNING_RATE,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "overwrite_output_dir": True,
    "seed": 1,
}


def host() -> Any:
    """LLaMA-Factory's ``run_exp``."""
    os.environ["DISABLE_VERSION_CHECK"] = "1"  # it asks for older packages than it runs with
    audio = types.ModuleType("torchaudio")  # imported there, and used for audio alone
    audio.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    sys.modules.setdefault("torchaudio", audio)
    from llamafactory.train.tuner import run_exp

    return run_exp


def write_rows(folder: Path) -> None:
    rows = [{"instruction": question, "input": "", "output": answer} for question, answer in PAIRS]
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))


def run(folder: Path, name: str, *callbacks: Any, **more: Any) -> Steps:
    where = {"model_name_or_path": str(folder / "model"), "dataset_dir": str(folder), "output_dir": str(folder / name)}
    host()(SETTINGS | where | more, callbacks=list(callbacks))
    return steps_of(json.loads((folder / name / "trainer_state.json").read_text())["log_history"])


def main() -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        make_model(folder)
        write_rows(folder)
        steps = {
            "dft": {"own": run(folder, "own", use_dft_loss=True), "ours": run(folder, "dft", qt.TargetCallback("dft"))},
            "sft": {"own": run(folder, "plain"), "ours": run(folder, "sft", qt.TargetCallback("sft"))},
        }
        refused = stopped(lambda: run(folder, "both", qt.TargetCallback("dft"), use_dft_loss=True))
    record("LLaMA-Factory", PACKAGES, steps, its_own_loss_beside_a_target=refused)


if __name__ == "__main__":
    main()
