"""Results on disk: a file holds the runs of one cell and seed, a run a line, and is written whole or not at all."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from cells import Run
from settings import Settings

Content = dict[str, Any]


def path_of(folder: Path, run: Run) -> Path:
    """folder: ``dev`` or ``test`` of a plan."""
    return folder / run.cell / f"seed-{run.seed}.json"


def read(path: Path, settings: Settings) -> Content | None:
    """A file on record; one of other settings stops the study, which would otherwise mix two."""
    if not path.exists():
        return None
    content = json.loads(path.read_text())
    ours = json.loads(json.dumps(settings.record()))
    if content["settings"] != ours:
        name = next(k for k in {**ours, **content["settings"]} if content["settings"].get(k) != ours.get(k))
        sys.exit(
            f"{path} was made with {name} {content['settings'].get(name)}, now {ours.get(name)}; move its folder away"
        )
    return content


def finished(folder: Path, runs: list[Run], settings: Settings) -> dict[Run, Content]:
    """Those of the runs that are on record."""
    files = {path: read(path, settings) for path in {path_of(folder, run): None for run in runs}}
    there = {}
    for run in runs:
        content = files[path_of(folder, run)]
        found = [] if content is None else [c for c in content["runs"] if (c["arm"], c["rate"]) == (run.arm, run.rate)]
        if found:
            there[run] = found[0]
    return there


def add(folder: Path, run: Run, settings: Settings, content: Content) -> None:
    path = path_of(folder, run)
    held = read(path, settings) or {"seed": run.seed, "cell": run.cell, "settings": settings.record(), "runs": []}
    held["runs"].append({"arm": run.arm, "rate": run.rate, **content})
    write(path, held)


def write(path: Path, content: Content) -> None:
    content = _rounded(content)
    runs = content.pop("runs", None)
    text = json.dumps(content, separators=(",", ":"))
    if runs is not None:
        lines = ",\n".join(json.dumps(one, separators=(",", ":")) for one in runs)
        text = f'{text[:-1]},"runs":[\n{lines}\n]}}'
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text + "\n")
    part.replace(path)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
