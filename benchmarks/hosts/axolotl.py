"""axolotl's own training with ``QTargetPlugin``, beside its own losses; writes benchmarks/results/hosts.json.

It runs in an environment of axolotl's own, on a CPU, with a model made here:

    python -m venv build/axolotl
    build/axolotl/bin/pip install torch==2.13.0 transformers==5.16.1 trl==1.9.0 peft==0.20.0 accelerate==1.13.0 \
        datasets==4.8.4 huggingface_hub==1.17.0 tokenizers==0.23.1 hf_xet==1.4.3 pydantic==2.12.5 addict fire \
        PyYAML==6.0.3 einops colorama numba scipy packaging==26.0 python-dotenv==1.0.1 optimum==1.16.2 sentencepiece \
        schedulefree==1.4.1 posthog==6.7.11 typer==0.25.1 evaluate==0.4.1 langdetect immutabledict==4.2.0 fastcore art \
        zstandard==0.22.0 antlr4-python3-runtime==4.13.2 axolotl-contribs-lgpl==0.0.7 axolotl-contribs-mit==0.0.6 \
        nvidia-ml-py==12.560.30 "kernels>=0.16,<0.17" wandb pillow "pydantic-extra-types[pycountry]" tiktoken jsonschema
    build/axolotl/bin/pip install --no-deps axolotl==0.19.0 bitsandbytes==0.50.2 mistral-common==1.11.5 triton==3.7.1
    PYTHONPATH=src:tests/helpers:benchmarks build/axolotl/bin/python -m hosts.axolotl

These are axolotl's own pins, without the packages for GPUs, clusters and buckets that this path never imports. Nothing is
stubbed. axolotl 0.19 has no dft that runs on a CPU (its is Liger's kernel), so that eaft, which it has, is compared, and
target-sft is held against a loop on full logits.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from hosts.common import Steps, record, steps_of

import qtarget as qt
import tiny_models

os.environ |= {"AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "axolotl.yml"
PACKAGES = ("axolotl", "torch", "transformers", "trl", "peft", "accelerate", "datasets")
PLUGIN = "qtarget.integrations.axolotl.QTargetPlugin"
RATE = 1e-2
SETTINGS = {
    "sequence_len": 64,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 3,
    "num_epochs": 1,
    "optimizer": "adamw_torch",
    "learning_rate": RATE,
    "lr_scheduler": "constant",
    "warmup_steps": 0,
    "warmup_ratio": None,
    "weight_decay": 0.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "val_set_size": 0,
    "bf16": False,
    "fp16": False,
    "tf32": False,
    "attn_implementation": "eager",
    "dataset_num_proc": 1,
    "seed": 1,
}
LORA: dict[str, Any] = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj", "v_proj"]}
LORA |= {f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o")}  # axolotl's Triton kernels, on by default
PACKED = {"sample_packing": True, "sequence_len": 128, "micro_batch_size": 1, "num_epochs": 2}
EVALUATED = {"val_set_size": 0.25, "eval_steps": 3, "eval_batch_size": 2, "num_epochs": 2}
# axolotl divides its eaft by all labels of a step, and every other loss by those of a micro-batch.
AT_ONCE = {"micro_batch_size": 4, "gradient_accumulation_steps": 1}
# What is refused: a name → settings beside target dft.
REFUSED: dict[str, dict[str, Any]] = {
    "use_eaft": {"use_eaft": True},
    "chunked_cross_entropy": {"chunked_cross_entropy": True},
    "context_parallel_size": {"context_parallel_size": 2},
    "trainer_cls": {"trainer_cls": "axolotl.core.trainers.mamba.AxolotlMambaTrainer"},
    "a misspelt key": {"qtarget_techer": "org/name"},
    "another tokenizer": {"target": "kd"},
    # last: axolotl asks a plugin in all later runs of the process
    "CutCrossEntropyPlugin": {
        "plugins": [PLUGIN, "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"],
        "bf16": True,
    },
}


def prepare(folder: Path) -> None:
    """A student, two teachers, the second with another tokenizer, and rows of different lengths."""
    for name, seed in (("student", 0), ("teacher", 5), ("stranger", 5)):
        tiny_models.trained_model(seed=seed).save_pretrained(folder / name)
        tiny_models.tokenizer("zebra quux " if name == "stranger" else "").save_pretrained(folder / name)
    rows = [{"messages": row["prompt"] + row["completion"]} for row in tiny_models.conversation_dataset(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(folder: Path, name: str, **more: Any) -> Any:
    """axolotl's trainer after ``axolotl.train.train``, with the settings of examples/axolotl.yml where none is given."""
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.train import train

    rows = {"path": str(folder / "rows.jsonl"), "ds_type": "json", "type": "chat_template"}
    where = {"base_model": str(folder / "student"), "datasets": [rows], "output_dir": str(folder / name)}
    where["dataset_prepared_path"] = str(folder / "prepared")
    settings = yaml.safe_load(EXAMPLE.read_text()) | SETTINGS | where | more
    file = folder / f"{name}.yml"
    file.write_text(yaml.safe_dump({key: value for key, value in settings.items() if value is not None}))
    cfg = load_cfg(str(file))
    return train(cfg=cfg, dataset_meta=load_datasets(cfg=cfg))[2]


def plain(folder: Path, name: str, **more: Any) -> Any:
    return run(folder, name, plugins=None, qtarget_target=None, qtarget_teacher=None, **more)


def with_target(folder: Path, name: str, target: Any, **more: Any) -> Any:
    return run(folder, name, qtarget_target=target, **{"qtarget_teacher": None, **more})


@contextlib.contextmanager
def noting_batches(seen: list[dict[str, Any]]) -> Iterator[None]:
    """Every micro-batch of training goes into ``seen``."""
    from transformers import Trainer

    step = Trainer.training_step

    def noted(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        seen.append({name: value.clone() for name, value in inputs.items()})
        return step(self, model, inputs, *args, **kwargs)

    Trainer.training_step = noted
    try:
        yield
    finally:
        Trainer.training_step = step


def by_hand(folder: Path, batches: list[dict[str, Any]], target: qt.Target) -> Steps:
    """The same micro-batches in a loop of our own, by the loss on full logits; two make a step."""
    from transformers import AutoModelForCausalLM

    model, teacher = (
        AutoModelForCausalLM.from_pretrained(folder / name, attn_implementation="eager", dtype=torch.float32)
        for name in ("student", "teacher")
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    steps: Steps = []
    for pair in zip(batches[::2], batches[1::2], strict=True):
        total = 0.0
        for batch in pair:
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            with torch.no_grad():
                theirs = teacher(**inputs).logits[:, :-1]
            ours, labels = model(**inputs).logits[:, :-1], batch["labels"][:, 1:]
            # axolotl averages the micro-batches, each over its own labels
            loss = qt.target_loss(ours, labels, target, teacher_logits=theirs).loss / len(pair)
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps.append({"loss": total, "grad_norm": norm.item()})
    return steps


def moved(folder: Path, trainer: Any) -> dict[str, list[str]]:
    """Which tensors are not what they were, by whether they are an adapter's; its B begins at zero."""
    from safetensors.torch import load_file

    before = load_file(folder / "student" / "model.safetensors")
    found: dict[str, list[str]] = {"base": [], "adapters": []}
    for name, value in trainer.model.state_dict().items():
        plain_name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if "lora_B" in name and value.any():
            found["adapters"].append(plain_name)
        elif "lora_" not in name and not torch.equal(value, before.get(plain_name, value)):
            found["base"].append(plain_name)
    return found


def refusals(folder: Path) -> dict[str, str | None]:
    """What is said instead of training."""
    from pydantic import ValidationError

    said: dict[str, str | None] = {}
    for name, settings in REFUSED.items():
        given = {"target": "dft", "qtarget_teacher": str(folder / "stranger"), **settings}
        try:
            with_target(folder, "refused", **given)
            said[name] = None
        except ValidationError as error:  # axolotl's own form for a setting
            said[name] = "; ".join(fault["msg"] for fault in error.errors())
        except qt.ConfigError as error:
            said[name] = str(error).replace(f"{folder}/", "")
    return said


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="rows-") as made:  # axolotl takes a path with "mpt" in it for an MPT model
        folder = Path(made)
        prepare(folder)
        variants = {"sft": {}, "sft, packed": PACKED, "sft, LoRA": LORA, "sft, evaluated": EVALUATED}
        theirs = {name: plain(folder, name, **more) for name, more in variants.items()}
        theirs["eaft"] = plain(folder, "eaft", use_eaft=True, **AT_ONCE)
        own = {name: steps_of(trainer.state.log_history) for name, trainer in theirs.items()}
        trainers = {name: with_target(folder, f"ours {name}", "sft", **more) for name, more in variants.items()}
        trainers["eaft"] = with_target(folder, "ours eaft", {"use_eaft": True}, **AT_ONCE)
        batches: list[dict[str, Any]] = []
        with noting_batches(batches):
            example = trainers["target-sft"] = run(folder, "example", qtarget_teacher=str(folder / "teacher"))
        own["target-sft"] = by_hand(folder, batches, qt.preset("target-sft", eta=0.5))
        steps = {name: {"own": own[name], "ours": steps_of(trainers[name].state.log_history)} for name in own}
        lines = [line for line in example.state.log_history if "grad_norm" in line]
        absent = with_target(folder, "absent", "dft", plugins=["qtarget.not_there.QTargetPlugin"])
        record(
            "axolotl",
            PACKAGES,
            steps,
            logged=[{key: value for key, value in line.items() if key.startswith("target/")} for line in lines],
            refused=refusals(folder),
            moved_by_LoRA=moved(folder, trainers["sft, LoRA"]),
            **{
                "held-out loss": {
                    whose: [
                        line["eval_loss"] for line in runs["sft, evaluated"].state.log_history if "eval_loss" in line
                    ]
                    for whose, runs in (("own", theirs), ("ours", trainers))
                },
                "dft by a plugin that cannot be imported": steps_of(absent.state.log_history),
            },
        )


if __name__ == "__main__":  # axolotl's worker processes import this file
    main()
