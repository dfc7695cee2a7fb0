"""The controlled study: when designed targets help, and when they don't. Run it with ``make study``.

    python benchmarks/study/run.py             # everything that is not on record yet; stop and start at will
    python benchmarks/study/run.py --quick     # a small form that shows it works, into build/study-quick
    python benchmarks/study/run.py --status    # how much is done
    STUDY_ARMS="asft kd+jsd" python benchmarks/study/run.py --quick    # with further presets, or a divergence of one

Two plans, one after the other: one thing changed at a time around a centre, and a grid of bases and teachers. In each the
dev seeds train arms at several learning rates, and each arm keeps the one with the best dev score: at the centre for all
cells of the first plan, in each cell of the grid. Then each seed, which redoes everything (bases, teachers,
demonstrations), trains all arms in all cells. A finished run is one line of a file in benchmarks/results/study; models are
kept in build/study and made again where they are missing.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several times faster than two threads on models this small
import arms
import rates
import records
import torch
import training
from cells import Plan, Run, plans
from settings import Settings

ROOT = Path(__file__).resolve().parents[2]
RESULTS, BUILD, QUICK_BUILD = ROOT / "benchmarks/results/study", ROOT / "build/study", ROOT / "build/study-quick"


def _machine() -> dict[str, str]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    processor = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor())
    return {"processor": processor, "torch": torch.__version__}


def _alone() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def _make_models(task: tuple[Plan, int, Path, Path]) -> str:
    plan, seed, path, build = task
    _alone()
    records.write(path, training.models_of(plan, seed, build) | {"machine": _machine()})
    return path.stem


def _train(task: tuple[Settings, list[Run], Path, Path]) -> str:
    """Runs of one cell and seed, which share a good deal, one after the other."""
    settings, runs, folder, build = task
    _alone()
    measure = training.tried if folder.name == "dev" else training.finished
    for run in runs:
        records.add(folder, run, settings, measure(settings, run, build) | {"machine": _machine()})
    return f"{runs[0].cell}, seed {runs[0].seed}: {len(runs)}"


class Study:
    """A plan's results in ``folder``, and what is done about those that are missing."""

    def __init__(self, plan: Plan, folder: Path, build: Path):
        self.plan, self.folder, self.build = plan, folder / plan.name, build

    def perform(self, pool: Any, ends: float) -> bool:
        """Do what is not on record, in order. False where the time ended it before it was done."""
        settings = self.plan.settings
        for seeds, label in ((settings.dev_seeds, "models of the dev seeds"), (settings.seeds, "models of the seeds")):
            paths = {seed: self.folder / f"models/seed-{seed}.json" for seed in seeds}
            tasks = [(self.plan, s, p, self.build) for s, p in paths.items() if records.read(p, settings) is None]
            if not self._do(pool, _make_models, tasks, f"{label}: {len(seeds) - len(tasks)} of {len(seeds)}", ends):
                return False
        while wanted := self.rates_to_try():
            if not self._runs(pool, "dev", self.plan.dev_runs(wanted), "learning rates", ends):
                return False
        for seed in settings.seeds:
            if not self._runs(pool, "test", self.plan.test_runs(self.rates(), [seed]), f"seed {seed}", ends):
                return False
        return True

    def _runs(self, pool: Any, kind: str, runs: list[Run], label: str, ends: float) -> bool:
        settings, folder = self.plan.settings, self.folder / kind
        there = records.finished(folder, runs, settings)
        groups: dict[tuple[str, int], list[Run]] = {}
        for run in runs:
            if run not in there:
                groups.setdefault((run.cell, run.seed), []).append(run)
        tasks = [(settings, group, folder, self.build) for group in groups.values()]
        return self._do(pool, _train, tasks, f"{label}: {len(there)} of {len(runs)}", ends)

    def _do(self, pool: Any, work: Any, tasks: list[Any], label: str, ends: float) -> bool:
        print(f"{self.plan.name}, {label} on record", flush=True)
        for number, name in enumerate(pool.imap_unordered(work, tasks), 1):
            print(f"  {number}/{len(tasks)}  {name}", flush=True)
            if time.monotonic() > ends:
                return False
        return True

    # -- learning rates --------------------------------------------------------------------------------------------

    def scores(self) -> dict[tuple[str, str], dict[float, list[float]]]:
        """{(cell, arm): {rate: dev scores}} of the rates that every dev seed has on record."""
        plan = self.plan
        tried = [(*pair, rate) for pair in plan.tuned for rate in sorted({*plan.settings.rates, *rates.LADDER})]
        there = records.finished(self.folder / "dev", plan.dev_runs(tried), plan.settings)
        found: dict[tuple[str, str], dict[float, list[float]]] = {}
        for cell, arm, rate in tried:
            contents = [there[run] for run in plan.dev_runs([(cell, arm, rate)]) if run in there]
            if len(contents) == len(plan.settings.dev_seeds):
                found.setdefault((cell, arm), {})[rate] = [content["dev"]["1.0"] for content in contents]
        return found

    def rates_to_try(self) -> list[tuple[str, str, float]]:
        """(cell, arm, rate) that are not on record and are wanted now."""
        there, wanted = self.scores(), []
        for pair in self.plan.tuned:
            scores = there.get(pair, {})
            missing = [rate for rate in self.plan.settings.rates if rate not in scores]
            if not missing and self.plan.settings.widen and (further := rates.next_of(scores)) is not None:
                missing = [further]
            wanted += [(*pair, rate) for rate in missing]
        return wanted

    def rates(self) -> dict[tuple[str, str], float]:
        """{(cell, arm): rate}, once nothing is left to try."""
        return {pair: rates.best(scores) for pair, scores in self.scores().items()}

    def status(self) -> Iterable[str]:
        missing = self.rates_to_try()
        yield f"{self.plan.name}: " + (f"{len(missing)} learning rates to try" if missing else "all rates are chosen")
        if not missing:
            runs = self.plan.test_runs(self.rates())
            there = records.finished(self.folder / "test", runs, self.plan.settings)
            yield f"{self.plan.name}: {len(there)} of {len(runs)} runs"


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
    studies = [Study(plan, results, build) for plan in plans(args.quick)]
    if args.status:
        print("\n".join(line for study in studies for line in study.status()))
        return
    ends = time.monotonic() + args.minutes * 60
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        whole = all(study.perform(pool, ends) for study in studies)
    print("finished" if whole else "stopped; the same command goes on")


if __name__ == "__main__":
    main()
