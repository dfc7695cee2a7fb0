"""A minute's proof: sft, dft and target-sft on demonstrations of which 15 % are wrong, from nothing.

    python recipes/noise_demo.py                        # one seed; curves in build/noise-demo/curves.png and here
    python recipes/noise_demo.py --seeds 5 --record     # five seeds, on record, with the picture of docs/first-run.md

Task, base, training loop and learning rates are those of the controlled study (benchmarks/study, docs/study.md): three
operations modulo 10, and a base that is pre-trained until 60 % of its samples are right. Two things differ. The study
counts wrong steps, where 15 % here are demonstrations with a wrong step. And the teacher is a cheaper one: the base,
trained on with clean solutions.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks" / "study"))
import cells
import chains
import models
import numpy as np
import records
import run as study
import torch
import training
from cells import DEMO, Run
from page import pictures
from settings import DEMO as FULL
from settings import QUICK_DEMO as QUICK
from settings import Settings

from qtarget.cli import terminal
from qtarget.evaluation import scores

RECORD, PICTURE = study.ROOT / "benchmarks/results/noise_demo.json", study.ROOT / "docs/assets/noise_demo.svg"
POINTS = 10  # of a curve, after its start
NOT_SHOWN = """\
Not shown: what a model that you would use gains. This one has 0.1 million parameters, and the task is
arithmetic. Each arm has the learning rate that the study chose for it, on other seeds and on problems
that are not tested here. target-sft has help that the others lack: its teacher has seen clean solutions.
Accuracy is that of samples at temperature 1. Where the greedy column shows no gain over the base, a lower
temperature gives much the same without training."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="seeds 1 to this, one after the other")
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.name} and {PICTURE.name}")
    parser.add_argument("--quick", action="store_true", help="a few steps of a tiny model: it works, and shows nothing")
    parser.add_argument("--out", type=Path, default=Path("build/noise-demo"), help="folder of the curves")
    args = parser.parse_args()
    if args.record and args.quick:
        parser.error("--record is for the full form; leave out --quick")
    settings = QUICK if args.quick else FULL
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    models.LOG.setLevel(logging.INFO)
    study.alone()
    # two processes take longer to start than the quick form does
    with ThreadPool(1) if args.quick else multiprocessing.get_context("spawn").Pool(2) as pool:
        made = {
            "machine": study.machine() | {"cores": os.cpu_count()},
            "versions": {"python": platform.python_version(), "transformers": version("transformers")},
            "settings": settings.record(),
            "wrong_steps": DEMO.noise,
            "rates": published_rates(),
            "seeds": [one_seed(settings, seed, pool) for seed in range(1, args.seeds + 1)],
        }
    report(made)
    args.out.mkdir(parents=True, exist_ok=True)
    records.write(args.out / "results.json", made, lines_of="seeds")
    pictures.save(curves(made), args.out / "curves.png")
    print(f"\nThe curves as a picture: {args.out / 'curves.png'}")
    if args.record:
        records.write(RECORD, made, lines_of="seeds")
        pictures.save(curves(json.loads(RECORD.read_text(encoding="utf-8"))), PICTURE)


def published_rates() -> dict[str, float]:
    """{arm: learning rate} of the study's centre, as its page has them."""
    plan, _ = cells.plans(quick=False)
    rates = records.Record(plan, study.RESULTS / plan.name).rates()
    return {arm: rates[DEMO.rates_from, arm] for arm in DEMO.arms}


# -- making --------------------------------------------------------------------------------------------------------


def one_seed(settings: Settings, seed: int, pool: Any) -> dict[str, Any]:
    """Models, demonstrations and the three arms of a seed; of each arm its curve and its verdicts."""
    start, cpu = time.perf_counter(), time.thread_time()
    rates = published_rates()
    pairs = cells.demonstrations(DEMO, seed, settings.steps * settings.batch, settings.lengths)
    wrong = [pair for pair in pairs if chains.NOISY in pair[1].kinds]
    print(f"seed {seed}: {len(pairs):,} demonstrations, {len(wrong):,} of them wrong ({len(wrong) / len(pairs):.1%})")
    print(f"  a wrong one: {written(*wrong[0])}, right is #{wrong[0][0].answer}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(f"base: pre-trained until {settings.strong_at:.0%} of its samples are right", flush=True)
        base = measured(settings, models.made(settings, seed, DEMO.base, folder), seed)
        clean = settings.continued_steps * settings.pretraining_batch
        print(f"teacher of target-sft: the base, trained on with {clean:,} clean solutions", flush=True)
        teacher = measured(settings, models.made(settings, seed, DEMO.teacher, folder), seed)
        print(
            f"base {avg(settings, base):.0%} right, teacher {avg(settings, teacher):.0%}; now the arms, two at a time"
        )
        # the longest first
        tasks = [(settings, Run(seed, DEMO.name, arm, rates[arm]), folder) for arm in reversed(DEMO.arms)]
        trained = dict(pool.imap_unordered(train, tasks))
    for one in trained.values():
        one["curve"].insert(0, [0, avg(settings, base)])
    return {
        "seed": seed,
        "demonstrations": len(pairs),
        "wrong": len(wrong),
        "seconds": time.perf_counter() - start,
        "core_seconds": time.thread_time() - cpu + sum(one.pop("core_seconds") for one in trained.values()),
        "base": base,
        "teacher": teacher,
        "arms": {arm: trained[arm] for arm in DEMO.arms},
    }


def train(task: tuple[Settings, Run, Path]) -> tuple[str, dict[str, Any]]:
    """Trains an arm, by the study's loop, and measures it on the test problems along the way."""
    settings, run, folder = task
    study.alone()
    cpu, curve, last = time.thread_time(), [], {}

    def watch(step: int, student: models.Model) -> None:
        if step % max(1, settings.steps // POINTS) and step < settings.steps:
            return
        last.update(measured(settings, student.eval(), run.seed, greedy=step == settings.steps))
        student.train()
        curve.append([step, avg(settings, last)])
        print(f"{run.arm:<12} step {step:>3}/{settings.steps}  {curve[-1][1]:4.0%} right", flush=True)

    training.train(settings, run, folder, watch)
    return run.arm, {"curve": curve, **last, "core_seconds": time.thread_time() - cpu}


def measured(settings: Settings, model: models.Model, seed: int, greedy: bool = True) -> dict[str, list[int]]:
    """Verdicts on the test problems, as the study stores them: a number a problem, whose bits are its samples."""
    test = chains.problems("test", settings.test_problems, settings.lengths)
    with torch.no_grad():
        right = training.bits(models.verdicts(model, test, settings.dev_samples, 1.0, f"test {seed}"))
        return {
            "right": right,
            **({"greedy": training.bits(models.verdicts(model, test, 1, 0.0, ""))} if greedy else {}),
        }


def avg(settings: Settings, found: dict[str, list[int]]) -> float:
    return sum(value.bit_count() for value in found["right"]) / len(found["right"]) / settings.dev_samples


def written(asked: chains.Problem, solution: chains.Solution) -> str:
    return "".join(chains.TOKENS[i] for i in [*asked.prompt, *solution.ids[:-1]])


# -- showing -------------------------------------------------------------------------------------------------------


def shares(made: dict[str, Any], name: str, key: str = "right") -> np.ndarray:
    """[seeds, problems]: the share of right samples. name: of an arm, or ``base`` or ``teacher``."""
    n = made["settings"]["dev_samples"] if key == "right" else 1
    found = [seed["arms"].get(name) or seed[name] for seed in made["seeds"]]
    return np.array([[value.bit_count() / n for value in one[key]] for one in found])


def estimate(values: np.ndarray, difference: bool = False) -> tuple[float, float, float]:
    """Mean and 95 % interval, in percent: over problems, and over seeds where there are several."""
    draws = scores.with_unseen(scores.one_level(values), values.shape[1], difference)
    low, high = scores.interval(draws)
    return 100 * float(values.mean()), 100 * low, 100 * high


def report(made: dict[str, Any]) -> None:
    """The curves in characters, the table, and what they show."""
    steps, rates = made["settings"]["steps"], made["rates"]
    columns = np.linspace(0, steps, 61)
    print("\nright samples at temperature 1, %\n")
    drawn = {arm: np.interp(columns, *mean_curve(made, arm)) for arm in rates}
    print(terminal.plot(drawn, f"share of the {steps} steps"))
    table = terminal.table("", "learning rate", "right, %", "95 %", "minus sft, 95 %", "greedy, %", left=("",))
    sft, above = shares(made, "sft"), []
    for name in ("base", "teacher", *rates):
        value, low, high = estimate(shares(made, name))
        row = [f"{rates[name]:g}" if name in rates else "", f"{value:.1f}", f"[{low:.1f}, {high:.1f}]", ""]
        if name in rates and name != "sft":
            value, low, high = estimate(shares(made, name) - sft, difference=True)
            row[-1] = f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"
            above += [name] if low > 0 else []
        table.add_row(name, *row, f"{100 * shares(made, name, 'greedy').mean():.1f}")
    print()
    terminal.console(100).print(table)
    seeds, problems = sft.shape
    over = "problems" if seeds == 1 else f"{seeds} seeds and problems"
    print(f"\n{problems} test problems, {made['settings']['dev_samples']} samples each; bootstrap over {over}.")
    print(f"Shown: where 15 % of the demonstrations are wrong, {' and '.join(above) or 'no arm'} ended above sft.")
    print(order(made) if seeds > 1 else "Another seed may give another size: docs/first-run.md has five.")
    print(NOT_SHOWN)


def order(made: dict[str, Any]) -> str:
    """In how many seeds which arm is ahead."""
    mean = {arm: shares(made, arm).mean(1) for arm in made["rates"]}
    pairs = (("dft", "sft"), ("target-sft", "sft"), ("dft", "target-sft"))
    held = [f"{a} above {b} in {int((mean[a] > mean[b]).sum())} of {len(mean[a])}" for a, b in pairs]
    return f"By seeds: {', '.join(held)}."


def mean_curve(made: dict[str, Any], arm: str) -> np.ndarray:
    """[2, points]: steps, and percent right, the mean over seeds."""
    mean = np.mean([seed["arms"][arm]["curve"] for seed in made["seeds"]], 0)
    return mean.T * [[1], [100]]


def curves(made: dict[str, Any]) -> Any:
    """The mean over seeds, and each seed as a thin line where there are several."""
    seeds = made["seeds"]
    figure, axis = pictures.pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    for arm in made["rates"]:
        for seed in seeds if len(seeds) > 1 else ():
            steps, right = zip(*seed["arms"][arm]["curve"], strict=True)
            axis.plot(steps, [100 * value for value in right], color=pictures.COLOURS[arm], lw=0.7, alpha=0.35)
        axis.plot(*mean_curve(made, arm), color=pictures.COLOURS[arm], lw=2, marker="o", markersize=3, label=arm)
    drawn = f"; {len(seeds)} seeds and their mean" if len(seeds) > 1 else ""
    axis.set_title(f"15 % of the demonstrations are wrong{drawn}", fontsize=10)
    axis.set_xlabel("steps")
    axis.set_ylabel("right samples at temperature 1, %")
    axis.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    main()
