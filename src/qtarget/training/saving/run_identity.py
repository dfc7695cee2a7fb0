"""What a run trains, written into its checkpoints; a different run cannot resume them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import with_config
from typing_extensions import TypedDict

from qtarget import files
from qtarget.errors import StorageError, raise_together
from qtarget.targets.objective import Objective

FILE = "qtarget.json"


@with_config(strict=True)
class Saved(TypedDict, total=False):
    """``qtarget.json`` of a checkpoint. A field that only one of two runs has is a difference between them."""

    target: str | dict[str, Any]
    targets: dict[str, Any]
    denominator: str
    z_loss: float
    teacher: str | None
    reference: str | None
    teacher_context: str | dict[str, Any]
    teacher_end_token: str
    teacher_tail: str
    source_column: str
    weights: str
    weights_temperature: float
    psft_refresh: int | str


def identity(args: Any, objective: Objective, names: Mapping[str, str | None]) -> dict[str, Any]:
    """The settings that decide what is trained, as JSON holds them.

    Args:
        args: QTargetConfig. names: what to call a teacher or reference that ``args`` does not name.
    """
    requires, models = objective.requires, args.models_for(objective.requires)
    settings = {"targets" if objective.sources else "target": objective.to_config(), "denominator": args.denominator}
    for role in ("teacher", "reference"):
        name = getattr(args, f"{role}_model_name_or_path")
        revision = getattr(args, f"{role}_model_revision") or "default"
        read_from_cache = role == "teacher" and args.teacher_cache is not None
        named = f"{name} (revision {revision})" if name and not read_from_cache else names.get(role)
        settings[role] = named if role in models else None
    decides = {
        "z_loss": args.z_loss != 0,
        "teacher_context": "teacher" in models and args.teacher_context is not None,
        "teacher_end_token": "teacher" in models and args.teacher_end_token != "label",
        "teacher_tail": "teacher" in models and args.teacher_tail != "student",
        "source_column": bool(objective.sources),
        "weights": "weight" in requires,
        "weights_temperature": "weight" in requires and args.weights == "online",
        "psft_refresh": "old_policy" in requires,
    }
    settings |= {name: getattr(args, name) for name, so in decides.items() if so}
    return json.loads(json.dumps(settings, default=str))


def describe(args: Any, objective: Objective, settings: dict[str, Any]) -> str:
    """One line: the targets, their formulas, the denominator and where the other models come from."""
    parts = [objective.describe(), f"denominator {args.denominator}"]
    if args.z_loss:
        parts.append(f"z_loss {args.z_loss:g}")
    parts += [f"{role} {settings[role]}" for role in ("teacher", "reference") if settings[role] is not None]
    if "weights" in settings:
        parts.append(f"weights {args.weights}")
    if settings.get("psft_refresh") == "never":
        parts.append("old policy from column old_logps, which is not the paper's schedule: it is never refreshed")
    elif "psft_refresh" in settings:
        parts.append(f"old policy copied every {args.psft_refresh} steps")
    if trusted := trusted_code(args):
        parts.append(f"trust_remote_code is on: code that came with {' and '.join(trusted)} is run")
    return "; ".join(parts)


def trusted_code(args: Any) -> list[str]:
    """The models whose own code a run may run, because the user said so."""
    init_kwargs = {
        "the model": [{"trust_remote_code": args.trust_remote_code}, args.model_init_kwargs],
        "the teacher": [args.teacher_model_init_kwargs, *(member.init_kwargs for member in args.pool_members())],
        "the reference": [args.reference_model_init_kwargs],
    }
    return [who for who, several in init_kwargs.items() if any((one or {}).get("trust_remote_code") for one in several)]


def write(folder: str | Path, settings: dict[str, Any]) -> None:
    (Path(folder) / FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def differences(folder: str | Path, settings: dict[str, Any], partly: bool = False) -> list[str]:
    """Sentences on what a checkpoint was trained with and this run is not; none for a checkpoint of another program.

    ``partly``: settings that are not given are not compared.
    """
    file = Path(folder) / FILE
    if not file.is_file():
        return []
    try:
        saved = files.load(file, Saved, "so nothing says what it trained; resume from another checkpoint")
    except StorageError as error:
        return error.faults
    return [
        f"{name} is {_shown(now)}, but the checkpoint {str(folder)!r} was trained with {_shown(was)}; resume with "
        "that, or start a new run from the model with another output_dir"
        for name, now, was in files.differences(settings, saved, partly=partly, nested=False)
    ]


def check(folder: str | Path, settings: dict[str, Any]) -> None:
    """Raise ConfigError with every difference."""
    raise_together(differences(folder, settings))


def _shown(value: Any) -> str:
    return "none" if value is None else repr(value) if isinstance(value, str) else json.dumps(value)
