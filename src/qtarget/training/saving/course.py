"""What a run goes through step by step, which must stay the same when it is resumed."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset

from qtarget import files
from qtarget.errors import StorageError, raise_together

if TYPE_CHECKING:
    from qtarget.training.trainer import QTargetTrainer

logger = logging.getLogger(__name__)

FILE = "qtarget_course.json"
# The optimiser's state brings the old values back, whatever the settings say.
_OF_OPTIMIZER = ("optim", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
# Which rows are skipped as done depends on them.
_OF_ROWS = ("rows of a step", "seed", "rows")
# Weights of adapters mean something only with these.
_OF_ADAPTERS = ("r", "lora_alpha", "use_rslora", "use_dora", "target_modules")
# From the checkpoint on, the schedule is that of the new settings.
_OF_SCHEDULE = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_steps", "num_train_epochs")
_LOOKED_AT = 64  # rows, evenly spaced


def of(trainer: QTargetTrainer) -> dict[str, Any]:
    """The settings and rows of a run, as JSON holds them."""
    args = trainer.args
    course = {name: getattr(args, name) for name in (*_OF_OPTIMIZER, *_OF_SCHEDULE)}
    course["rows of a step"] = (
        args.per_device_train_batch_size * args.gradient_accumulation_steps * trainer.accelerator.num_processes
    )
    course["seed"] = args.seed if args.data_seed is None else args.data_seed
    course["rows"] = _rows(trainer.train_dataset)
    for adapter in getattr(trainer.model, "peft_config", {}).values():
        for name in _OF_ADAPTERS:
            value = getattr(adapter, name, None)
            course[f"adapters' {name}"] = sorted(value) if isinstance(value, set | list) else value
    held: dict[str, Any] = json.loads(json.dumps(course, default=str))
    return held


def _rows(dataset: Any) -> str | None:
    """The number of rows and a digest of some of them; None for a stream, which is read once."""
    if not isinstance(dataset, Dataset):
        return None
    digest, columns = hashlib.sha256(), [name for name in ("input_ids", "labels") if name in dataset.column_names]
    some = np.unique(np.linspace(0, len(dataset) - 1, min(_LOOKED_AT, len(dataset)), dtype=np.int64))
    for row in dataset.with_format(None).select_columns(columns).select(some):
        for name in columns:
            digest.update(np.asarray(row[name], dtype=np.int64).tobytes() + b"|")
    return f"{len(dataset)} rows (digest {digest.hexdigest()[:8]})"


def write(folder: Path, trainer: QTargetTrainer) -> None:
    files.write_json(folder / FILE, of(trainer))


def check(folder: Path, trainer: QTargetTrainer) -> None:
    """Compare a checkpoint's course with this run's; one of another program has none.

    Raises:
        ConfigError: a setting that the checkpoint's state overrides, other rows, or other steps through them.
    """
    try:
        saved = files.checked(files.loads((folder / FILE).read_bytes()), dict)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise StorageError(
            f"resume_from_checkpoint is {str(folder)!r}, whose {FILE} cannot be read: {error}"
        ) from error
    now = of(trainer)
    other = [
        name for name in saved if name in now and None not in (saved[name], now[name]) and saved[name] != now[name]
    ]
    anew = f"or start a new run from its weights: model_name_or_path {str(folder)!r} with another output_dir"
    trained_with = f"the checkpoint {str(folder)!r} was trained with"
    found = [
        f"{name} is {now[name]}, but {trained_with} {saved[name]}, which its optimiser's state brings back; resume with "
        f"that, {anew}"
        for name in _OF_OPTIMIZER
        if name in other
    ]
    found += [
        f"{name} is {now[name]}, but {trained_with} {saved[name]}; resume with that"
        for name in other
        if name.startswith("adapters' ")
    ]
    if not trainer.args.ignore_data_skip:
        found += [
            f"{_asked(name)} {now[name]}, but {trained_with} {saved[name]}, so the rows skipped would not be those it "
            f"has seen; resume with that, {anew}, or set ignore_data_skip: true to start the data from the beginning"
            for name in _OF_ROWS
            if name in other
        ]
    raise_together(found)
    for name in _OF_SCHEDULE:
        if name in other and trainer.is_world_process_zero():
            logger.warning(
                f"{name} is {now[name]}, and {trained_with} {saved[name]}: from here on the learning rate follows the "
                "new schedule"
            )


def _asked(name: str) -> str:
    return {
        "rows of a step": "per_device_train_batch_size × gradient_accumulation_steps × processes is",
        "rows": "the train dataset has",
    }.get(name, f"{name} is")
