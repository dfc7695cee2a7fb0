"""The part of a model card that says what the model was taught."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtarget import __version__
from qtarget.targets import presets
from qtarget.targets.objective import Objective
from qtarget.training import run_identity

if TYPE_CHECKING:
    from qtarget.training.trainer import QTargetTrainer

_VERSIONS = ("qtarget", "trl", "transformers", "torch", "datasets", "accelerate", "peft")
_FIGURES = ("loss", "nll", "ce_q", "trust", "residual_mass", "update", "update_vs_sft", "entropy", "accuracy")
_BEFORE = "### Framework versions"


def complete(trainer: QTargetTrainer) -> None:
    """Add the part to the card that the host has just written."""
    card = Path(str(trainer.args.output_dir)) / "README.md"
    if not trainer.is_world_process_zero() or not card.is_file():
        return
    evaluated = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"eval": trainer.eval_dataset}
    rows = {
        name: f"{len(data)} rows" if hasattr(data, "__len__") else "a stream"
        for name, data in {"train": trainer.train_dataset, **evaluated}.items()
        if data is not None
    }
    trusted = run_identity.trusted_code(trainer.args)
    part = section(trainer.objective, trainer.identity(), rows, trainer.state.log_history, trusted)
    card.write_text(insert(card.read_text(encoding="utf-8"), part), encoding="utf-8")


def section(
    objective: Objective,
    settings: dict[str, Any],
    rows: dict[str, Any],
    log_history: list[dict[str, Any]],
    trusted: Sequence[str] = (),
) -> str:
    """Markdown: the targets, what they needed, how the loss was scaled, and the last figures.

    Args:
        objective: what was trained. settings: ``identity.identity`` of the run.
        rows: data set → number of rows, or what is known of them.
        log_history: ``trainer.state.log_history``. trusted: models whose own code was run.
    """
    lines = ["## Target", "", "What each token was taught, with qtarget.", ""]
    for source, target in objective.targets.items():
        name = "" if source is None else f" for rows of `{source}`"
        final = target.final
        lines.append(f"- target{name}: `{target}`")
        lines.append(f"- formula{name}: `{final.formula}`")
        if final.name in presets.names():
            lines.append(f"- published in{name}: {_linked(presets.describe(final.name).source)}")
        for parameter, value in final.hyperparameters.items():
            lines.append(f"- {parameter}{name}: {value}")
        for place, schedule in target.schedules.items():
            lines.append(f"- schedule of {'.'.join(place)}{name}: {schedule}")
    for name, value in settings.items():
        if name not in ("target", "targets") and value is not None:
            lines.append(f"- {name}: {value}")
    lines += [f"- {name} data: {value}" for name, value in rows.items()]
    if trusted:
        lines.append(f"- trust_remote_code is on: code that came with {' and '.join(trusted)} was run")
    figures = _figures(log_history)
    if figures:
        lines += ["", "| figure | last training log | last evaluation |", "|---|---|---|"]
        lines += [f"| {name} | {train} | {evaluated} |" for name, train, evaluated in figures]
    lines += ["", "Versions: " + ", ".join(f"{name} {version}" for name, version in _versions()) + "."]
    return "\n".join(lines) + "\n\n"


def insert(card: str, part: str) -> str:
    """The card with the part before its framework versions; one that is there already is replaced."""
    card = re.sub(r"## Target\n.*?(?=### Framework versions)", "", card, flags=re.DOTALL)
    if _BEFORE not in card:
        return card.rstrip() + "\n\n" + part
    return card.replace(_BEFORE, part + _BEFORE, 1)


def _figures(log_history: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    train: dict[str, Any] = next((entry for entry in reversed(log_history) if "nll" in entry), {})
    evaluated: dict[str, Any] = next((entry for entry in reversed(log_history) if "eval_nll" in entry), {})
    return [
        (name, _number(train.get(name)), _number(evaluated.get(f"eval_{name}")))
        for name in _FIGURES
        if name in train or f"eval_{name}" in evaluated
    ]


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, (int, float)) else "-"


def _linked(source: str) -> str:
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", source)


def _versions() -> list[tuple[str, str]]:
    found = [("qtarget", __version__)]
    for name in _VERSIONS[1:]:
        try:
            found.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            continue
    return found
