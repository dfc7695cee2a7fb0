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

import functools
import importlib.machinery
import json
import os
import runpy
import sys
import tempfile
import types
from pathlib import Path
from typing import Any
from unittest import mock

from common import PAIRS, STEPS, TRAINING, Steps, make_model, record, steps_of, stopped

import qtarget as qt

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "trainers" / "llama_factory_run.py"
PACKAGES = ("llamafactory", "torch", "transformers", "trl", "peft", "accelerate", "datasets")
SETTINGS = {
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "full",
    "dataset": "rows",
    "template": "default",
    "cutoff_len": 64,
    **TRAINING,
    "overwrite_output_dir": True,
}


LOSSES_OF_ITS_OWN = {"use_dft_loss": True, "use_eaft_loss": True, "label_smoothing_factor": 0.1}


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


def settings(folder: Path, name: str) -> dict[str, Any]:
    where = {"model_name_or_path": str(folder / "model"), "dataset_dir": str(folder), "output_dir": str(folder / name)}
    return SETTINGS | where


def steps_in(folder: Path) -> Steps:
    return steps_of(json.loads((folder / "trainer_state.json").read_text())["log_history"])


def run(folder: Path, name: str, *callbacks: Any, **more: Any) -> Steps:
    host()(settings(folder, name) | more, callbacks=list(callbacks))
    return steps_in(folder / name)


def by_script(folder: Path) -> Steps:
    """The script as it stands, with a recipe and a setting that replaces one in it."""
    host()
    (folder / "recipe.yaml").write_text(json.dumps(settings(folder, "script") | {"max_steps": 1}))  # JSON is YAML
    with mock.patch.object(sys, "argv", [str(SCRIPT), str(folder / "recipe.yaml"), f"max_steps={STEPS}"]):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return steps_in(folder / "script")


def main() -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        make_model(folder)
        write_rows(folder)
        dft = run(folder, "own", use_dft_loss=True)
        steps = {
            "dft": {"own": dft, "ours": run(folder, "dft", qt.TargetCallback("dft"))},
            "dft, by the script": {"own": dft, "ours": by_script(folder)},
            "sft": {"own": run(folder, "plain"), "ours": run(folder, "sft", qt.TargetCallback("sft"))},
        }
        refused = {}
        for name, value in LOSSES_OF_ITS_OWN.items():
            one = functools.partial(run, folder, "refused", qt.TargetCallback("dft"), **{name: value})
            refused[name] = stopped(one)
    record("LLaMA-Factory", PACKAGES, steps, its_own_loss_beside_a_target=refused)


if __name__ == "__main__":
    main()
