"""The memory `qtarget plan` says a step takes, against the memory it takes.

    python benchmarks/plan.py             # five runs on a CPU, writes benchmarks/results/plan.json

Each run is QTargetTrainer on a Llama of random weights with SmolLM2's vocabulary, three steps of float32 AdamW, in a
process of its own. Compared are three figures, each above what the process held before its models were made (libraries,
a tiny model trained once):

    loaded    after the trainer is made: weights of student and teacher
    between   after a step, gradients freed: the same with AdamW's states and the engine's buffers, which a CPU keeps
    peak      the most during the steps after the first: all of it with gradients and activations

The process gives every freed block of 64 KiB or more back to the system (MALLOC_MMAP_THRESHOLD_), so that what is
measured is what was asked for, and not an allocator's gaps.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from datasets import Dataset
from engine import machine, process_status
from train_step import MODEL, ROOT, prepare
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback

from qtarget import QTargetConfig, QTargetTrainer
from qtarget.planning import memory, shapes

RESULTS = Path(__file__).parent / "results" / "plan.json"
LIMIT = 0.15
# width, layers, feed-forward width, heads, key-value heads, rows, their length, and what differs from plain sft
CASES: dict[str, dict[str, Any]] = {
    "17M sft": {"size": (256, 6, 768, 4, 2), "rows": 4, "length": 256},
    "52M target-sft": {"size": (512, 8, 1536, 8, 4), "rows": 2, "length": 512, "target": "target-sft"},
    "134M sft": {"size": (576, 30, 1536, 9, 3), "rows": 2, "length": 256},
    "134M sft, checkpointing": {"size": (576, 30, 1536, 9, 3), "rows": 4, "length": 512, "checkpointing": True},
    "134M target-sft, accumulation": {
        "size": (576, 30, 1536, 9, 3),
        "rows": 2,
        "length": 256,
        "target": "target-sft",
        "accumulation": 2,
    },
}


def config_of(size: tuple[int, int, int, int, int], vocab: int, length: int) -> LlamaConfig:
    width, layers, ffn, heads, kv_heads = size
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        num_hidden_layers=layers,
        intermediate_size=ffn,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=length,
        tie_word_embeddings=True,
    )


def make(case: dict[str, Any], tokenizer: Any, steps: int, folder: str) -> QTargetTrainer:
    """A trainer whose micro-batches hold rows × length positions: one full row and shorter ones, padded."""
    rows, length = case["rows"], case["length"]
    torch.manual_seed(0)
    config = config_of(case["size"], len(tokenizer), length)
    target = case.get("target", "sft")
    number = rows * case.get("accumulation", 1) * steps
    made = []
    for row in range(number):
        ids = torch.randint(0, len(tokenizer), (length - 8 * (row % rows),)).tolist()
        made.append({"input_ids": ids, "labels": ids})
    settings = QTargetConfig(
        folder,
        target=target,
        max_steps=steps,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=case.get("accumulation", 1),
        gradient_checkpointing=case.get("checkpointing", False),
        train_sampling_strategy="sequential",
        max_length=length,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        teacher_check_rows=0,
        disable_tqdm=True,
    )
    return QTargetTrainer(
        LlamaForCausalLM(config),
        settings,
        train_dataset=Dataset.from_list(made),
        processing_class=tokenizer,
        teacher_model=LlamaForCausalLM(config) if target == "target-sft" else None,
    )


class Watch(TrainerCallback):
    """Reads resident memory at the end of each step, and starts the high-water mark anew after the first."""

    between = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.between = process_status("VmRSS")
        if state.global_step == 1:
            Path("/proc/self/clear_refs").write_text("5")


def measure(case: dict[str, Any], demo: Path) -> dict[str, int]:
    """In this process: bytes of loaded, between and peak."""
    tokenizer = AutoTokenizer.from_pretrained(demo / MODEL)
    with tempfile.TemporaryDirectory() as folder:
        tiny = case | {"size": (32, 1, 64, 2, 1), "rows": 1, "length": 16}
        make(tiny, tokenizer, 1, folder).train()
        from qtarget.losses.engine import buffers

        buffers.forget()  # the tiny model and its buffers are not the libraries'
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        before = process_status("VmRSS")
        trainer = make(case, tokenizer, 3, folder)
        loaded = process_status("VmRSS")
        watch = Watch()
        trainer.add_callback(watch)
        trainer.train()
        return {
            "loaded": loaded - before,
            "between": watch.between - before,
            "peak": process_status("VmHWM") - before,
        }


def measured(name: str, demo: Path) -> dict[str, int]:
    """In a process of its own."""
    command = [sys.executable, __file__, "--measure", name, "--demo", str(demo)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def planned(case: dict[str, Any], vocab: int) -> dict[str, int]:
    """The same figures by arithmetic."""
    shape = shapes.of_config(config_of(case["size"], vocab, case["length"]))
    work = memory.Workload(
        shape,
        1,
        case["rows"] * case["length"],
        teachers=[(shape, 4)] if case.get("target") == "target-sft" else [],
        checkpointing=case.get("checkpointing", False),
        mixed=False,
        accumulates=case.get("accumulation", 1) > 1,
        device="cpu",
    )
    return memory.stages(work, "ddp")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=ROOT / "build" / "quickstart", help="the demo's tokenizer")
    parser.add_argument("--case", choices=list(CASES), help="this one only, and write nothing")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    if args.measure:
        print(json.dumps(measure(CASES[args.measure], args.demo)))
        return
    prepare(args.demo)
    vocab = len(AutoTokenizer.from_pretrained(args.demo / MODEL))
    record: dict[str, Any] = {"machine": machine(), "limit": LIMIT, "vocab": vocab, "cases": []}
    worst = 0.0
    print(f"{'MB':<32}{'figure':<10}{'planned':>9}{'measured':>10}{'off by':>9}")
    for name, case in CASES.items():
        if args.case not in (None, name):
            continue
        wanted, found = planned(case, vocab), measured(name, args.demo)
        off = {figure: wanted[figure] / found[figure] - 1 for figure in found}
        worst = max(worst, *map(abs, off.values()))
        record["cases"].append({"case": name, **case, "planned": wanted, "measured": found, "off": off})
        for figure, error in off.items():
            told = f"{wanted[figure] / 1e6:>9.0f}{found[figure] / 1e6:>10.0f}{error:>9.1%}"
            print(f"{name:<32}{figure:<10}{told}")
    if args.case is None:
        args.out.write_text(json.dumps(record, indent=1) + "\n")
        print(f"\nraw results: {args.out}")
    if worst > LIMIT:
        raise SystemExit(f"off by {worst:.1%}, more than {LIMIT:.0%}")


if __name__ == "__main__":
    main()
