"""What the trials of other people's trainers share: steps to compare, and one file of results."""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results" / "hosts.json"

Steps = list[dict[str, float]]


def steps_of(log_history: Iterable[dict[str, Any]]) -> Steps:
    """Loss and gradient norm of each step, from a Transformers trainer's log."""
    return [{key: line[key] for key in ("loss", "grad_norm")} for line in log_history if "grad_norm" in line]


def largest(ours: Steps, own: Steps) -> float:
    """The largest relative difference of a step's loss or gradient norm."""
    pairs = [(a[key], b[key]) for a, b in zip(ours, own, strict=True) for key in a]
    return max(abs(a - b) / abs(b) for a, b in pairs)


def save(host: str, packages: Iterable[str], steps: dict[str, dict[str, Steps]], **more: Any) -> None:
    """Write a host's versions, steps and further findings into the file; the other hosts' stay.

    Args:
        steps: what was run → {"own": steps to compare with, "ours": the target's}.
    """
    differences = {name: largest(pair["ours"], pair["own"]) for name, pair in steps.items()}
    content = {
        "versions": {name: version(name) for name in packages},
        "steps": steps,
        "largest relative difference": differences,
        **more,
    }
    there = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps({**there, host: content}, indent=1) + "\n")
    print(json.dumps(differences))
