"""Train and test every cell: condition x arm x training seed. A finished cell is one JSON file and is not run again.

    python -m real_model.run            # from benchmarks/, or with it on PYTHONPATH: make real-model
    python -m real_model.run --quick    # two steps and four problems, to see that it works; writes build/real_model/quick

Every cell is ``qtarget train`` and ``qtarget eval``, called in this process. Seeds are the outer loop and clean labels
come first, so that whatever is finished when it is stopped is balanced. A cell that was killed starts anew.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import platform
import shutil
import time
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from real_model import problems

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
MODEL = ROOT / "build" / "quickstart" / "SmolLM2-135M-Instruct"
RESULTS = HERE.parent / "results" / "real_model"
TASK = "sums"
BASE, SFT, DFT, KD, TARGET = ARMS = ("base", "sft", "dft", "kd", "target-sft")
CLEAN, NOISY = CONDITIONS = ("clean", "noisy")
# The teacher is the model itself; it reads the right answer in every row, also where the demonstration is wrong.
WITH_TEACHER = (KD, TARGET)
CONTEXT = "{{ prompt }}\nWrite exactly this and nothing else: {{ solution }}"


@dataclass(frozen=True)
class Settings:
    """rows, noise: of the demonstrations. problems: of the test. held_out: of these, as clean demonstrations for nll.
    n: samples a problem at temperature 1, beside a greedy one, of up to max_new_tokens."""

    rows: int = 96
    noise: float = 0.25
    problems: int = 100
    held_out: int = 40
    n: int = 4
    max_new_tokens: int = 14
    eval_seed: int = 0
    context: str = CONTEXT


class Cell(NamedTuple):
    """One training run and its test; seed 0 and clean for the untrained base, which is tested once."""

    seed: int
    condition: str
    arm: str

    @property
    def name(self) -> str:
        return BASE if self.arm == BASE else f"seed{self.seed}_{self.condition}_{self.arm}"


def plan(seeds: tuple[int, ...] = (1, 2, 3), arms: tuple[str, ...] = ARMS) -> list[Cell]:
    """In the order in which they run."""
    trained = [arm for arm in arms if arm != BASE]
    return [Cell(0, CLEAN, BASE)] + [Cell(s, c, a) for s in seeds for c in CONDITIONS for a in trained]


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small form that shows it works")
    parser.add_argument("--results", type=Path, help="where finished cells are written")
    options = parser.parse_args()
    scratch = ROOT / "build" / "real_model"
    if options.quick:
        settings = Settings(rows=16, problems=4, held_out=4, n=1)
        cells, results = plan((1,), (BASE, SFT, TARGET)), options.results or scratch / "quick"
    else:
        settings, cells, results = Settings(), plan(), options.results or RESULTS
    torch.set_flush_denormal(True)  # of the whole process, so not in what tests call
    run(cells, settings, results, scratch)
    check_teacher(settings, results, scratch)


def run(cells: list[Cell], settings: Settings, results: Path, scratch: Path, model: Path = MODEL) -> int:
    """Run what is missing. Returns how many cells were run.

    Raises:
        SystemExit: a finished cell was run with other settings.
    """
    ran = 0
    for number, cell in enumerate(cells, start=1):
        file = results / f"{cell.name}.json"
        if file.is_file():
            check_same(file, settings)
            print(f"{cell.name}: finished before", flush=True)
            continue
        print(f"\n== {cell.name}, {number} of {len(cells)}", flush=True)
        work = scratch / "work" / cell.name
        shutil.rmtree(work, ignore_errors=True)
        made = one(cell, settings, work, model)
        write(file, made)
        shutil.rmtree(work)  # 540 MB of weights
        ran += 1
        print(
            f"{cell.name}: {made['seconds']:.0f} s, {made['scores']['strict']['avg']:.3f} of samples right", flush=True
        )
        gc.collect()
    return ran


def check_same(file: Path, settings: Settings) -> None:
    there, now = json.loads(file.read_text())["settings"], shared_settings(settings)
    for name in now:
        if there.get(name) != now[name]:
            raise SystemExit(
                f"{file}: {name} was {there.get(name)!r} and is now {now[name]!r}; move the old results away, or name "
                "another folder with --results"
            )


def shared_settings(settings: Settings) -> dict[str, Any]:
    import yaml

    return {**asdict(settings), "train": yaml.safe_load((HERE / "train.yaml").read_text())}


# -- one cell ------------------------------------------------------------------------------------------------------


def one(cell: Cell, settings: Settings, work: Path, model: Path) -> dict[str, Any]:
    """Train, test, and keep what a reader needs; the weights are not kept."""
    started = time.monotonic()
    made: dict[str, Any] = {**cell._asdict(), "settings": shared_settings(settings)}
    tested = model
    if cell.arm != BASE:
        write_data(cell, settings, work / "data")
        qtarget(*train_words(cell, settings, work, model))
        made["training"] = training_figures(work / "model")
        tested = work / "model"
    made["train_seconds"] = time.monotonic() - started
    sums = work / f"{TASK}.jsonl"
    problems.write_lines(sums, problems.test_problems(settings.problems))
    qtarget(*eval_words(settings, tested, sums, work / "eval"))
    made |= {**tested_figures(work / "eval"), "seconds": time.monotonic() - started, "machine": machine()}
    return made


def write_data(cell: Cell, settings: Settings, folder: Path) -> None:
    noise = settings.noise if cell.condition == NOISY else 0.0
    tested = problems.tested_keys(settings.problems)
    problems.write_lines(folder / "train.jsonl", problems.train_rows(settings.rows, cell.seed, noise, tested))
    problems.write_lines(folder / "test.jsonl", problems.held_out_rows(settings.held_out, settings.problems))


def train_words(cell: Cell, settings: Settings, work: Path, model: Path) -> list[object]:
    words: list[object] = ["train", "--config", HERE / "train.yaml", "--model_name_or_path", model]
    words += ["--dataset_name", work / "data", "--output_dir", work / "model"]
    words += ["--target", cell.arm, "--seed", cell.seed]
    if cell.arm in WITH_TEACHER:
        words += ["--teacher_model_name_or_path", model]
        words += ["--teacher_context", json.dumps({"prompt": settings.context}), "--teacher_check_rows", 0]
    return words


def eval_words(settings: Settings, model: Path, tasks: Path, out: Path) -> list[object]:
    words: list[object] = ["eval", "--model", model, "--tasks", tasks, "--verifier", "real_model.judge:result"]
    words += ["--n", settings.n, "--temperature", 1, "--max_new_tokens", settings.max_new_tokens]
    words += ["--seed", settings.eval_seed, "--batch_size", 50, "--verifier_processes", 1, "-o", out]
    return words


def check_teacher(settings: Settings, results: Path, scratch: Path, model: Path = MODEL) -> None:
    """``qtarget teacher check`` of the first seed's demonstrations, a file a condition."""
    from qtarget import files

    for condition in CONDITIONS:
        file = results / f"teacher_{condition}.json"
        if file.is_file():
            check_same(file, settings)
            continue
        cell, work = Cell(1, condition, KD), scratch / "work" / f"teacher_{condition}"
        shutil.rmtree(work, ignore_errors=True)
        write_data(cell, settings, work / "data")
        _, *words = train_words(cell, settings, work, model)
        qtarget("teacher", "check", *words, "--rows", settings.rows, "--json", work / "check.json")
        made = {"settings": shared_settings(settings), "check": json.loads((work / "check.json").read_text())}
        files.write(file, json.dumps({**made, "machine": machine()}, indent=1, ensure_ascii=False) + "\n")
        shutil.rmtree(work)


def qtarget(*words: object) -> None:
    from qtarget.cli.__main__ import main as program

    print("$ qtarget " + " ".join(map(str, words)), flush=True)
    if status := program([str(word) for word in words]):
        raise SystemExit(status)


def training_figures(folder: Path) -> dict[str, Any]:
    """before, after: on clean test answers. log: a figure's value at every step."""
    figures = json.loads((folder / "before_after.json").read_text())
    evaluated = {when: {name: figures[when][name] for name in ("nll", "entropy", "accuracy")} for when in figures}
    steps = [x for x in json.loads((folder / "trainer_state.json").read_text())["log_history"] if "loss" in x]
    names = ("loss", "nll", "entropy", "trust", "update", "grad_norm")
    log = {name: [rounded(x[name]) for x in steps] for name in names if all(name in x for x in steps)}
    return {
        "target": json.loads((folder / "target.json").read_text()),
        **{when: {name: rounded(value) for name, value in evaluated[when].items()} for when in ("before", "after")},
        "log": log,
    }


def tested_figures(folder: Path) -> dict[str, Any]:
    """The manifest and each sample as [text, tokens, ended, entropy, strict, lenient], greedy first."""
    from qtarget.evaluation import records, scores

    groups = scores.grouped(records.samples(folder, TASK))
    manifest = records.read_manifest(folder)
    assert manifest is not None
    manifest["model"]["name"] = Path(manifest["model"]["name"]).name  # not where it lay on this machine
    return {
        "eval": manifest,
        "scores": json.loads((folder / "scores.json").read_text())["tasks"][TASK],
        "answers": {
            problem: [
                [r["text"], r["tokens"], r["finish"] == "stop", rounded(r["entropy"]), r["strict"], r["lenient"]]
                for r in group
            ]
            for problem, group in groups.items()
        },
    }


def machine() -> dict[str, Any]:
    import torch

    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line for line in lines if line.startswith("model name")).split(":", 1)[1].strip()
    packages = {name: version(name) for name in ("qtarget", "torch", "transformers", "trl", "reasoning-gym")}
    return {"cpu": cpu, "threads": torch.get_num_threads(), **packages, "date": date.today().isoformat()}


def rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def write(file: Path, made: dict[str, Any]) -> None:
    """All or nothing; an answer a line, so that the file can be read and a change seen."""
    from qtarget import files

    answers = made["answers"]
    lines = ",\n".join(f"  {json.dumps(p)}: {json.dumps(a, ensure_ascii=False)}" for p, a in answers.items())
    rest = json.dumps({k: v for k, v in made.items() if k != "answers"}, indent=1, ensure_ascii=False)
    files.write(file, rest.removesuffix("\n}") + ',\n "answers": {\n' + lines + "\n }\n}\n")


if __name__ == "__main__":
    main()
