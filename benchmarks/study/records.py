"""Results on disk: a file holds the runs of one cell and seed, a run a line, and is written whole or not at all."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rates
from cells import Plan, Run
from settings import Settings

Content = dict[str, Any]


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


@dataclass(frozen=True)
class Record:
    """The results of a plan, and the learning rates that follow from them. folder: that of the plan."""

    plan: Plan
    folder: Path

    def path(self, kind: str, run: Run) -> Path:
        """kind: dev or test."""
        return self.folder / kind / run.cell / f"seed-{run.seed}.json"

    def models(self, seed: int) -> Path:
        return self.folder / f"models/seed-{seed}.json"

    def finished(self, kind: str, runs: list[Run]) -> dict[Run, Content]:
        """Those of the runs that are on record."""
        files = {path: read(path, self.plan.settings) for path in {self.path(kind, run): None for run in runs}}
        held = {
            Run(content["seed"], content["cell"], one["arm"], one["rate"]): one
            for content in files.values()
            if content is not None
            for one in content["runs"]
        }
        return {run: held[run] for run in runs if run in held}

    def add(self, kind: str, run: Run, content: Content) -> None:
        path, settings = self.path(kind, run), self.plan.settings
        held = read(path, settings) or {"seed": run.seed, "cell": run.cell, "settings": settings.record(), "runs": []}
        held["runs"].append({"arm": run.arm, "rate": run.rate, **content})
        write(path, held)

    # -- learning rates --------------------------------------------------------------------------------------------

    def dev(self) -> dict[tuple[str, str], dict[float, list[Content]]]:
        """{(cell, arm): {rate: contents}} of the rates that every dev seed has on record."""
        plan = self.plan
        tried = [(*pair, rate) for pair in plan.tuned for rate in sorted({*plan.settings.rates, *rates.LADDER})]
        there = self.finished("dev", plan.dev_runs(tried))
        found: dict[tuple[str, str], dict[float, list[Content]]] = {}
        for cell, arm, rate in tried:
            contents = [there[run] for run in plan.dev_runs([(cell, arm, rate)]) if run in there]
            if len(contents) == len(plan.settings.dev_seeds):
                found.setdefault((cell, arm), {})[rate] = contents
        return found

    def scores(self) -> dict[tuple[str, str], dict[float, list[float]]]:
        """As ``dev``, of each run its avg on the dev problems at temperature 1."""
        return {
            pair: {rate: [content["dev"]["1.0"] for content in contents] for rate, contents in tried.items()}
            for pair, tried in self.dev().items()
        }

    def rates_to_try(self) -> list[tuple[str, str, float]]:
        """(cell, arm, rate) that are not on record and are wanted now; none where there is but one rate."""
        there, wanted = self.scores(), []
        for pair in self.plan.tuned if self._chooses else ():
            scores = there.get(pair, {})
            missing = [rate for rate in self.plan.settings.rates if rate not in scores]
            if not missing and self.plan.settings.widen and (further := rates.next_of(scores)) is not None:
                missing = [further]
            wanted += [(*pair, rate) for rate in missing]
        return wanted

    def rates(self) -> dict[tuple[str, str], float]:
        """{(cell, arm): rate}, once nothing is left to try."""
        if not self._chooses:
            return dict.fromkeys(self.plan.tuned, self.plan.settings.rates[0])
        return {pair: rates.best(scores) for pair, scores in self.scores().items()}

    @property
    def _chooses(self) -> bool:
        return self.plan.settings.widen or len(self.plan.settings.rates) > 1


def write(path: Path, content: Content, lines_of: str = "runs") -> None:
    """lines_of: the list of which each entry gets a line, where there is one."""
    content = _rounded(content)
    entries = content.pop(lines_of, None)
    text = json.dumps(content, separators=(",", ":"))
    if entries is not None:
        lines = ",\n".join(json.dumps(one, separators=(",", ":")) for one in entries)
        text = f'{text[:-1]},"{lines_of}":[\n{lines}\n]}}'
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
