"""What a run is, kept in its checkpoints: a resumed run must train the same objective toward the same teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qtarget.errors import ConfigError
from qtarget.training.objective import Objective

FILE = "qtarget.json"


def identity(args: Any, objective: Objective, teacher: str | None, reference: str | None) -> dict[str, Any]:
    """The settings that decide what is trained, as JSON holds them.

    Args:
        args: QTargetConfig. teacher, reference: what they are and their revision, or None where nothing needs them.
    """
    requires = objective.requires
    settings = {
        "targets" if objective.sources else "target": objective.to_config(),
        "denominator": args.denominator,
        "teacher": teacher,
        "reference": reference,
    }
    if objective.sources:
        settings["source_column"] = args.source_column
    if "weight" in requires:
        settings["weights"] = args.weights
        if args.weights == "online":
            settings["weights_temperature"] = args.weights_temperature
    if "old_policy" in requires:
        settings["psft_refresh"] = args.psft_refresh
    return json.loads(json.dumps(settings, default=str))


def write(folder: str | Path, settings: dict[str, Any]) -> None:
    (Path(folder) / FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def differences(folder: str | Path, settings: dict[str, Any], partly: bool = False) -> list[str]:
    """Sentences on what a checkpoint was trained with and this run is not; none for a checkpoint of another program.

    ``partly``: settings that are not given are not compared.
    """
    file = Path(folder) / FILE
    if not file.is_file():
        return []
    saved = json.loads(file.read_text(encoding="utf-8"))
    return [
        f"{name} is {_shown(settings.get(name))}, but the checkpoint {str(folder)!r} was trained with "
        f"{_shown(saved.get(name))}; resume with that, or start anew from the model with another output_dir"
        for name in {**settings, **saved}
        if saved.get(name) != settings.get(name) and not (partly and name not in settings)
    ]


def check(folder: str | Path, settings: dict[str, Any]) -> None:
    """Raise ConfigError with every difference."""
    if faults := differences(folder, settings):
        raise ConfigError(faults)


def _shown(value: Any) -> str:
    return "none" if value is None else repr(value) if isinstance(value, str) else json.dumps(value)
