"""The controlled study: when designed targets help, and when they don't. Run it with ``make study``.

    python benchmarks/study/run.py             # everything that is not on record yet; stop and start at will
    python benchmarks/study/run.py --quick     # a small form that shows it works, into build/study-quick
    python benchmarks/study/run.py --status    # how much is done
    STUDY_ARMS="asft kd+jsd" python benchmarks/study/run.py --quick    # with further presets, or a divergence of one

First the dev seeds train every arm at the centre at three learning rates; each arm keeps the one with the best dev score.
Then each seed, which redoes everything (bases, teachers, demonstrations), trains all arms in all cells. A finished run is
one small file in benchmarks/results/study; models are kept in build/study and made again where they are missing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several times faster than two threads on models this small
import arms
import torch
import training
from arms import Run
from settings import FULL, QUICK, Settings

ROOT = Path(__file__).resolve().parents[2]
RESULTS, BUILD, QUICK_BUILD = ROOT / "benchmarks/results/study", ROOT / "build/study", ROOT / "build/study-quick"


def write(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(_rounded(content), separators=(",", ":")) + "\n")
    part.replace(path)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def read(path: Path, settings: Settings) -> dict[str, Any] | None:
    """A result on record; one of other settings stops the study, which would otherwise mix two."""
    if not path.exists():
        return None
    content = json.loads(path.read_text())
    ours = json.loads(json.dumps(settings.record()))
    if content["settings"] != ours:
        name = next(k for k in ours if content["settings"].get(k) != ours[k])
        sys.exit(f"{path} was made with {name} {content['settings'].get(name)}, now {ours[name]}; move its folder away")
    return content


def _work(task: tuple[Settings, Run | int, Path, Path]) -> str:
    settings, what, path, build = task
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    content = (
        training.models_of(settings, what, build) if isinstance(what, int) else training.finished(settings, what, build)
    )
    machine = {"processor": _processor(), "torch": torch.__version__}
    write(path, content | {"machine": machine})
    return str(path.name if isinstance(what, int) else what.file)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor())


def perform(settings: Settings, results: Path, build: Path, processes: int, limit_s: float = float("inf")) -> bool:
    """Do what is not on record, in order. False where the time limit ended it before it was done."""
    start = time.monotonic()
    seeds = [*settings.dev_seeds, *settings.seeds]

    def do(pool: Any, wanted: list[tuple[Run | int, Path]], label: str) -> bool:
        open_ = [(settings, what, path, build) for what, path in wanted if read(path, settings) is None]
        print(f"{label}: {len(wanted) - len(open_)} of {len(wanted)} on record", flush=True)
        for number, name in enumerate(pool.imap_unordered(_work, open_), 1):
            spent = time.monotonic() - start
            print(f"  {number}/{len(open_)}  {name}  {spent:.0f} s", flush=True)
            if spent > limit_s:
                return False
        return True

    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        named: list[tuple[Run | int, Path]] = [(seed, results / f"models/seed-{seed}.json") for seed in seeds]
        dev = [(run, results / "dev" / run.file) for run in arms.dev_runs(settings.dev_seeds, settings.rates)]
        parts = [(named[: len(settings.dev_seeds)], "models of the dev seeds"), (dev, "learning rates")]
        for wanted, label in parts:
            if not do(pool, wanted, label):
                return False
        rates = chosen(settings, results)
        runs = arms.test_runs(settings.seeds, rates)
        if not do(pool, named[len(settings.dev_seeds) :], "models of the seeds"):
            return False
        for seed in settings.seeds:
            mine = [(run, results / "test" / run.file) for run in runs if run.seed == seed]
            if not do(pool, mine, f"seed {seed}"):
                return False
    return True


def chosen(settings: Settings, results: Path) -> dict[str, float]:
    """The rate of each arm, from the dev runs on record."""
    scores: dict[tuple[str, float], list[float]] = {}
    for run in arms.dev_runs(settings.dev_seeds, settings.rates):
        content = read(results / "dev" / run.file, settings)
        if content is not None:
            scores.setdefault((run.arm, run.rate), []).append(content["dev"]["1.0"])
    return arms.chosen_rates(scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small form, into build/study-quick")
    parser.add_argument("--processes", type=int, default=2, help="side by side, one thread each (default 2)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after the run that is under way then")
    parser.add_argument("--status", action="store_true", help="say how much is done, and do nothing")
    parser.add_argument("--build", type=Path, default=QUICK_BUILD, help="folder of the quick form")
    args = parser.parse_args()
    if arms.FURTHER and not args.quick:
        parser.error(
            f"STUDY_ARMS is {' '.join(arms.FURTHER)!r}; further arms are for --quick, the study has its fifteen"
        )
    settings = QUICK if args.quick else FULL
    results, build = (args.build / "results", args.build / "models") if args.quick else (RESULTS, BUILD)
    if args.status:
        dev = arms.dev_runs(settings.dev_seeds, settings.rates)
        done = sum((results / "dev" / run.file).exists() for run in dev)
        print(f"learning rates: {done} of {len(dev)}")
        if done == len(dev):
            runs = arms.test_runs(settings.seeds, chosen(settings, results))
            print(f"runs: {sum((results / 'test' / run.file).exists() for run in runs)} of {len(runs)}")
        return
    whole = perform(settings, results, build, args.processes, args.minutes * 60)
    print("finished" if whole else "stopped; the same command goes on")


if __name__ == "__main__":
    main()
