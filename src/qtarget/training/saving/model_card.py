"""The part of a model card that says what the model was taught."""

from __future__ import annotations

import contextlib
import re
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtarget import __version__
from qtarget.targets import presets
from qtarget.training import checks
from qtarget.training.saving import run_identity

if TYPE_CHECKING:
    from qtarget.training.trainer import QTargetTrainer

_PACKAGES = ("trl", "transformers", "torch", "datasets", "accelerate", "peft")
_FIGURES = ("loss", "nll", "ce_q", "trust", "residual_mass", "update", "update_vs_sft", "entropy", "accuracy")


def complete(trainer: QTargetTrainer) -> None:
    """Add the part to the card that the host has just written."""
    card = Path(str(trainer.args.output_dir)) / "README.md"
    if not trainer.is_world_process_zero() or not card.is_file():
        return
    text = _with_names(trainer, card.read_text(encoding="utf-8"))
    before, versions, after = text.partition("### Framework versions")
    card.write_text(f"{before.rstrip()}\n\n{section(trainer)}{versions}{after}", encoding="utf-8")


def _with_names(trainer: QTargetTrainer, text: str) -> str:
    """The host's text with the names that it does not know: of a base that is a folder here, and of an adapter."""
    base = trainer.student.base.config._name_or_path or type(trainer.student.base).__name__
    text = text.replace("[None](https://huggingface.co/None)", f"`{base}`")
    text = text.replace('model="None"', f'model="{trainer.args.output_dir}"')
    adapter = getattr(trainer.student.unwrapped, "active_peft_config", None)
    if adapter is not None:
        ours = f"This is an adapter ({adapter.peft_type.value}) for"
        text = text.replace("This model is a fine-tuned version of", ours)
    return text


def section(trainer: QTargetTrainer) -> str:
    """Markdown: the targets, what they needed, how the loss was scaled, and the last figures."""
    lines = ["## Target", "", "What each token was taught, with qtarget.", ""]
    for source, target in trainer.objective.targets.items():
        name = "" if source is None else f" for rows of `{source}`"
        final = target.final
        lines.append(f"- target{name}: `{target}`")
        lines.append(f"- formula{name}: `{final.formula}`")
        if final.name in presets.names():
            linked = re.sub(
                r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", presets.describe(final.name).source
            )
            lines.append(f"- published in{name}: {linked}")
        for parameter, value in final.hyperparameters.items():
            lines.append(f"- {parameter}{name}: {value}")
        for place, schedule in target.schedules.items():
            lines.append(f"- schedule of {'.'.join(place)}{name}: {schedule}")
    if trainer.student.name != trainer.student.base.config._name_or_path:
        lines.append(f"- trained further from: adapter `{trainer.student.name}`")
    for name, value in trainer.identity().items():
        if name not in ("target", "targets") and value is not None:
            lines.append(f"- {name}: {value}")
    for name, dataset in checks.datasets_of(trainer.train_dataset, trainer.eval_dataset):
        rows = f"{len(dataset)} rows" if hasattr(dataset, "__len__") else "a stream"
        lines.append(f"- {name} data: {rows}")
    if trusted := run_identity.trusted_code(trainer.args):
        lines.append(f"- trust_remote_code is on: code that came with {' and '.join(trusted)} was run")
    log = trainer.state.log_history
    train: dict[str, Any] = next((entry for entry in reversed(log) if "nll" in entry), {})
    evaluated: dict[str, Any] = next((entry for entry in reversed(log) if "eval_nll" in entry), {})
    if train or evaluated:
        lines += ["", "| figure | last training log | last evaluation |", "|---|---|---|"]
    for name in _FIGURES:
        if name in train or f"eval_{name}" in evaluated:
            lines.append(f"| {name} | {_number(train.get(name))} | {_number(evaluated.get(f'eval_{name}'))} |")
    versions = {"qtarget": __version__}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    lines += ["", "Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + "."]
    return "\n".join(lines) + "\n\n"


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, (int, float)) else "-"
