"""The same run twice: once by TRL's SFTTrainer, once by QTargetTrainer, which must not differ."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from trl import SFTConfig, SFTTrainer

import tiny_models
from qtarget import QTargetConfig, QTargetTrainer
from quick_runs import Weights, copied_weights, quick_settings, weight_change

# Clipping shows the norm of the gradient; a step is then at most as long as the learning rate.
STEPS = {"max_steps": 3, "learning_rate": 0.3, "max_grad_norm": 1.0, "bf16": False}
TRL = SFTTrainer, SFTConfig
OURS = QTargetTrainer, QTargetConfig
# Relative, in float32: of what is logged, and of how far a weight went.
CLOSE = 1e-5
ROUNDING = torch.finfo(torch.float32).eps
# What TRL logs as a mean over micro-batches and qtarget over tokens: the same where a step is one micro-batch.
OVER_TOKENS = {"entropy", "mean_token_accuracy"}


def our_name(name: str) -> str:
    """What qtarget logs a figure of TRL's as: each once."""
    return name.replace("mean_token_accuracy", "accuracy")


TIMES = ("runtime", "per_second", "preparation_time")
ONE_MICRO_BATCH = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}


class Run(NamedTuple):
    trainer: Any
    moved: Weights

    @property
    def steps(self) -> list[dict[str, float]]:
        """What was logged at each training step."""
        return [entry for entry in self.trainer.state.log_history if "loss" in entry]


def make_trainer(
    kind: tuple[type, type], model: Any, folder: Path, data: Any, given: dict[str, Any], **settings: Any
) -> Any:
    """A trainer of one kind; ``given`` are its arguments beside settings, copied, because trainers change some."""
    trainer, config = kind
    made = {"processing_class": copy.deepcopy(tiny_models.tokenizer()), **copy.deepcopy(given)}
    return trainer(model, config(**quick_settings(folder, **(STEPS | settings))), train_dataset=data, **made)


def train_and_record(made: Any, **how: Any) -> Run:
    before = copied_weights(made.model)
    made.train(**how)
    return Run(made, weight_change(before, made.model))


def run_one(
    kind: tuple[type, type],
    folder: Path,
    data: Callable[[], Any],
    model: Any = tiny_models.trained_model,
    **settings: Any,
) -> Run:
    """One of the two runs."""
    return train_and_record(make_trainer(kind, model(), folder, data(), {}, **settings))


def side_by_side(
    folder: Path,
    data: Callable[[], Any] = tiny_models.text_dataset,
    model: Callable[[], nn.Module | str] = tiny_models.trained_model,
    given: dict[str, Any] | None = None,
    **settings: Any,
) -> tuple[Run, Run]:
    """TRL's run and ours, each from its beginning to its end, for both draw random numbers."""
    theirs, ours = (
        train_and_record(make_trainer(kind, model(), folder / name, data(), given or {}, **settings))
        for name, kind in (("trl", TRL), ("ours", OURS))
    )
    return theirs, ours


def assert_same_run(theirs: Run, ours: Run, still: tuple[str, ...] = ()) -> None:
    """Each step logged the same, and the weights went the same way; ``still`` names those that need not move."""
    assert theirs.steps and len(ours.steps) == len(theirs.steps)
    one_micro_batch = theirs.trainer.args.gradient_accumulation_steps == 1
    for number, (mine, trls) in enumerate(zip(ours.steps, theirs.steps, strict=True), start=1):
        assert math.isfinite(trls["loss"]) and math.isfinite(trls["grad_norm"])
        for name, value in trls.items():
            if name.endswith(TIMES) or (name in OVER_TOKENS and not one_micro_batch):
                continue
            assert our_name(name) in mine, f"step {number}: {name} is not logged"
            assert mine[our_name(name)] == pytest.approx(value, rel=CLOSE, abs=1e-7), f"step {number}: {name}"
    assert_same_way(theirs, ours, still)


def assert_same_way(theirs: Run, ours: Run, still: tuple[str, ...] = ()) -> None:
    """Apart from float32: each step rounds a weight once in both runs, which tells where a weight moves little."""
    assert theirs.moved and ours.moved.keys() == theirs.moved.keys()
    ends = dict(theirs.trainer.model.named_parameters())
    for name, way in theirs.moved.items():
        assert way.any() or any(part in name for part in still), f"{name} did not move, which shows nothing"
        error, rounded = float((ours.moved[name] - way).norm()), ROUNDING * float(ends[name].detach().norm())
        allowed = CLOSE * float(way.norm()) + theirs.trainer.state.global_step * rounded
        assert error <= allowed, f"{name} ends {error:.1e} from where TRL's does, after a way of {way.norm():.1e}"
