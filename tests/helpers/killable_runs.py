"""Runs of ``qtarget train`` in processes of their own that say where they are, so that they can be killed there.

A fork server imports everything once; each run is a process forked from it, in which nothing has been computed yet.
A run appends to ``trace`` in its folder, one line per event, before the event:

    batch STEP HASH    a micro-batch of optimiser step STEP + 1 and what is in it
    evaluate STEP      a batch of an evaluation
    save STEP          a checkpoint
    part, last         weights of a checkpoint, the model at the end
"""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
import os
import random
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

import tiny_models
from qtarget.cli.__main__ import main
from qtarget.cli.verbs import train  # noqa: F401  imported once, by the server
from qtarget.training import QTargetTrainer, trainer  # noqa: F401
from qtarget.training.saving import checkpoints

STEPS, SAVED_EVERY = 10, 3
COMMON = (
    f"--max_steps {STEPS} --save_steps {SAVED_EVERY} --eval_strategy steps --eval_steps 2 --logging_steps 1 "
    "--learning_rate 0.01 --optim adamw_torch --lr_scheduler_type cosine --per_device_train_batch_size 2 "
    "--gradient_accumulation_steps 2 --report_to none --use_cpu true --bf16 false --teacher_check_rows 4 "
    "--per_device_eval_batch_size 2 --disable_tqdm true --seed 3"
)
# Every feature in several.
RUNS = {
    "packed, teacher, schedule, lens": "--packing true --max_length 128 --target "
    "{preset:\u00a0target-sft,eta:\u00a0{schedule:\u00a0linear,from:\u00a00.0,to:\u00a00.8,steps:\u00a08}} "
    "--teacher_model_name_or_path ROOT/teacher --lens_every 1 --save_total_limit 1",
    "streamed, packed": "--dataset_streaming true --packing true --max_length 128 --target dft --lens_every 2",
    "streamed, cache": "--dataset_streaming true --target target-sft --teacher_cache ROOT/cache --max_length 120 "
    "--teacher_model_name_or_path ROOT/teacher --save_total_limit 2",
    "cache, packed, lens": "--target target-sft --teacher_cache ROOT/cache --max_length 120 --packing true "
    "--lens_every 1 --teacher_model_name_or_path ROOT/teacher",
    "psft, packed, lens": "--target psft --psft_refresh 4 --packing true --max_length 128 --lens_every 3",
    "psft, streamed, adapters": "--target psft --psft_refresh 4 --dataset_streaming true --use_peft true --lora_r 4 "
    "--lora_dropout 0.1 --lora_target_modules q_proj v_proj --lens_every 1",
    "average of the student, best kept": "--target target-sft --teacher_ema_decay 0.8 --save_total_limit 1 "
    "--save_steps 2 --load_best_model_at_end true --metric_for_best_model nll --greater_is_better true",
}


def write_world(root: Path) -> Path:
    """Student (with dropout), teacher, rows and a config."""
    student = tiny_models.trained_model()
    student.config.attention_dropout = 0.1
    for name, model in (("model", student), ("teacher", tiny_models.trained_model(seed=7, width=48, tied=False))):
        model.save_pretrained(root / name)
        tiny_models.tokenizer().save_pretrained(root / name)
    (root / "data").mkdir()
    rows = tiny_models.conversation_dataset(30)
    rows.to_json(root / "data" / "train.jsonl")
    rows.select(range(6)).to_json(root / "data" / "test.jsonl")
    (root / "config.yaml").write_text(
        f"model_name_or_path: {root}/model\ndataset_name: {root}/data\noutput_dir: {root}/unused\n"
    )
    words = f"cache build --config {root}/config.yaml --target target-sft --teacher_model_name_or_path {root}/teacher"
    assert main([*words.split(), "--max_length", "120", "--k", "16", "-o", str(root / "cache")]) == 0
    return root


def words_of(root: Path, name: str, folder: Path) -> list[str]:
    asked = f"train --config {root}/config.yaml --output_dir {folder} {COMMON} {RUNS[name].replace('ROOT', str(root))}"
    return [word.replace("\u00a0", " ") for word in asked.split(" ")]


# -- in the process that may be killed -------------------------------------------------------------------------------


def train_traced(words: list[str], folder: str, trace: str, moment: Moment | None, broken: bool) -> None:
    """A whole ``qtarget train``; what it says goes to a file, its exit status is the process's.

    A run that is to be killed at a ``moment`` waits to be killed at the first event after it that is no part of a save,
    or at its end: so it is killed however late the killer is. ``broken``: the tokenizer cannot be saved.
    """
    torch.set_num_threads(1)
    Path(folder).mkdir(exist_ok=True)
    said = os.open(f"{trace}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    _trace_into(os.open(trace, os.O_CREAT | os.O_WRONLY | os.O_APPEND), moment)
    if broken:
        PreTrainedTokenizerBase.save_pretrained = _cannot  # type: ignore[method-assign]
    code = main([*words, "--resume_from_checkpoint", "true"])
    sys.stdout.flush()
    if moment is not None:
        _wait_to_be_killed()
    os._exit(code)


def _cannot(*_: Any, **__: Any) -> None:
    raise ValueError("a tokenizer that cannot be written")


def _wait_to_be_killed() -> None:
    while True:
        signal.pause()


def _trace_into(file: int, moment: Moment | None) -> None:
    seen = 0

    def note(line: str) -> None:
        nonlocal seen
        if moment is not None and moment.event and seen >= moment.nth and not line.startswith("part"):
            _wait_to_be_killed()
        seen += moment is not None and line.startswith(moment.event)
        os.write(file, f"{line}\n".encode())

    def before(method: str, line: Any) -> None:
        real = getattr(QTargetTrainer, method)

        @functools.wraps(real)
        def traced(self, *args, **kwargs):
            note(line(self, *args, **kwargs))
            return real(self, *args, **kwargs)

        setattr(QTargetTrainer, method, traced)

    before("training_step", lambda self, model, inputs, *_: f"batch {self.state.global_step} {_digest(inputs)}")
    before("prediction_step", lambda self, *_, **__: f"evaluate {self.state.global_step}")
    before("_save_checkpoint", lambda self, *_, **__: f"save {self.state.global_step}")
    before("save_model", lambda self, *_, **how: "part" if how.get("_internal_call") else "last")


def _digest(inputs: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    for name in sorted(inputs):
        if isinstance(inputs[name], torch.Tensor):
            digest.update(name.encode() + inputs[name].contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


# -- in the process that kills ---------------------------------------------------------------------------------------


@functools.cache
def server() -> Any:
    """Processes forked from one that has imported everything and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killable_runs"])
    return context


def start_training(
    words: list[str], folder: Path, trace: Path, moment: Moment | None = None, broken: bool = False
) -> Any:
    arguments = words, str(folder), str(trace), moment, broken
    process = server().Process(target=train_traced, args=arguments, daemon=True)
    process.start()
    return process


@dataclass(frozen=True)
class Moment:
    """When to kill: at the ``nth`` line of the trace that begins with ``event``, or, of a checkpoint, once ``file`` is in
    its unfinished folder; then ``delay`` seconds more."""

    event: str
    nth: int
    file: str | None
    delay: float

    def __str__(self) -> str:
        file = f", {self.file} there" if self.file else ""
        return f"{self.event} {self.nth}{file} + {1000 * self.delay:.1f} ms"


# What a checkpoint is made of, in about the order it is written.
PARTS = ["model.safetensors", "tokenizer.json", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
PARTS += ["trainer_state.json", "qtarget.json", checkpoints.FILES]


def moments(kind: str, chance: random.Random) -> Moment:
    """A random moment of a kind: between steps, while a checkpoint is written, in an evaluation, while the model at the
    end is written, or at any time."""
    if kind == "step":
        return Moment("batch", chance.randint(1, 2 * STEPS), None, chance.random() * 0.03)
    if kind == "checkpoint":
        return Moment("save", chance.randint(1, STEPS // SAVED_EVERY), chance.choice(PARTS), chance.random() * 0.002)
    if kind == "evaluation":
        return Moment("evaluate", chance.randint(1, 20), None, chance.random() * 0.01)
    if kind == "end":
        return Moment("last", 1, None, chance.random() * 0.02)
    return Moment("", 1, None, chance.random() * 2.0)


def kill_at(process: Any, moment: Moment, folder: Path, trace: Path) -> None:
    """SIGKILL at that moment, or as soon after as this process sees it."""
    line = None
    while line is None and process.is_alive():
        lines = trace.read_text().splitlines() if trace.exists() else []
        line = next(iter([line for line in ["", *lines] if line.startswith(moment.event)][moment.nth - 1 :]), None)
        time.sleep(0.0005)
    if moment.file and line:
        name = f"checkpoint-{line.split()[1]}"
        file, finished = folder / checkpoints.UNFINISHED / name / moment.file, folder / name
        while process.is_alive() and not file.exists() and not finished.exists():
            pass
    time.sleep(moment.delay)
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join()
