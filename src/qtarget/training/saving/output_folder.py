"""`output_dir`: whether it can be written, holds another run, and how that is deleted."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

# Weights and what says how to read them: a run of another kind would leave both kinds side by side.
_MODEL = (
    *("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "adapter_model.bin"),
    *("config.json", "generation_config.json", "adapter_config.json"),
)
# What only a run writes, so that it tells a run's folder from that of a model.
_OF_A_RUN = (TRAINER_STATE_NAME, "training_args.bin", "train_results.json", "target.json")
_FIGURES = ("all_results.json", "eval_results.json", "before_after.json", "curves.png", "lens_history.parquet")


def faults(args: Any, reads: Iterable[str | None]) -> list[str]:
    """Sentences where a run cannot have its folder. ``reads``: folders and files that the run reads."""
    folder = Path(args.output_dir)
    try:
        folder.exists()
    except OSError as error:  # a name longer than the file system takes
        return [f"output_dir is {str(folder)[:100]!r}..., which cannot be a folder ({error.strerror}); choose another"]
    if args.overwrite_output_dir and args.resume_from_checkpoint:
        return [
            "overwrite_output_dir and resume_from_checkpoint are both set, but the first deletes what the second "
            "resumes from; keep one of them"
        ]
    there = [*folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), *folder.glob("*.safetensors"), *folder.glob(_OF_A_RUN[2])]
    if there and not args.resume_from_checkpoint:
        holds = f"output_dir is {str(folder)!r}, which holds"
        if not args.overwrite_output_dir:
            return [
                f"{holds} another run ({there[0].name}); choose another folder, resume that run with "
                "--resume_from_checkpoint true, or delete it and start from scratch with --overwrite_output_dir"
            ]
        if not _checkpoints(folder) and not any((folder / name).exists() for name in _OF_A_RUN):
            return [f"{holds} {there[0].name} and nothing that a run wrote; overwrite_output_dir deletes only runs"]
        inside = [
            name for name in reads if name and folder.resolve() in (Path(name).resolve(), *Path(name).resolve().parents)
        ]
        if inside:
            return [f"{holds} {inside[0]!r}, which this run reads; it cannot be overwritten: choose another folder"]
    return unwritable(folder)


def unwritable(folder: Path) -> list[str]:
    """A sentence where a run cannot write its folder."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return [f"output_dir is {str(folder)!r}, which cannot be written; choose a folder you own"]
    return []


def delete_run(folder: Path) -> None:
    """Delete a run's checkpoints, weights and figures; other files stay, and a run overwrites its tokenizer and card."""
    for checkpoint in _checkpoints(folder):
        shutil.rmtree(checkpoint)
    for pattern in (*_MODEL, *_OF_A_RUN, *_FIGURES):
        for file in folder.glob(pattern):
            file.unlink()


def _checkpoints(folder: Path) -> list[Path]:
    return [one for one in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if (one / TRAINER_STATE_NAME).is_file()]
