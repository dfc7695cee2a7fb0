"""The controlled study: when designed targets help, and when they don't. Run it with ``make study``.

    python benchmarks/study/run.py             # everything that is not on record yet; stop and start at will
    python benchmarks/study/run.py --quick     # a small form that shows it works, into build/study-quick
    python benchmarks/study/run.py --status    # how much is done
    STUDY_ARMS="asft kd+jsd" python benchmarks/study/run.py --quick    # with further presets, or a divergence of one

Two plans, one after the other: one thing changed at a time around a centre, and a grid of bases and teachers. In each the
dev seeds train arms at several learning rates, and each arm keeps the one with the best dev score: at the centre for all
cells of the first plan, in each cell of the grid. Then each seed, which redoes everything (bases, teachers,
demonstrations), trains all arms in all cells. A finished run is a line of a file in benchmarks/results/study; models are
kept in build/study and made again where they are missing.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several times faster than two threads on models this small
import arms
import cells
import records
import torch
import training
from cells import Run
from records import Record

ROOT = Path(__file__).resolve().parents[2]
RESULTS, BUILD, QUICK_BUILD = ROOT / "benchmarks/results/study", ROOT / "build/study", ROOT / "build/study-quick"


def machine() -> dict[str, str]:
    """As results have it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    processor = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor())
    return {"processor": processor, "torch": torch.__version__}


def alone() -> None:
    """This process computes as the study's do."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def _make_models(task: tuple[Record, int, Path]) -> str:
    record, seed, build = task
    alone()
    records.write(record.models(seed), training.models_of(record.plan, seed, build) | {"machine": machine()})
    return f"seed {seed}"


def _train(task: tuple[Record, str, list[Run], Path]) -> str:
    """Runs of one cell and seed, which share a good deal, one after the other."""
    record, kind, runs, build = task
    alone()
    measure = {"dev": training.tried, "test": training.finished}[kind]
    for run in runs:
        record.add(kind, run, measure(record.plan.settings, run, build) | {"machine": machine()})
    return f"{runs[0].cell}, seed {runs[0].seed}: {len(runs)}"


def perform(record: Record, build: Path, pool: Any, ends: float) -> bool:
    """Do what is not on record, in order. False where the time ended it before it was done."""
    plan = record.plan
    settings = plan.settings

    def do(work: Any, tasks: list[Any], label: str) -> bool:
        print(f"{plan.name}, {label} on record", flush=True)
        for number, name in enumerate(pool.imap_unordered(work, tasks), 1):
            print(f"  {number}/{len(tasks)}  {name}", flush=True)
            if time.monotonic() > ends:
                return False
        return True

    def train(kind: str, runs: list[Run], label: str) -> bool:
        there = record.finished(kind, runs)
        groups: dict[tuple[str, int], list[Run]] = {}
        for run in runs:
            if run not in there:
                groups.setdefault((run.cell, run.seed), []).append(run)
        tasks = [(record, kind, group, build) for group in groups.values()]
        return do(_train, tasks, f"{label}: {len(there)} of {len(runs)}")

    for seeds, label in ((settings.dev_seeds, "models of the dev seeds"), (settings.seeds, "models of the seeds")):
        missing = [seed for seed in seeds if records.read(record.models(seed), settings) is None]
        tasks = [(record, seed, build) for seed in missing]
        if not do(_make_models, tasks, f"{label}: {len(seeds) - len(tasks)} of {len(seeds)}"):
            return False
    while wanted := record.rates_to_try():
        if not train("dev", plan.dev_runs(wanted), "learning rates"):
            return False
    chosen = record.rates()
    return all(train("test", plan.test_runs(chosen, [seed]), f"seed {seed}") for seed in settings.seeds)


def status(record: Record) -> str:
    if missing := record.rates_to_try():
        return f"{record.plan.name}: {len(missing)} learning rates to try, before more are known"
    runs = record.plan.test_runs(record.rates())
    return f"{record.plan.name}: {len(record.finished('test', runs))} of {len(runs)} runs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small form, into build/study-quick")
    parser.add_argument("--processes", type=int, default=2, help="side by side, one thread each (default 2)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after what is under way then")
    parser.add_argument("--status", action="store_true", help="say how much is done, and do nothing")
    parser.add_argument("--build", type=Path, default=QUICK_BUILD, help="folder of the quick form")
    args = parser.parse_args()
    if arms.FURTHER and not args.quick:
        parser.error(
            f"STUDY_ARMS is {' '.join(arms.FURTHER)!r}; further arms are for --quick, the study has its fifteen"
        )
    results, build = (args.build / "results", args.build / "models") if args.quick else (RESULTS, BUILD)
    plans = [Record(plan, results / plan.name) for plan in cells.plans(args.quick)]
    if args.status:
        print("\n".join(map(status, plans)))
        return
    ends = time.monotonic() + args.minutes * 60
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        whole = all(perform(record, build, pool, ends) for record in plans)
    print("finished" if whole else "stopped; the same command goes on")


if __name__ == "__main__":
    main()
