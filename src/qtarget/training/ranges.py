"""Refuses numbers and names among the settings that TRL and Transformers let pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from enum import Enum
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import torch
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames
from trl import SFTConfig

from qtarget.errors import check_range, faults_of, unknown

# field → the lowest whole number; None is left as it is.
_WHOLE = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "max_length": 2,  # the first token has nothing that predicts it
    "seed": 0,
    "data_seed": 0,
    "save_total_limit": 1,
    "dataset_num_proc": 1,
    "dataloader_num_workers": 0,
    "lens_every": 1,
    "teacher_check_rows": 0,
}
# field → (lowest number, whether that itself is too low)
_NUMBERS = {
    "learning_rate": (0, False),
    "weight_decay": (0, False),
    "max_grad_norm": (0, False),
    "z_loss": (0, False),
    "warmup_steps": (0, False),
    "adam_epsilon": (0, False),
    "neftune_noise_alpha": (0, False),
    "logging_steps": (0, True),
    "save_steps": (0, True),
    "eval_steps": (0, True),
}
# Keyword arguments of torch.utils.checkpoint, and Transformers' own.
_OF_CHECKPOINTING = (
    *("use_reentrant", "context_fn", "preserve_rng_state", "determinism_check", "debug", "early_stop"),
    "selective",
)
_SEEDS = ("seed", "data_seed")
_LARGEST_SEED = 2**32 - 1
_NAMES: dict[str, type[Enum]] = {
    "lr_scheduler_type": SchedulerType,
    "optim": OptimizerNames,
    "eval_strategy": IntervalStrategy,
    "logging_strategy": IntervalStrategy,
    "save_strategy": SaveStrategy,
    "hub_strategy": HubStrategy,
}


def faults(config: Any) -> list[str]:
    """Sentences on the numbers and names of a training config, before Transformers reads them."""
    return [*_whole(config), *_numbers(config), *_names(config), *_run_name(config), *_together(config)]


def _whole(config: Any) -> Iterator[str]:
    for name, low in _WHOLE.items():
        value = getattr(config, name, None)
        if value is None:
            continue
        most = _LARGEST_SEED if name in _SEEDS else None
        if isinstance(value, bool) or not isinstance(value, int) or value < low or (most is not None and value > most):
            to = "" if most is None else f" to {most}"
            yield f"{name} is {value!r}; use a whole number from {low}{to}"


def _numbers(config: Any) -> Iterator[str]:
    for name, (low, above) in _NUMBERS.items():
        value = getattr(config, name, None)
        if value is not None:
            yield from faults_of(check_range, name, value, low, open_low=above)
    if isinstance(config.max_steps, bool) or not isinstance(config.max_steps, int):
        yield f"max_steps is {config.max_steps!r}; use a whole number, or -1 for num_train_epochs"
    elif config.max_steps <= 0:
        yield from faults_of(check_range, "num_train_epochs", config.num_train_epochs, 0, open_low=True)


def _names(config: Any) -> Iterator[str]:
    for name, kind in _NAMES.items():
        value = getattr(config, name, None)
        valid = [member.value for member in kind]
        if value is not None and getattr(value, "value", value) not in valid:
            yield from unknown(name, value, valid).faults
    for field in dataclasses.fields(SFTConfig):
        value, choices = getattr(config, field.name, None), [*field.metadata.get("choices", ())]
        if isinstance(value, str) and field.name not in _NAMES and choices and value not in choices:
            yield from unknown(field.name, value, map(str, choices)).faults
    asked = config.report_to if isinstance(config.report_to, list) else [config.report_to]
    trackers = ("none", "all", *INTEGRATION_TO_CALLBACK)
    for one in asked:
        if one is not None and one not in trackers:
            yield from unknown("report_to", one, trackers).faults


def _run_name(config: Any) -> Iterator[str]:
    """Trackers make folders of it."""
    name = config.run_name
    if name is None or name == config.output_dir:
        return
    paths = PurePosixPath(str(name)), PureWindowsPath(str(name))
    if any(path.is_absolute() or ".." in path.parts for path in paths) or any(ord(letter) < 32 for letter in str(name)):
        yield f"run_name is {name!r}; use a name without '..', a leading slash or control characters"


def _together(config: Any) -> Iterator[str]:
    """Settings that the rest of them, or this machine, rules out."""
    if config.dataloader_persistent_workers and not config.dataloader_num_workers:
        yield "dataloader_persistent_workers is true without workers; set dataloader_num_workers, or leave it out"
    multiple = config.pad_to_multiple_of
    if multiple not in (None, "auto") and (not isinstance(multiple, int) or multiple < 1):
        yield f"pad_to_multiple_of is {multiple!r}; use a whole number from 1, or auto"
    start = getattr(config, "dataloader_multiprocessing_context", None)  # Transformers 5.10 has no such field
    if start is not None and start not in (known := torch.multiprocessing.get_all_start_methods()):
        yield from unknown("dataloader_multiprocessing_context", start, known).faults
    given = config.gradient_checkpointing_kwargs
    for name in given if isinstance(given, dict) else ():
        if name not in _OF_CHECKPOINTING:
            yield from unknown("gradient_checkpointing_kwargs' key", name, _OF_CHECKPOINTING).faults
    if isinstance(config.parallelism_config, dict):
        yield "parallelism_config is a mapping; set it by accelerate launch, or in Python as its ParallelismConfig"
