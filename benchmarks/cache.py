"""A cached teacher: what it costs in time and on disk, and what its k tokens leave out.

    python benchmarks/cache.py                  # all four parts, writes benchmarks/results/cache.json
    python benchmarks/cache.py --quick          # a small form that shows it works, writes build/cache_bench/quick.json
    python benchmarks/cache.py --parts step     # one part; the others stay as they are on record
    python benchmarks/cache.py --table          # the tables of docs/teachers.md from what is on record

engine: forward and backward with the teacher as its 64 likeliest tokens (int32 ids, float16 log-probabilities, mass of
the rest) over the three matmuls that no method can do without; dft, which has no teacher, beside it. All methods in turn
in one process; the figure is the median of the ratios within a round, as in engine.py.
step: a training step of SmolLM2-135M-Instruct, reading its batch included, over the same step with plain sft, on the
demo's problems; target-sft from caches of several k and with the live teacher. Otherwise as in train_step.py. Without
packing: on a CPU there is no attention for which TRL packs without a warning.
disk: bytes of caches of the same rows, against the formula k (4 + itemsize) + 4 a token.
error: what a cache does to targets (``qtarget cache doctor``), and which k a share of the mass asks for (``qtarget cache
build --coverage``), on the demo's problems.

The teacher is the model after two steps of plain sft at 1e-4, as in make lens-demo; the student is the model itself. It
is asked once about each row for all caches: a cache of fewer tokens is cut from the answer for the largest.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from datasets import Dataset
from engine import VOCAB, Inputs, bare_matmuls, machine, timed
from torch import Tensor
from train_step import MODEL, ROOT, load, prepare, step

import qtarget as qt
from qtarget import QTargetConfig, QTargetTrainer
from qtarget.cli import setup
from qtarget.teachers.cache import build as cache_build
from qtarget.teachers.cache import doctor as cache_doctor
from qtarget.teachers.cache import scorers as cache_scorers
from qtarget.teachers.cache.reader import INDEX, CachedTeacher
from qtarget.training.preparing import RowsTrainer

PARTS = ("engine", "step", "disk", "error")
ENGINE_K = 64
ENGINE_TARGETS = ("dft", "kd", "kd-hybrid", "target-sft")
STEP_KS, ERROR_KS = (16, 64, 256), (4, 16, 64, 256)
COVERAGES = (0.9, 0.99, 0.995)
SFT, LIVE = "sft", "target-sft, live teacher"
LIMITS = {"kd": 1.10, "target-sft": 1.10}
STEP_LIMITS = {"target-sft, k = 64": 1.10}
TEACHER_STEPS = 2
RESULTS = Path(__file__).parent / "results" / "cache.json"
SCRATCH = ROOT / "build" / "cache_bench"

Kept = tuple[np.ndarray, np.ndarray, np.ndarray]


# -- engine ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def likeliest(x: Inputs, k: int) -> qt.TopK:
    """The teacher of these inputs as a cache would hold it."""
    ids, logprobs, tails = [], [], []
    for hidden in x.teacher_hidden.split(256):
        log_p = (hidden @ x.teacher_weight.T).log_softmax(-1)
        top = log_p.topk(k, dim=-1)
        ids.append(top.indices.int())
        logprobs.append(top.values.half())
        tails.append(log_p.exp().scatter(1, top.indices, 0.0).sum(-1, dtype=torch.float64).log().float())
    return qt.TopK(torch.cat(ids), torch.cat(logprobs), torch.cat(tails))


def forward(x: Inputs, target: str, teacher: qt.TopK) -> Tensor:
    made = qt.preset(target)
    others = {"teacher": teacher} if "teacher" in made.requires else {}
    return qt.linear_target_loss(x.hidden, x.weight, x.labels, made, **others).loss


def measure_engine(tokens: int, width: int, repeats: int) -> dict:
    x = Inputs(tokens, width)
    teacher = likeliest(x, ENGINE_K)
    for target in ENGINE_TARGETS:  # warm up
        forward(x, target, teacher).backward()
        x.clear()
    layouts = [512, tokens]
    logits = torch.empty(tokens, VOCAB)
    bare: list[float] = []
    seconds: dict[str, list[float]] = {target: [] for target in ENGINE_TARGETS}
    share = CpuShare()
    for turn in range(repeats):
        bare.append(min(timed(lambda r=rows: bare_matmuls(x, False, r, logits, logits)) for rows in layouts))
        for target in rotated(ENGINE_TARGETS, turn):
            seconds[target].append(timed(lambda t=target: forward(x, t, teacher).backward()))
            x.clear()
    return {
        "tokens": tokens,
        "width": width,
        "vocab": VOCAB,
        "k": ENGINE_K,
        "repeats": repeats,
        "own_cpu_share": share.now(),
        "bare_seconds": bare,
        "seconds": seconds,
        "ratio": {target: median_ratio(values, bare) for target, values in seconds.items()},
    }


def show_engine(found: dict) -> None:
    print(
        f"\nengine: width {found['width']}, vocabulary {found['vocab']}, {found['tokens']} tokens, float32, k = "
        f"{found['k']}: time over the three necessary matmuls"
    )
    for target, ratio in found["ratio"].items():
        print(f"  {target:<34} {ratio:5.2f}{against_limit(ratio, LIMITS.get(target))}")
    warn_of_neighbours(found["own_cpu_share"])
    sys.stdout.flush()


# -- rows, teacher and caches ------------------------------------------------------------------------------------


class Bench:
    """The demo's first rows, a teacher for them, and caches of it; what was made before is used again.

    Args:
        demo: folder of prepare_quickstart.py. rows: how many problems. work: where caches and other files go.
    """

    def __init__(self, demo: Path, rows: int, work: Path):
        self.demo, self.rows, self.work = demo, rows, work
        self.teacher = teacher_folder(demo)
        lines = (demo / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()
        if len(lines) < rows:
            raise SystemExit(f"{demo / 'data'} holds {len(lines)} rows, and {rows} are asked for")
        self.data = work / "data"
        self.data.mkdir()
        (self.data / "train.jsonl").write_text("\n".join(lines[:rows]) + "\n", encoding="utf-8")
        self.dataset = Dataset.from_list([json.loads(line) for line in lines[:rows]])
        self._asked: AskedOnce | None = None

    def arguments(self) -> list[str]:
        """What a user would give the command line."""
        return [
            *("--config", str(ROOT / "recipes" / "quickstart.yaml")),
            *("--model_name_or_path", str(self.demo / MODEL)),
            *("--teacher_model_name_or_path", str(self.teacher)),
            *("--dataset_name", str(self.data), "--dataset_test_split", "none"),
            *("--output_dir", str(self.work / "run")),
        ]

    def read(self) -> setup.Run:
        return setup.read(self.arguments(), setup.row_by_row(self.arguments(), target="kd"), trains=False)

    @property
    def asked(self) -> AskedOnce:
        if self._asked is None:
            trainer = setup.build(self.read(), RowsTrainer, weights=False)
            self._asked = AskedOnce(trainer, max(ERROR_KS))
        return self._asked

    def cache(self, k: int, dtype: str = "float16") -> Path:
        """A finished cache of k tokens, by the library's own build."""
        folder = self.work / f"{dtype}-{k}"
        if not folder.exists():
            trainer, plan = self.asked.trainer, self.asked.plan
            about = cache_build.about(trainer)
            cache_build.build(trainer, folder, plan, k, dtype=dtype, about=about, scorer=self.asked.cut_to(k))
        return folder


class AskedOnce:
    """The live teacher's k likeliest tokens for every row, kept in memory, from which smaller caches are cut."""

    def __init__(self, trainer: Any, k: int):
        self.trainer, self.k = trainer, k
        self.plan = cache_build.plan(trainer)
        self._score = cache_scorers.LiveScorer(trainer, k)
        self._kept: dict[tuple[int, ...], Kept] = {}

    def cut_to(self, k: int) -> cache_build.Scorer:
        def score(rows: list[dict[str, Any]]) -> Iterator[Kept]:
            keys = [tuple(row["input_ids"]) for row in rows]
            missing = [number for number, key in enumerate(keys) if key not in self._kept]
            if missing:
                answers = self._score([rows[number] for number in missing])
                self._kept |= {keys[number]: answer for number, answer in zip(missing, answers, strict=True)}
            for key in keys:
                ids, logprobs, tail = self._kept[key]
                cut = np.exp(logprobs[:, k:].astype(np.float64)).sum(-1)
                with np.errstate(divide="ignore"):
                    rest = np.log(np.exp(tail.astype(np.float64)) + cut).clip(min=tail)
                yield ids[:, :k], logprobs[:, :k], rest.astype(np.float32)

        return score


def teacher_folder(demo: Path) -> Path:
    """The model after a few steps of plain sft on these problems, trained if it is not there yet."""
    folder = SCRATCH / "teacher"
    if not (folder / "model.safetensors").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        print(f"teacher: {TEACHER_STEPS} steps of plain sft at 1e-4", flush=True)
        command = [sys.executable, "-m", "qtarget.cli", "train", "--config", str(ROOT / "recipes" / "quickstart.yaml")]
        command += ["--model_name_or_path", str(demo / MODEL), "--dataset_name", str(demo / "data")]
        command += ["--target", "sft", "--learning_rate", "1e-4", "--max_steps", str(TEACHER_STEPS)]
        command += ["--dataset_test_split", "none", "--output_dir", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"the teacher could not be trained:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return folder


# -- step --------------------------------------------------------------------------------------------------------


def step_methods() -> dict[str, int | None]:
    """Name → k of the cache, or None."""
    return {SFT: None, **{f"target-sft, k = {k}": k for k in STEP_KS}, LIVE: None}


def make_trainer(bench: Bench, method: str, rows: int) -> QTargetTrainer:
    k = step_methods()[method]
    teacher: dict[str, Any] = {"teacher_model_name_or_path": str(bench.teacher)} if method == LIVE else {}
    if k is not None:
        teacher = {"teacher_cache": str(bench.cache(k))}
    config = QTargetConfig(
        str(bench.work / "run"),
        target="sft" if method == SFT else "target-sft",
        teacher_check_rows=0,
        per_device_train_batch_size=rows,
        max_length=512,  # the demo's
        gradient_checkpointing=False,
        optim="sgd",
        learning_rate=1e-4,
        bf16=False,
        use_cpu=True,
        report_to="none",
        seed=1,
        **teacher,
    )
    trainer = QTargetTrainer(load(bench.demo), config, train_dataset=bench.dataset)
    # What train() sets before its first step.
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    trainer.state.logging_steps = 10
    return trainer


def measure_step(bench: Bench, rows: int, repeats: int) -> dict:
    """``bench`` has rows for two batches more than are timed: the first warms up, and a loader reads one ahead."""
    methods = tuple(step_methods())
    trainers = {method: make_trainer(bench, method, rows) for method in methods}
    loaders = {method: iter(trainer.get_train_dataloader()) for method, trainer in trainers.items()}
    last: dict[str, dict[str, Tensor]] = {}
    reading: dict[str, list[float]] = {method: [] for method in methods}
    seconds: dict[str, list[float]] = {method: [] for method in methods}

    def whole(method: str) -> float:
        begin = time.perf_counter()
        last[method] = dict(next(loaders[method]))
        reading[method].append(time.perf_counter() - begin)
        return step(trainers[method], last[method])

    def same_rows() -> None:
        for method in methods:
            if not torch.equal(last[method]["input_ids"], last[SFT]["input_ids"]):
                raise SystemExit(f"{method} prepares other batches than {SFT}: a ratio would compare different work")

    first = {method: whole(method) for method in methods}
    same_rows()
    reading = {method: [] for method in methods}
    supervised, positions = [], []
    share = CpuShare()
    for turn in range(repeats):
        for method in rotated(methods, turn):
            seconds[method].append(timed(lambda m=method: whole(m)))
        same_rows()
        supervised.append(int((last[SFT]["labels"][:, 1:] != -100).sum()))
        positions.append(last[SFT]["input_ids"].numel())
    return {
        "model": MODEL,
        "rows": rows,
        "repeats": repeats,
        "packing": "off",
        "positions": positions,
        "supervised_tokens": supervised,
        "own_cpu_share": share.now(),
        "first_loss": first,
        "seconds": seconds,
        "reading_seconds": reading,
        "ratio": {method: median_ratio(values, seconds[SFT]) for method, values in seconds.items()},
    }


def show_step(found: dict) -> None:
    supervised, positions = (statistics.mean(found[name]) for name in ("supervised_tokens", "positions"))
    print(
        f"\nstep: {found['model']}, float32, {found['rows']} rows ({supervised:.0f} of {positions:.0f} tokens "
        f"supervised), packing {found['packing']}: time over plain sft's; of it reading the batch; the first loss"
    )
    for method, ratio in found["ratio"].items():
        reading = statistics.median(
            read / all_ for read, all_ in zip(found["reading_seconds"][method], found["seconds"][method], strict=True)
        )
        limit = against_limit(ratio, STEP_LIMITS.get(method))
        print(f"  {method:<34} {ratio:5.2f}  {reading:6.2%}  {found['first_loss'][method]:.5f}{limit}")
    warn_of_neighbours(found["own_cpu_share"])


# -- disk --------------------------------------------------------------------------------------------------------


def measure_disk(bench: Bench) -> list[dict]:
    found = []
    for dtype in ("float16", "float32"):
        for k in STEP_KS:
            folder = bench.cache(k, dtype)
            manifest = CachedTeacher(folder).manifest
            tokens = manifest["tokens"]
            files = sum(file.stat().st_size for file in folder.glob("shard-*.safetensors"))
            formula = k * (4 + np.dtype(dtype).itemsize) + 4
            if not formula <= files / tokens < formula * 1.02 + 1:  # what a file's header takes
                raise SystemExit(f"{folder} holds {files / tokens:.1f} bytes a token, and the formula says {formula}")
            found.append(
                {
                    "k": k,
                    "dtype": dtype,
                    "rows": manifest["rows"],
                    "tokens": tokens,
                    "shard_bytes": files,
                    "index_bytes": (folder / INDEX).stat().st_size,
                    "bytes_per_token": round(files / tokens, 2),
                    "formula": formula,
                    "gigabytes_per_billion_tokens": formula,  # 1e9 tokens, 1e9 bytes
                }
            )
    return found


def show_disk(found: list[dict]) -> None:
    print(f"\ndisk: caches of {found[0]['rows']} rows, {found[0]['tokens']} supervised tokens")
    print("  k     dtype     bytes a token  formula  GB for 1e9 tokens")
    for line in found:
        print(
            f"  {line['k']:<5} {line['dtype']:<9} {line['bytes_per_token']:13.2f}  {line['formula']:7}  "
            f"{line['gigabytes_per_billion_tokens']:17}"
        )


# -- error -------------------------------------------------------------------------------------------------------


def measure_error(bench: Bench, rows: int, ks: tuple[int, ...], sample_rows: int) -> dict:
    """What a cache of each k does to targets, and the k that a share of the mass asks for."""
    caches = [CachedTeacher(bench.cache(k)) for k in ks]
    needed = []
    for coverage in COVERAGES:
        k, found = cache_build.needed_for(bench.asked.trainer, bench.asked.plan, coverage, sample_rows)
        needed.append({"k": k, **found})
    trainer = setup.build(bench.read())
    reports = []
    for cache in caches:
        report = cache_doctor.examine(trainer, cache, rows).to_dict()
        reports.append({**report, "dtype": "float16", "kept_mass": 1 - report["lost_mass"]["mean"]})
    return {"rows": rows, "teacher_steps": TEACHER_STEPS, "reports": reports, "needed": needed}


def show_error(found: dict) -> None:
    print(f"\nerror: {found['reports'][0]['tokens']} tokens of {found['rows']} rows, float16")
    print("  k     kept    target       tail      error of Q  bound   gradient  of hidden")
    for report in found["reports"]:
        for line in report["targets"]:
            bound = "-" if line["bound_mean"] is None else f"{line['bound_mean']:.4f}"
            print(
                f"  {report['k']:<5} {report['kept_mass']:.4f}  {line['target']:<12} {line['tail']:<9} "
                f"{line['q_mean']:.4f}      {bound:<7} {line['logit_gradient']:8.4f}  {line['hidden_gradient']:9.4f}"
            )
            if line["holds"] is False:
                print("        THE BOUND DOES NOT HOLD")
    for line in found["needed"]:
        percentiles = ", ".join(f"{percent} %: {k}" for percent, k in line["needed_k"].items())
        print(
            f"  --coverage {line['coverage']:g} takes k = {line['k']}; tokens that need so many or fewer: {percentiles}"
        )


# -- shared ------------------------------------------------------------------------------------------------------


class CpuShare:
    """How much of its cores this process had since it was made."""

    def __init__(self) -> None:
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def now(self) -> float:
        used, wall = time.process_time() - self._cpu, time.perf_counter() - self._wall
        return round(used / wall / torch.get_num_threads(), 3)


def rotated(names: tuple[str, ...], turn: int) -> tuple[str, ...]:
    """Nobody always runs after the same neighbour."""
    begin = turn % len(names)
    return names[begin:] + names[:begin]


def median_ratio(mine: list[float], base: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(mine, base, strict=True)), 3)


def against_limit(ratio: float, limit: float | None) -> str:
    return "" if limit is None else f"  (limit {limit:.2f}: {'holds' if ratio <= limit else 'DOES NOT HOLD'})"


def warn_of_neighbours(share: float) -> None:
    if share < 0.9:
        print(f"  this process had only {share:.0%} of its cores: run again on a quiet machine")


# -- the tables of docs/teachers.md ------------------------------------------------------------------------------


def tables(record: dict) -> str:
    """Markdown, of the parts on record."""
    parts: dict[str, Callable[[dict], Iterator[str]]] = {"step": _cost_table, "error": _error_table}
    lines = [line for name, table in parts.items() if record.get(name) for line in ["", *table(record)]]
    about = record["machine"]
    return "\n".join([f"{about['cpu']}, {about['threads']} threads, torch {about['torch']}, {about['date']}.", *lines])


def _cost_table(record: dict) -> Iterator[str]:
    yield "| a whole step over plain sft's | time |"
    yield "|---|---|"
    for method, ratio in record["step"]["ratio"].items():
        yield f"| {method} | {ratio:.2f} |"
    for found in record.get("engine") or []:
        yield ""
        yield f"| the loss alone, k = {found['k']}, width {found['width']}, over its three matmuls | time |"
        yield "|---|---|"
        for target, ratio in found["ratio"].items():
            yield f"| {target} | {ratio:.2f} |"


def _error_table(record: dict) -> Iterator[str]:
    """Each figure as: tail in the student's shape / even tail."""
    found = record["error"]
    yield "| k | mass kept | target | error of Q | its bound | gradient on logits | gradient on hidden states |"
    yield "|---|---|---|---|---|---|---|"
    figures = "q_mean", "logit_gradient", "hidden_gradient"
    for report in found["reports"]:
        by_target: dict[str, dict[str, dict]] = {}
        for line in report["targets"]:
            by_target.setdefault(line["target"], {})[line["tail"]] = line
        for target, tail in by_target.items():
            student, even = tail["student"], tail["even"]
            pairs = [f"{student[name]:.4f} / {even[name]:.4f}" for name in figures]
            yield (
                f"| {report['k']} | {report['kept_mass']:.4f} | {target} | {pairs[0]} | {student['bound_mean']:.4f} | "
                f"{pairs[1]} | {pairs[2]} |"
            )
    yield ""
    yield "| `--coverage` | k it takes | half of the tokens need | 90 % | 99 % | every one |"
    yield "|---|---|---|---|---|---|"
    for line in found["needed"]:
        needs = " | ".join(str(line["needed_k"][percent]) for percent in ("50", "90", "99", "100"))
        yield f"| {line['coverage']:g} | {line['k']} | {needs} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--widths", type=int, nargs="+", default=[576, 896])
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of the engine's timing")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--rows", type=int, default=4, help="the demo's rows in a batch of the step")
    parser.add_argument("--error_rows", type=int, default=12, help="rows on which errors are measured")
    parser.add_argument("--quick", action="store_true", help="few repeats and rows, to see that it works")
    parser.add_argument("--table", action="store_true", help="print the tables of docs/teachers.md from --out and stop")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "quickstart", help="the demo's model and data")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    out = args.out or (SCRATCH / "quick.json" if args.quick else RESULTS)
    if args.table:
        print(tables(json.loads(out.read_text(encoding="utf-8"))))
        return
    error_ks = ERROR_KS
    if args.quick:
        args.widths, args.tokens, args.repeats, args.rows, args.error_rows = [576], 512, 2, 1, 1
        error_ks = (64,)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)  # TRL's own default
    record: dict = {} if set(args.parts) == {*PARTS} or not out.is_file() else json.loads(out.read_text())
    record |= {"machine": machine(), "quick": args.quick}
    begin = time.perf_counter()
    if "engine" in args.parts:
        record["engine"] = []
        for width in args.widths:
            record["engine"].append(measure_engine(args.tokens, width, args.repeats))
            show_engine(record["engine"][-1])
    if {"step", "disk", "error"} & {*args.parts}:
        prepare(args.folder)
        SCRATCH.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=SCRATCH) as work:
            rows = max(args.rows * (args.repeats + 2), args.error_rows)
            bench = Bench(args.folder, rows, Path(work))
            measures: dict[str, Callable[[], Any]] = {
                "step": lambda: measure_step(bench, args.rows, args.repeats),
                "disk": lambda: measure_disk(bench),
                "error": lambda: measure_error(bench, args.error_rows, error_ks, min(24, args.error_rows)),
            }
            shows: dict[str, Callable[[Any], None]] = {"step": show_step, "disk": show_disk, "error": show_error}
            for part in [part for part in measures if part in args.parts]:
                record[part] = measures[part]()
                shows[part](record[part])
                print(f"  {time.perf_counter() - begin:.0f} s so far", flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"\nraw results: {out}; {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
