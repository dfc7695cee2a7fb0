"""A training step with qtarget against the same step with TRL's own SFTTrainer, on the demo's model and problems.

    python benchmarks/train_step.py             # time and memory, writes benchmarks/results/train_step.json
    python benchmarks/train_step.py --repeats 3 --no_memory

A step is the trainer's own training_step (forward and backward), the optimiser's step and zero_grad, with float32 weights
and without gradient checkpointing. The optimiser is SGD: it keeps no state, so that every trainer has a model of its own
in one process, and adds less than AdamW to what both sides have in common. The teacher of target-sft is as large as the
student: the same model, its weights shifted a little.
Time: all methods in turn on the same batch, a new batch each round; the figure is the median of the ratios to TRL's step
of the same round. A ratio holds while the machine's speed drifts; absolute times here do not.
Memory: each method in a process of its own; peak resident memory during a step above that before it, so gradients count
and weights, the teacher's too, do not.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from datasets import Dataset
from engine import machine, process_status, timed
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from qtarget import QTargetConfig, QTargetTrainer

TRL = "trl nll"
TARGETS = {"qtarget sft": "sft", "qtarget dft": "dft", "qtarget target-sft": "target-sft"}
METHODS = (TRL, *TARGETS)
LIMITS = {"qtarget sft": 1.00, "qtarget dft": 1.02, "qtarget target-sft": 1.45}
ROOT = Path(__file__).parent.parent
MODEL = "SmolLM2-135M-Instruct"
RESULTS = Path(__file__).parent / "results" / "train_step.json"

Batch = dict[str, Tensor]


def prepare(folder: Path) -> None:
    """The demo's model and problems, where they are not there yet."""
    if not ((folder / MODEL / "model.safetensors").is_file() and (folder / "data" / "train.jsonl").is_file()):
        script = ROOT / "recipes" / "prepare_quickstart.py"
        subprocess.run([sys.executable, str(script), "--out", str(folder)], check=True)


def load(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder / MODEL, dtype=torch.float32)


@torch.no_grad()
def teacher_near(folder: Path) -> nn.Module:
    """The student's start with noise of a fiftieth of each weight's spread."""
    model = load(folder)
    torch.manual_seed(0)
    for weight in model.parameters():
        weight.add_(0.02 * weight.std() * torch.randn_like(weight))
    return model


def make_trainer(method: str, folder: Path, rows: int, batches: int, logging_steps: int, scratch: str) -> SFTTrainer:
    """A trainer of one method, ready for a step, over as many of the demo's rows as the batches take."""
    lines = (folder / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    if len(lines) < rows * batches:
        raise SystemExit(f"{folder / 'data'} holds {len(lines)} rows; {batches} batches of {rows} need more")
    data = Dataset.from_list([json.loads(line) for line in lines[: rows * batches]])
    settings: dict[str, Any] = {
        "output_dir": scratch,
        "per_device_train_batch_size": rows,
        "max_length": 512,  # the demo's
        "gradient_checkpointing": False,
        "optim": "sgd",
        "learning_rate": 1e-4,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "seed": 1,
    }
    model = load(folder)
    if method == TRL:
        trainer = SFTTrainer(model, SFTConfig(**settings), train_dataset=data)
    else:
        target = TARGETS[method]
        teacher = teacher_near(folder) if target == "target-sft" else None
        config = QTargetConfig(target=target, **settings)
        trainer = QTargetTrainer(model, config, train_dataset=data, teacher_model=teacher)
    # What train() sets before its first step.
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    trainer.state.logging_steps = logging_steps
    return trainer


def step(trainer: SFTTrainer, batch: Batch) -> float:
    """One optimiser step by the calls of the training loop, without clipping and schedule; the loss."""
    samples, items = trainer.get_batch_samples(iter([dict(batch)]), 1, trainer.args.device)
    loss = trainer.training_step(trainer.model, samples[0], items)
    trainer.optimizer.step()
    trainer.model.zero_grad()
    return float(loss)


def batches_of(trainers: dict[str, SFTTrainer]) -> list[Batch]:
    """The batches in the order of training, which must be the same for every trainer."""
    found = {method: [dict(batch) for batch in trainer.get_train_dataloader()] for method, trainer in trainers.items()}
    first = found[TRL]
    for method, batches in found.items():
        same = len(batches) == len(first) and all(
            a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
            for a, b in zip(batches, first, strict=True)
        )
        if not same:
            raise SystemExit(f"{method} prepares other batches than {TRL}: a ratio would compare different work")
    return first


def measure_time(folder: Path, rows: int, repeats: int, logging_steps: int, scratch: str) -> dict:
    trainers = {method: make_trainer(method, folder, rows, repeats + 1, logging_steps, scratch) for method in METHODS}
    batches = batches_of(trainers)
    first = {method: step(trainer, batches[0]) for method, trainer in trainers.items()}  # warm up
    if abs(first["qtarget sft"] / first[TRL] - 1) > 1e-4:
        raise SystemExit(f"sft's first loss is {first['qtarget sft']}, TRL's {first[TRL]}: they train different things")
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    cpu, wall = time.process_time(), time.perf_counter()
    for turn, batch in enumerate(batches[1:]):
        begin = turn % len(METHODS)  # nobody always runs after the same neighbour
        for method in METHODS[begin:] + METHODS[:begin]:
            seconds[method].append(timed(lambda m=method, b=batch: step(trainers[m], b)))
    share = (time.process_time() - cpu) / (time.perf_counter() - wall) / torch.get_num_threads()
    ratios = {
        method: [mine / theirs for mine, theirs in zip(values, seconds[TRL], strict=True)]
        for method, values in seconds.items()
    }
    return {
        "model": MODEL,
        "rows": rows,
        "repeats": repeats,
        "logging_steps": logging_steps,
        "positions": [batch["input_ids"].numel() for batch in batches[1:]],
        "supervised_tokens": [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches[1:]],
        "own_cpu_share": round(share, 3),
        "first_loss": first,
        "seconds": seconds,
        "ratio": {method: round(statistics.median(values), 3) for method, values in ratios.items()},
    }


def measure_memory(method: str, folder: Path, rows: int, logging_steps: int) -> float | None:
    """Megabytes that a step takes at its peak above what was there before it."""
    command = [sys.executable, __file__, "--memory_of", method, "--rows", str(rows), "--folder", str(folder)]
    done = subprocess.run([*command, "--logging_steps", str(logging_steps)], capture_output=True, text=True)
    return float(done.stdout.split()[-1]) if done.returncode == 0 else None


def memory_of(method: str, folder: Path, rows: int, logging_steps: int, scratch: str) -> float:
    trainer = make_trainer(method, folder, rows, 1, logging_steps, scratch)
    batch = dict(next(iter(trainer.get_train_dataloader())))
    # Libraries' own buffers are not the method's; the buffers a method keeps are, and stay tiny here.
    longest = int(batch["attention_mask"].sum(1).argmax())
    step(trainer, {name: value[longest : longest + 1, -16:] for name, value in batch.items()})
    ctypes.CDLL(None).malloc_trim(0)  # what the warm-up freed, its gradients above all, must not hide the step's own
    resident = process_status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    step(trainer, batch)
    return (process_status("VmHWM") - resident) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=4, help="the demo's rows in a batch")
    parser.add_argument(
        "--logging_steps", type=int, default=10, help="1: time steps that log, for which every statistic is computed"
    )
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "quickstart", help="the demo's model and data")
    parser.add_argument("--no_memory", action="store_true")
    parser.add_argument("--no_time", action="store_true", help="measure memory only and keep the times on record")
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)  # TRL's own default
    prepare(args.folder)
    with tempfile.TemporaryDirectory() as scratch:
        if args.memory_of:
            print(memory_of(args.memory_of, args.folder, args.rows, args.logging_steps, scratch))
            return
        record: dict = {"machine": machine(), "time": None, "memory": []}
        if args.no_time:
            record["time"] = json.loads(args.out.read_text())["time"]
        else:
            found = measure_time(args.folder, args.rows, args.repeats, args.logging_steps, scratch)
            record["time"] = found
            supervised = statistics.mean(found["supervised_tokens"])
            positions = statistics.mean(found["positions"])
            print(f"\n{MODEL}, float32, {args.rows} rows ({supervised:.0f} of {positions:.0f} tokens supervised):")
            print("time of a step over TRL's")
            for method in METHODS:
                limit = f"  (limit {LIMITS[method]:.2f})" if method in LIMITS else ""
                print(f"  {method:<34} {found['ratio'][method]:5.2f}{limit}")
            if found["own_cpu_share"] < 0.9:
                print(
                    f"  this process had only {found['own_cpu_share']:.0%} of its cores: run again on a quiet machine"
                )
    if not args.no_memory:
        print("\npeak memory of a step above that before it, in MB and over TRL's")
        peaks: dict[str, float | None] = {}
        for method in METHODS:
            peaks[method] = peak = measure_memory(method, args.folder, args.rows, args.logging_steps)
            ratio = round(peak / peaks[TRL], 3) if peak and peaks[TRL] else None
            entry = {"method": method, "megabytes": None if peak is None else round(peak), "ratio": ratio}
            record["memory"].append(entry)
            told = "not available" if peak is None else f"{peak:5.0f} MB" + (f"  {ratio:5.2f}" if ratio else "")
            print(f"  {method:<34} {told}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\nraw results: {args.out}")


if __name__ == "__main__":
    main()
