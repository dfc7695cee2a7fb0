"""LLaMA-Factory's own SFT run with ``qt.TargetCallback``, beside its own losses; writes benchmarks/results/hosts.json.

It runs in an environment of LLaMA-Factory's own, on a CPU, with a model made here:

    python -m venv build/llama-factory
    build/llama-factory/bin/pip install torch==2.13.0 transformers==5.6.0 trl==0.24.0 peft==0.18.1 accelerate==1.11.0 \
        datasets==4.0.0 torchdata==0.11.0 "tyro<0.9" sentencepiece einops omegaconf fire scipy matplotlib protobuf \
        hf-transfer modelscope
    build/llama-factory/bin/pip install --no-deps llamafactory==0.9.5
    PYTHONPATH=src:tests/helpers:benchmarks build/llama-factory/bin/python -m hosts.llama_factory

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

from hosts.common import Steps, save, steps_of

import qtarget as qt
import tiny_models

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
    "max_steps": 3,
    "learning_rate": 1e-2,
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


def prepare(folder: Path) -> None:
    tiny_models.trained_model().save_pretrained(folder / "model")
    tiny_models.tokenizer().save_pretrained(folder / "model")
    rows = [{"instruction": f"Tom has {i}", "input": "", "output": f"A box holds {i + 9}"} for i in range(24)]
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))


def run(folder: Path, name: str, *callbacks: Any, **more: Any) -> Steps:
    """Loss and gradient norm of each step."""
    where = {"model_name_or_path": str(folder / "model"), "dataset_dir": str(folder), "output_dir": str(folder / name)}
    host()(SETTINGS | where | more, callbacks=list(callbacks))
    return steps_of(json.loads((folder / name / "trainer_state.json").read_text())["log_history"])


def main() -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        prepare(folder)
        own = {"dft": run(folder, "own", use_dft_loss=True), "sft": run(folder, "plain")}
        ours = {name: run(folder, f"ours-{name}", qt.TargetCallback(name)) for name in own}
        try:
            run(folder, "both", qt.TargetCallback("dft"), use_dft_loss=True)
            stopped = None
        except qt.ConfigError as error:
            stopped = str(error)
    steps = {name: {"own": own[name], "ours": ours[name]} for name in own}
    save("LLaMA-Factory", PACKAGES, steps, **{"its own loss beside a target": stopped})


if __name__ == "__main__":
    main()
