"""What a cell's file says: settings, training figures, answers and machine; no weights."""

from __future__ import annotations

import contextlib
import json
import platform
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from real_model.forms import CUDA, HERE, Settings

TASK = "sums"
PACKAGES = ("torch", "transformers", "trl", "reasoning-gym")


def shared_settings(settings: Settings) -> dict[str, Any]:
    """What all cells of a folder have to share."""
    import yaml

    return {**asdict(settings), "train": yaml.safe_load((HERE / "train.yaml").read_text()) | settings.training()}


def check_same(file: Path, settings: Settings) -> None:
    """Raises SystemExit where a file was made with other settings."""
    there, now = json.loads(file.read_text(encoding="utf-8"))["settings"], shared_settings(settings)
    for name in {**now, **there}:
        if there.get(name) != now.get(name):
            raise SystemExit(
                f"{file}: {name} was {there.get(name)!r} and is now {now.get(name)!r}; move the old results away, or "
                "name another folder with --results"
            )


def training_figures(folder: Path) -> dict[str, Any]:
    """before, after: on clean test answers. log: a figure's value at every step that was logged."""
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


def machine(settings: Settings) -> dict[str, Any]:
    import torch

    from qtarget import __version__

    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line for line in lines if line.startswith("model name")).split(":", 1)[1].strip()
    card = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda} if settings.device == CUDA else {}
    # qtarget may be a source tree, of which the environment knows no version
    packages = {"qtarget": __version__, **{name: version(name) for name in PACKAGES}}
    return {**card, "cpu": cpu, "threads": torch.get_num_threads(), **packages, "date": date.today().isoformat()}


def rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def write(file: Path, made: dict[str, Any]) -> None:
    """All or nothing; an answer a line, so that the file can be read and a change seen."""
    from qtarget import files

    answers = made["answers"]
    lines = ",\n".join(f"  {json.dumps(p)}: {json.dumps(a, ensure_ascii=False)}" for p, a in answers.items())
    rest = json.dumps({k: v for k, v in made.items() if k != "answers"}, indent=1, ensure_ascii=False)
    files.write(file, rest.removesuffix("\n}") + ',\n "answers": {\n' + lines + "\n }\n}\n")


def write_figures(file: Path, made: dict[str, Any]) -> None:
    from qtarget import files

    files.write(file, json.dumps(made, indent=1, ensure_ascii=False) + "\n")
