"""A run that goes on: what an hour of training does to memory, files, logs, descriptors and threads.

    python benchmarks/soak.py                  # an hour, writes benchmarks/results/soak.json
    python benchmarks/soak.py --minutes 0.5    # the same in short; its memory has no time to settle and is not judged

A small Llama of random weights with SmolLM2's tokenizer learns the demo's problems by target-sft through the code of
`qtarget train`, from a second such model as the live teacher, with lens_every, evaluation and checkpoints on. It runs in
a process of its own, as a user would start it with its output sent to a file; this one only looks: every few seconds at
the process and at what is in the run's folder.

Memory's slope is a straight line through the means of 20 equal stretches after the first sixth, for single samples follow
one another too closely to be counted as independent; the interval is of 95 %.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from engine import machine
from train_step import MODEL, ROOT, prepare
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback

RESULTS = Path(__file__).parent / "results" / "soak.json"
WARM_UP = 1 / 6  # of the time, left out of every slope
STRETCHES = 20
STUDENT_T = 2.101  # 97.5 % of Student's t with STRETCHES - 2 degrees of freedom
KEPT = 120  # samples in the results
# Memory is flat where its slope's interval holds zero or the slope is below this share of its mean in an hour.
FLAT = 0.01
JUDGED_FROM = 10.0  # minutes


# -- the run that is watched -----------------------------------------------------------------------------------------


def make_model(folder: Path, tokenizer: Any, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def settings(folder: Path, data: Path, every: int) -> dict[str, Any]:
    return {
        "model_name_or_path": str(folder / "student"),
        "teacher_model_name_or_path": str(folder / "teacher"),
        "target": {"preset": "target-sft", "eta": 0.5},
        "dataset_name": str(data),
        "dataset_train_split": "train",
        "dataset_test_split": "test",
        "max_length": 512,
        "max_steps": 100_000_000,  # time ends it
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 0,
        "seed": 1,
        "loss_backend": "torch",  # max_steps says nothing of how long it runs
        "bf16": False,
        "gradient_checkpointing": False,
        "lens_every": max(1, every // 20),
        "logging_steps": max(1, every // 20),
        "eval_strategy": "steps",
        "eval_steps": every,
        "save_strategy": "steps",
        "save_steps": every,
        "save_total_limit": 2,
        "report_to": "none",
        "output_dir": str(folder / "run"),
    }


class Until(TrainerCallback):
    """Ends training after so many seconds, or steps, and leaves a file at its first and its last step for the one who
    looks. Where steps are counted it waits at each of them until somebody has looked."""

    def __init__(self, folder: Path, seconds: float, steps: int):
        self._folder, self._seconds, self._steps = folder, seconds, steps

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._end = time.monotonic() + self._seconds
        (self._folder / "began").touch()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._steps:
            (self._folder / "step").touch()
            while (self._folder / "step").exists():
                time.sleep(0.001)
        done = state.global_step >= self._steps if self._steps else time.monotonic() > self._end
        if done and not control.should_training_stop:
            (self._folder / "ended").touch()
            control.should_training_stop = True


def train(folder: Path, minutes: float, steps: int) -> int:
    from qtarget.cli import setup
    from qtarget.cli.verbs import train as verb

    asked = setup.read(["--config", str(folder / "soak.yaml")])
    trainer = setup.build(asked)
    trainer.add_callback(Until(folder, 60 * minutes, steps))
    return verb.train(trainer, asked)


# -- the one who looks -----------------------------------------------------------------------------------------------


def look(process: psutil.Process, folder: Path) -> dict[str, float]:
    """One sample: the process, and what is in the run's folder. Sizes in bytes."""
    memory = process.memory_info()
    sizes: dict[str, int] = {}
    # os.walk goes on where a checkpoint is deleted meanwhile; rglob raises.
    for place, _, names in os.walk(folder / "run"):
        for path in (Path(place) / name for name in names):
            with contextlib.suppress(FileNotFoundError):
                sizes[str(path.relative_to(folder / "run"))] = path.stat().st_size
    return {
        "rss": memory.rss,
        "own": memory.rss - memory.shared,  # without pages of files
        "descriptors": process.num_fds(),
        "threads": process.num_threads(),
        "files": len(sizes),
        "bytes": sum(sizes.values()),
        "checkpoints": len({name.split("/")[0] for name in sizes if name.startswith("checkpoint-")}),
        "lens_history": sizes.get("lens_history.parquet", 0),
        "log": (folder / "train.log").stat().st_size,
    }


def watch(folder: Path, minutes: float, every: float, steps: int) -> tuple[list[dict[str, float]], int]:
    """Start the run and sample it to its end: (samples of its training with ``seconds`` since it began, exit status).

    ``steps``: sample at each of so many, in place of every so many seconds for so many minutes.
    """
    command = [sys.executable, __file__, "--train", str(folder), "--minutes", str(minutes), "--steps", str(steps)]
    samples: list[dict[str, float]] = []
    began = None
    with (folder / "train.log").open("w") as log:
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            process = psutil.Process(child.pid)
            while child.poll() is None:
                if began is None and (folder / "began").exists():
                    began = time.monotonic()
                due = (folder / "step").exists() if steps else not (folder / "ended").exists()
                if began is not None and due:
                    try:
                        sample = look(process, folder)
                    except psutil.NoSuchProcess:
                        break
                    samples.append({"seconds": round(time.monotonic() - began, 2), **sample})
                    (folder / "step").unlink(missing_ok=True)
                time.sleep(0.01 if steps else every if began is not None else 0.2)
        finally:
            if child.poll() is None and sys.exc_info()[0] is not None:
                child.terminate()
            status = child.wait()
    return samples, status


def slope(samples: list[dict[str, float]], name: str) -> dict[str, float | None]:
    """{mean, per_hour, low, high} of a figure over its stretches; no interval where there are too few samples."""
    size = len(samples) / STRETCHES
    parts = [samples[round(i * size) : round((i + 1) * size)] for i in range(STRETCHES)]
    parts = [part for part in parts if part]
    hours = [statistics.mean(sample["seconds"] for sample in part) / 3600 for part in parts]
    values = [statistics.mean(sample[name] for sample in part) for part in parts]
    if len(parts) < 3:
        return {"mean": statistics.mean(values) if values else None, "per_hour": None, "low": None, "high": None}
    line = statistics.linear_regression(hours, values)
    told: dict[str, float | None] = {"mean": statistics.mean(values), "per_hour": line.slope, "low": None, "high": None}
    if len(parts) == STRETCHES:
        left = [y - line.intercept - line.slope * x for x, y in zip(hours, values, strict=True)]
        centre = statistics.mean(hours)
        spread = sum((x - centre) ** 2 for x in hours)
        error = (sum(r * r for r in left) / (STRETCHES - 2) / spread) ** 0.5
        told |= {"low": line.slope - STUDENT_T * error, "high": line.slope + STUDENT_T * error}
    return told


def judge(samples: list[dict[str, float]], minutes: float) -> dict[str, Any]:
    """Slopes after the warm-up and what they mean; ``ok`` is None where the run was too short for a verdict on memory."""
    settled = [sample for sample in samples if sample["seconds"] >= WARM_UP * 60 * minutes]
    half = len(settled) // 2
    memory = {name: slope(settled, name) for name in ("rss", "own")}
    own = memory["own"]
    flat = None
    if minutes >= JUDGED_FROM and own["low"] is not None:
        flat = own["low"] <= 0 or own["per_hour"] < FLAT * own["mean"]

    def grows(name: str) -> bool:
        """Whether the second half has more of it than the first, by their medians: a save in progress is no growth."""
        return statistics.median(s[name] for s in settled[half:]) > statistics.median(s[name] for s in settled[:half])

    counts = {f"{name}_grow": grows(name) for name in ("files", "checkpoints", "descriptors", "threads")}
    return {
        "memory": memory,
        "memory_flat": flat,
        **counts,
        "largest": {name: max(s[name] for s in settled) for name in settled[0] if name != "seconds"},
        "bytes_per_hour": {name: slope(settled, name)["per_hour"] for name in ("bytes", "log", "lens_history")},
        "ok": None if flat is None else flat and not any(counts.values()),
    }


def megabytes(value: float | None) -> str:
    return "?" if value is None else f"{value / 1e6:.2f}"


def tell(record: dict[str, Any]) -> None:
    found = record["judged"]
    print(f"\n{record['minutes']:g} minutes, {record['steps']} steps, {record['evaluations']} evaluations")
    for name, told in (("rss", "resident memory"), ("own", "without pages of files")):
        line = found["memory"][name]
        print(
            f"  {told:<24} {megabytes(line['mean'])} MB, {megabytes(line['per_hour'])} MB per hour "
            f"({megabytes(line['low'])} to {megabytes(line['high'])})"
        )
    for name in ("files", "checkpoints", "descriptors", "threads"):
        print(f"  {name:<24} at most {found['largest'][name]}, {'GROWS' if found[f'{name}_grow'] else 'bounded'}")
    for name, rate in found["bytes_per_hour"].items():
        print(f"  {name:<24} at most {megabytes(found['largest'][name])} MB, {megabytes(rate)} MB per hour")
    verdict = {None: "too short for a verdict on memory", True: "flat and bounded", False: "NOT flat or not bounded"}
    print(f"  {verdict[found['ok']]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="of training")
    parser.add_argument("--steps", type=int, default=0, help="end after so many in place of minutes, a sample at each")
    parser.add_argument("--every", type=int, default=60, help="steps between evaluations, and between checkpoints")
    parser.add_argument("--sample", type=float, default=5.0, help="seconds between two samples")
    parser.add_argument("--width", type=int, default=128, help="of student and teacher")
    parser.add_argument(
        "--demo", type=Path, default=ROOT / "build" / "quickstart", help="the demo's tokenizer and data"
    )
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "soak", help="of the run; made anew")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train is not None:
        return train(args.train, args.minutes, args.steps)
    if args.steps:
        args.minutes = 0.0  # no verdict on time
    elif args.minutes <= 0 or args.sample <= 0 or args.every < 1:
        parser.error("minutes and sample must be above 0 and every at least 1")
    prepare(args.demo)
    shutil.rmtree(args.folder, ignore_errors=True)
    args.folder.mkdir(parents=True)
    tokenizer = AutoTokenizer.from_pretrained(args.demo / MODEL)
    for seed, name in enumerate(("student", "teacher")):
        make_model(args.folder / name, tokenizer, args.width, seed)
    asked = settings(args.folder, args.demo / "data", args.every)
    (args.folder / "soak.yaml").write_text(yaml.safe_dump(asked))
    samples, status = watch(args.folder, args.minutes, min(args.sample, args.minutes), args.steps)
    if status != 0 or len(samples) < 10:
        print(f"the run ended with status {status} after {len(samples)} samples; see {args.folder / 'train.log'}")
        return 1
    state = json.loads((args.folder / "run" / "trainer_state.json").read_text())
    record = {
        "machine": machine(),
        "minutes": args.minutes,
        "steps": state["global_step"],
        "evaluations": sum("eval_loss" in line for line in state["log_history"]),
        "settings": {name: value for name, value in asked.items() if not Path(str(value)).is_absolute()},
        "width": args.width,
        "judged": judge(samples, args.minutes),
        "series": samples[:: max(1, -(-len(samples) // KEPT))],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    tell(record)
    return 0 if record["judged"]["ok"] is not False else 1


if __name__ == "__main__":
    sys.exit(main())
