"""Train and test every cell: condition x arm x training seed. A finished cell is one JSON file and is not run again.

    python -m real_model.run            # from benchmarks/, or with it on PYTHONPATH: make real-model
    python -m real_model.run --quick    # two steps and four problems, to see that it works; writes build/real_model/quick
    python -m real_model.run --large --device cuda --minutes 8      # for a card, in pieces

Every cell is ``qtarget train`` and ``qtarget eval``, called in this process. Seeds are the outer loop and clean labels
come first, so that whatever is finished when it is stopped is balanced. A cell that was killed starts anew. With
--minutes no cell is begun that would likely not end in time, and the same command goes on.

The large form has not been run; what it should take is predicted in forms.py. On a rented machine bring the finished
cells along (they say what is left), and take the new ones home in one file:

    tar -czf $OUT/real_model_large.tgz -C benchmarks/results real_model_large

A teacher that was trained lies in build/real_model/teachers. Where it was lost it is trained again, from the same rows
and seed, once an open cell needs it; a cell names the weights of its own: a card may give other last digits.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from real_model import forms, problems, record
from real_model.forms import (
    BASE,
    BUILD,
    CLEAN,
    CONDITIONS,
    CPU,
    CUDA,
    HERE,
    KD,
    NOISY,
    READS,
    ROOT,
    SFT,
    TRAINED,
    Cell,
    Settings,
)
from real_model.record import TASK

MODEL = ROOT / "build" / "quickstart" / "SmolLM2-135M-Instruct"
TEACHER = "teacher.json"  # beside a trained teacher's weights: which one it is


def main(given: list[str] | None = None) -> None:
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small form that shows it works")
    parser.add_argument("--large", action="store_true", help="longer sums, more rows, two kinds of teacher, five seeds")
    parser.add_argument("--device", choices=forms.DEVICES, default=CPU, help="cuda: in bfloat16; with --large")
    parser.add_argument("--minutes", type=float, help="begin nothing that would likely end later")
    parser.add_argument("--results", type=Path, help="where finished cells are written")
    parser.add_argument("--model", type=Path, default=MODEL, help="the student's folder")
    options = parser.parse_args(given)
    take_device(options.device, options.large)

    import torch

    form = {
        (False, False): forms.SMALL,
        (False, True): forms.SMALL_QUICK,
        (True, False): forms.LARGE,
        (True, True): forms.LARGE_QUICK,
    }[options.large, options.quick]
    settings = replace(form.settings, device=options.device) if options.large else form.settings
    results = options.results or form.results
    torch.set_flush_denormal(True)  # of the whole process, so not in what tests call
    clock = Clock(options.minutes, started)
    run(form.plan(), settings, results, BUILD, options.model, clock)
    if not options.large and not open_cells(form.plan(), results):
        check_teacher(settings, results, BUILD, options.model)


def take_device(device: str, large: bool) -> None:
    """Raises SystemExit where there is no such device, before anything is done."""
    if device == CPU:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # qtarget eval takes a card where there is one
        return
    if not large:
        raise SystemExit(
            "--device cuda is for --large: the small form's results are a CPU's, and devices are not mixed"
        )
    import torch

    if not torch.cuda.is_available():
        raise SystemExit(
            f"--device cuda: torch {torch.__version__} finds no CUDA device here; run it on a machine with one, or leave "
            "--device off for the CPU"
        )


class Clock:
    """Tells whether there is time for more, from how long the same kinds of work took in this piece.

    Args:
        minutes: of a piece; None: there is always time. started: when it began, by ``time.monotonic``.
    """

    def __init__(self, minutes: float | None = None, started: float | None = None):
        begun = time.monotonic() if started is None else started
        self.end = None if minutes is None else begun + 60 * minutes
        self.longest: dict[str, float] = {}

    def took(self, kind: str, seconds: float) -> None:
        self.longest[kind] = max(seconds, self.longest.get(kind, 0.0))

    def allows(self, *kinds: str) -> bool:
        """The first is always allowed; what was not done in this piece is taken to last as long as the longest was."""
        if self.end is None or not self.longest:
            return True
        unknown = max(self.longest.values())
        return time.monotonic() + sum(self.longest.get(kind, unknown) for kind in kinds) <= self.end


def run(
    cells: list[Cell], settings: Settings, results: Path, scratch: Path, model: Path = MODEL, clock: Clock | None = None
) -> int:
    """Run what is missing, as long as there is time. Returns how many cells were run.

    Raises:
        SystemExit: a finished cell was run with other settings.
    """
    clock, ran = clock or Clock(), 0
    for file in [*(results / f"{cell.name}.json" for cell in cells), *sorted(results.glob("teacher_seed*.json"))]:
        if file.is_file():
            record.check_same(file, settings)
    record.machine(settings)  # a package that is missing is not found out after the first cell
    for number, cell in enumerate(cells, start=1):
        file = results / f"{cell.name}.json"
        if file.is_file():
            print(f"{cell.name}: finished before", flush=True)
            continue
        is_taught = settings.teachers.get(cell.arm) == TRAINED
        teacher, on_record = scratch / "teachers" / f"seed{cell.seed}", results / f"teacher_seed{cell.seed}.json"
        lacks = is_taught and not is_made(teacher, on_record)
        if not clock.allows(cell.arm, *(["teacher"] if lacks else [])):
            break
        print(f"\n== {cell.name}, {number} of {len(cells)}", flush=True)
        if lacks:
            clock.took("teacher", make_teacher(cell.seed, settings, teacher, on_record, model))
        work = scratch / "work" / cell.name
        shutil.rmtree(work, ignore_errors=True)
        made = one(cell, settings, work, model, teacher if is_taught else None)
        record.write(file, made)
        shutil.rmtree(work)  # 540 MB of weights
        ran += 1
        clock.took(cell.arm, made["seconds"])
        print(
            f"{cell.name}: {made['seconds']:.0f} s, {made['scores']['strict']['avg']:.3f} of samples right", flush=True
        )
        gc.collect()
    if left := open_cells(cells, results):
        print(f"\ncells run in this piece: {ran}, left: {left}; the same command goes on", flush=True)
    return ran


def open_cells(cells: list[Cell], results: Path) -> int:
    return sum(not (results / f"{cell.name}.json").is_file() for cell in cells)


# -- one cell ------------------------------------------------------------------------------------------------------


def one(cell: Cell, settings: Settings, work: Path, model: Path, teacher: Path | None = None) -> dict[str, Any]:
    """Train, test, and keep what a reader needs; the weights are not kept. teacher: one that was trained."""
    started = time.monotonic()
    made: dict[str, Any] = {**cell._asdict(), "settings": record.shared_settings(settings)}
    tested = model
    if cell.arm != BASE:
        write_data(cell, settings, work / "data")
        qtarget(*train_words(cell, settings, work, model, teacher))
        made["training"] = record.training_figures(work / "model")
        tested = work / "model"
    if teacher is not None:
        made["teacher"] = {"weights": json.loads((teacher / TEACHER).read_text())["weights"]}
    made["train_seconds"] = time.monotonic() - started
    sums = work / f"{TASK}.jsonl"
    problems.write_lines(sums, problems.test_problems(settings.problems, settings.sums))
    qtarget(*eval_words(settings, tested, sums, work / "eval"))
    figures = record.tested_figures(work / "eval")
    made |= {**figures, "seconds": time.monotonic() - started, "machine": record.machine(settings)}
    return made


def write_data(cell: Cell, settings: Settings, folder: Path) -> None:
    noise = settings.noise if cell.condition == NOISY else 0.0
    tested = problems.tested_keys(settings.problems, settings.sums)
    rows = problems.train_rows(settings.rows, cell.seed, noise, tested, settings.sums)
    problems.write_lines(folder / "train.jsonl", rows)
    write_held_out(settings, folder)


def write_held_out(settings: Settings, folder: Path) -> None:
    rows = problems.held_out_rows(settings.held_out, settings.problems, settings.sums)
    problems.write_lines(folder / "test.jsonl", rows)


def train_words(cell: Cell, settings: Settings, work: Path, model: Path, teacher: Path | None = None) -> list[object]:
    words: list[object] = ["train", "--config", HERE / "train.yaml", "--model_name_or_path", model]
    words += ["--dataset_name", work / "data", "--output_dir", work / "model"]
    words += ["--target", cell.target, "--seed", cell.seed]
    for name, value in settings.training().items():
        words += [f"--{name}", json.dumps(value)]
    if settings.teachers.get(cell.arm) == READS:
        words += ["--teacher_model_name_or_path", model]
        words += ["--teacher_context", json.dumps({"prompt": settings.context}), "--teacher_check_rows", 0]
    elif teacher is not None:
        words += ["--teacher_model_name_or_path", teacher, "--teacher_check_rows", 0]
    return words


def eval_words(settings: Settings, model: Path, tasks: Path, out: Path) -> list[object]:
    words: list[object] = ["eval", "--model", model, "--tasks", tasks, "--verifier", settings.verifier]
    words += ["--n", settings.n, "--temperature", 1, "--max_new_tokens", settings.max_new_tokens]
    words += ["--seed", settings.eval_seed, "--batch_size", settings.answers_at_once]
    words += ["--dtype", "bfloat16"] if settings.device == CUDA else []
    return [*words, "--verifier_processes", 1, "-o", out]


def qtarget(*words: object) -> None:
    from qtarget.cli.__main__ import main as program

    print("$ qtarget " + " ".join(map(str, words)), flush=True)
    if status := program([str(word) for word in words]):
        raise SystemExit(status)


# -- teachers ------------------------------------------------------------------------------------------------------


def is_made(teacher: Path, on_record: Path) -> bool:
    """Whether a trained teacher is here, and the one on record."""
    own = teacher / TEACHER
    return own.is_file() and on_record.is_file() and own.read_bytes() == on_record.read_bytes()


def make_teacher(seed: int, settings: Settings, folder: Path, on_record: Path, model: Path) -> float:
    """Train the model on right demonstrations of problems that no student of this seed has. Returns the seconds.

    Its figures go on record first: a teacher without them is made again.
    """
    from qtarget.teachers.fingerprints import weights_hash

    started = time.monotonic()
    print(f"a teacher for seed {seed}", flush=True)
    work = folder.with_name(f"{folder.name}.unfinished")
    for old in (work, folder):
        shutil.rmtree(old, ignore_errors=True)
    tested = problems.tested_keys(settings.problems, settings.sums)
    rows = problems.teacher_rows(settings.teacher_rows, seed, settings.rows, tested, settings.sums)
    problems.write_lines(work / "data" / "train.jsonl", rows)
    write_held_out(settings, work / "data")
    qtarget(*train_words(Cell(seed, CLEAN, SFT), settings, work, model))
    made = {
        "seed": seed,
        "settings": record.shared_settings(settings),
        "training": record.training_figures(work / "model"),
        "weights": weights_hash(str(work / "model")),
        "seconds": time.monotonic() - started,
        "machine": record.machine(settings),
    }
    record.write_figures(on_record, made)
    shutil.copy(on_record, work / "model" / TEACHER)
    (work / "model").rename(folder)
    shutil.rmtree(work)
    gc.collect()
    return made["seconds"]


def check_teacher(settings: Settings, results: Path, scratch: Path, model: Path = MODEL) -> None:
    """``qtarget teacher check`` of the first seed's demonstrations, a file a condition."""
    for condition in CONDITIONS:
        file = results / f"teacher_{condition}.json"
        if file.is_file():
            record.check_same(file, settings)
            continue
        cell, work = Cell(1, condition, KD), scratch / "work" / f"teacher_{condition}"
        shutil.rmtree(work, ignore_errors=True)
        write_data(cell, settings, work / "data")
        _, *words = train_words(cell, settings, work, model)
        qtarget("teacher", "check", *words, "--rows", settings.rows, "--json", work / "check.json")
        made = {"settings": record.shared_settings(settings), "check": json.loads((work / "check.json").read_text())}
        record.write_figures(file, {**made, "machine": record.machine(settings)})
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
