"""ms-swift's own SFT run with the plugin of ``examples/trainers``, beside its own losses; writes hosts.json.

It runs in an environment of ms-swift's own, on a CPU, with a model made here:

    python -m venv build/ms-swift
    build/ms-swift/bin/pip install torch==2.13.0 transformers==5.19.0 trl==0.29.1 peft==0.20.0 accelerate==1.15.0 \
        datasets==4.8.4 modelscope addict attrdict binpacking dacite einops fastapi json-repair matplotlib nltk openai \
        pandas pillow requests rouge scipy sentencepiece simplejson sortedcontainers tensorboard tiktoken uvicorn \
        zstandard aiohttp importlib-metadata
    build/ms-swift/bin/pip install --no-deps ms-swift==4.6.0
    PYTHONPATH=src:tests/helpers build/ms-swift/bin/python benchmarks/hosts/ms_swift.py

It has a dft of its own (enable_dft_loss), so that each step's loss and gradient norm can be held against ours.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import PAIRS, TRAINING, Steps, make_model, record, steps_of, stopped

PLUGIN = Path(__file__).resolve().parents[2] / "examples" / "trainers" / "ms_swift_plugin.py"
PACKAGES = ("ms-swift", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "modelscope")
SETTINGS = {
    "model_type": "llama",
    "template": "chatml",
    "tuner_type": "full",
    "torch_dtype": "float32",
    "max_length": 64,
    **TRAINING,
    "check_model": False,
}
LORA = {"tuner_type": "lora", "target_modules": "all-linear"}
# With each of these its trainer takes the labels away from the model and computes a loss itself.
LOSSES_OF_ITS_OWN = {
    "enable_dft_loss": True,
    "enable_channel_loss": True,
    "label_smoothing_factor": 0.1,
    "loss_type": "cross_entropy",
    "loss_scale": "react",
}


def write_inputs(folder: Path) -> None:
    """Rows, and the plugin for two targets under names of their own."""
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in PAIRS
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = PLUGIN.read_text(encoding="utf-8")
    for target in ("dft", "sft"):
        plugin = text.replace('"dft"', f'"{target}"').replace('["qtarget"]', f'["{target}"]')
        (folder / f"plugin_{target}.py").write_text(plugin, encoding="utf-8")


def words(folder: Path, name: str, **more: Any) -> list[str]:
    """Those of the command line."""
    where = {"model": folder / "model", "dataset": folder / "rows.jsonl", "output_dir": folder / name}
    return [word for key, value in (SETTINGS | where | more).items() for word in (f"--{key}", str(value))]


def run(folder: Path, name: str, target: str | None = None, **more: Any) -> list[dict[str, Any]]:
    """The log of ms-swift's ``sft_main``, the function behind ``swift sft``."""
    from swift import sft_main

    plugin = {"external_plugins": folder / f"plugin_{target}.py", "callbacks": target} if target else {}
    return sft_main(words(folder, name, **plugin, **more))["log_history"]


def by_command(folder: Path) -> Steps:
    """The steps of ``swift sft`` with the plugin as it stands, from the file it logs to."""
    swift = Path(sys.executable).with_name("swift")
    subprocess.run(
        [str(swift), "sft", *words(folder, "command", external_plugins=PLUGIN, callbacks="qtarget")], check=True
    )
    (log,) = (folder / "command").rglob("logging.jsonl")
    return steps_of(map(json.loads, log.read_text().splitlines()))


def main() -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        make_model(folder)
        write_inputs(folder)
        logged = run(folder, "dft", "dft")
        own = {"dft": run(folder, "own", enable_dft_loss=True), "sft": run(folder, "plain")}
        ours = {"dft": logged, "sft": run(folder, "sft", "sft")}
        own["sft, LoRA"], ours["sft, LoRA"] = run(folder, "plain-lora", **LORA), run(folder, "lora", "sft", **LORA)
        steps = {name: {"own": steps_of(own[name]), "ours": steps_of(ours[name])} for name in own}
        steps["dft, by the command"] = {"own": steps["dft"]["own"], "ours": by_command(folder)}
        refused = {}
        for name, value in LOSSES_OF_ITS_OWN.items():
            refused[name] = stopped(functools.partial(run, folder, "refused", "dft", **{name: value}))
    names = sorted(name for name in logged[0] if name.startswith("target/"))
    record("ms-swift", PACKAGES, steps, its_own_loss_beside_a_target=refused, logged=names)


if __name__ == "__main__":
    main()
