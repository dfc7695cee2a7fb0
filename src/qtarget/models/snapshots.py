"""Copies of the trainable weights, put in place for a forward: old policy and average.

Under LoRA they are copies of the adapters.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from qtarget.errors import ConfigError, StorageError, loading


class WeightSnapshot:
    """Copies of the trainable weights and when they were taken.

    Args:
        model: the student without wrappers.

    Raises:
        ConfigError: under ZeRO-3.
    """

    # What errors call them, the setting that asks for them, and the name of their file in a checkpoint.
    what, setting, file = "", "", ""
    _instead = "another teacher"

    def __init__(self, model: nn.Module):
        if is_deepspeed_zero3_enabled():
            raise ConfigError(
                f"{self.setting} copies the trainable weights, which ZeRO-3 keeps in pieces; use ZeRO-2 or FSDP2, or "
                f"{self._instead}"
            )
        self._model = model
        self.taken_at: int | None = None
        self._copies: dict[str, Tensor] = {}

    def _trainable(self) -> dict[str, nn.Parameter]:
        """The trainable weights as this process keeps them. FSDP2 leaves what a forward without backward gathered in
        the model, where it would hide the shards and serve the next forward after a swap."""
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        return {name: parameter for name, parameter in self._model.named_parameters() if parameter.requires_grad}

    @torch.no_grad()
    def _take(self, step: int, share: float = 1.0) -> None:
        """Move the copies to the present weights: all the way, or by a share of the difference."""
        for name, parameter in self._trainable().items():
            present, copy = _local(parameter), self._copies.get(name)
            if copy is None:
                self._copies[name] = self._first(present)
            elif share == 1:
                copy.copy_(present)
            else:
                copy.lerp_(present.to(copy.dtype), share)
        self.taken_at = step

    def _first(self, weights: Tensor) -> Tensor:
        return weights.clone()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The old weights in the model for the duration; the present ones before the first refresh."""
        if self.taken_at is None:
            yield
            return
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._trainable().items():
            weights, copy = _local(parameter), self._copies[name]
            present = weights.clone()  # one parameter at a time: a second full copy is never held
            weights.copy_(copy)
            copy.copy_(present)

    def forget(self) -> None:
        """Start again with the next optimiser step 0."""
        self.taken_at = None

    def save(self, folder: str | Path) -> None:
        if self.taken_at is not None and (_sharded(self._model) or int(os.environ.get("RANK", "0")) == 0):
            torch.save({"taken_at": self.taken_at, "weights": self._copies}, self._file(folder))

    def load(self, folder: str | Path) -> None:
        """Raises StorageError where the checkpoint holds no such copies, or copies of other weights."""
        path = self._file(folder)
        if not path.is_file():
            raise StorageError(
                f"resume_from_checkpoint is {str(folder)!r}, which holds no {self.what} ({path.name}); resume from a "
                f"checkpoint that a run with this {self.setting} wrote, on as many processes"
            )
        with loading("resume_from_checkpoint", str(folder), path.name):
            saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(saved["weights"], dict) or not isinstance(saved["taken_at"], int):
                raise ValueError("it holds no weights with the step at which they were copied")
        trainable = self._trainable()
        if saved["weights"].keys() != trainable.keys():
            raise StorageError(
                f"resume_from_checkpoint is {str(folder)!r}, whose {self.what} has different trainable weights from "
                "this model; resume with the same adapters"
            )
        self._copies = {name: value.to(trainable[name].device) for name, value in saved["weights"].items()}
        self.taken_at = saved["taken_at"]

    def _file(self, folder: str | Path) -> Path:
        number = os.environ.get("RANK", "0") if _sharded(self._model) else "0"
        return Path(folder) / f"{self.file}_{number}.pt"


class OldPolicy(WeightSnapshot):
    """The weights as they were at the last refresh (psft, arXiv:2508.17784).

    The paper copies the old policy again at the start of every train batch and updates several times against it.

    Args:
        model: the student without wrappers. interval: optimiser steps between two copies.
    """

    what, setting, file = "old policy", "psft_refresh", "psft_old_policy"
    _instead = "psft_refresh: never with a column old_logps"

    def __init__(self, model: nn.Module, interval: int):
        super().__init__(model)
        self.interval = interval

    def refresh(self, step: int) -> None:
        """Copy the weights before optimiser step ``step`` (0 is the first), where the schedule says so."""
        if self.taken_at is None or (step % self.interval == 0 and self.taken_at != step):
            self._take(step)


class StartWeights(WeightSnapshot):
    """The weights as they were before the first step: the reference of a run that goes on from an adapter.

    ``start``: take them, unless they are there. A second ``train()`` keeps those of the first.
    """

    what, setting, file = "reference, the initial adapter", "the reference", "reference_at_start"
    _instead = "a merged model (qtarget merge)"

    def start(self) -> None:
        if self.taken_at is None:
            self._take(0)

    def forget(self) -> None:
        pass


class EmaWeights(WeightSnapshot):
    """The student's weights, averaged over the optimiser steps: kept ← decay · kept + (1 − decay) · present.

    Args:
        model: the student without wrappers. decay: from 0, the student as it is, to below 1.
    """

    what, setting, file = "average of the student", "teacher_ema_decay", "teacher_average"

    def __init__(self, model: nn.Module, decay: float):
        super().__init__(model)
        self.decay = decay

    def update(self, step: int) -> None:
        """Take the weights before optimiser step ``step`` into the average, once."""
        if self.taken_at != step and self.decay > 0:
            self._take(step, 1.0 if self.taken_at is None else 1 - self.decay)

    def _first(self, weights: Tensor) -> Tensor:
        # In half precision a share of 0.001 would be rounded away.
        return weights.to(torch.promote_types(weights.dtype, torch.float32), copy=True)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """As its base, but the average stays as it is: a swap would round it to the model's precision."""
        trainable, average = self._trainable(), self._copies
        self._copies = {name: weights.to(trainable[name].dtype, copy=True) for name, weights in average.items()}
        try:
            with super().in_place():
                yield
        finally:
            self._copies = average


def _local(parameter: Tensor) -> Tensor:
    """The numbers this process holds: all, or its shard."""
    data = parameter.detach()
    return data.to_local() if hasattr(data, "to_local") else data


def _sharded(model: nn.Module) -> bool:
    return any(hasattr(parameter, "to_local") for parameter in model.parameters())
