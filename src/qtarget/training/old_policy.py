"""psft's old policy: the trainable weights as they were at the last refresh (arXiv:2508.17784).

The paper takes the old policy anew at the start of every train batch and updates several times against it. Here it is
a copy of the trainable weights (the adapters under LoRA), put in their place for a forward without gradient.
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

from qtarget.errors import ConfigError


class OldPolicy:
    """Copies of the trainable weights and when they were taken.

    Args:
        model: the student without wrappers. interval: optimiser steps between two copies.
    """

    def __init__(self, model: nn.Module, interval: int):
        self._model, self.interval = model, interval
        self.taken_at: int | None = None
        self._kept: dict[str, Tensor] = {}

    def _trainable(self) -> dict[str, nn.Parameter]:
        """The trainable weights as this process keeps them. FSDP2 leaves what a forward without backward gathered in
        the model, where it would hide the shards and serve the next forward after a swap."""
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        return {name: parameter for name, parameter in self._model.named_parameters() if parameter.requires_grad}

    @torch.no_grad()
    def refresh(self, step: int) -> None:
        """Copy the weights before optimiser step ``step`` (0 is the first), where the schedule says so."""
        if self.taken_at is not None and (step % self.interval or self.taken_at == step):
            return
        for name, parameter in self._trainable().items():
            if parameter.numel() == 0:
                raise ConfigError(
                    "psft_refresh copies the trainable weights, which ZeRO-3 keeps in pieces; use ZeRO-2 or FSDP2, or "
                    "psft_refresh: never with a column old_logps"
                )
            if name in self._kept:
                self._kept[name].copy_(_local(parameter))
            else:
                self._kept[name] = _local(parameter).clone()
        self.taken_at = step

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
            here, kept = _local(parameter), self._kept[name]
            now = here.clone()  # one parameter at a time: a second full copy is never held
            here.copy_(kept)
            kept.copy_(now)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        if self.taken_at is not None and (_sharded(self._model) or int(os.environ.get("RANK", "0")) == 0):
            torch.save({"taken_at": self.taken_at, "weights": self._kept}, _file(folder, self._model))

    def load(self, folder: str | Path) -> None:
        """Raises ConfigError where the checkpoint holds no old policy, or one of other weights."""
        path = _file(folder, self._model)
        if not path.is_file():
            raise ConfigError(
                f"resume_from_checkpoint is {str(folder)!r}, which holds no old policy ({path.name}); resume from a "
                "checkpoint that a run with this psft_refresh wrote, on as many processes"
            )
        saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        trainable = self._trainable()
        if saved["weights"].keys() != trainable.keys():
            raise ConfigError(
                f"resume_from_checkpoint is {str(folder)!r}, whose old policy has other trainable weights than this "
                "model; resume with the same adapters"
            )
        self._kept = {name: value.to(trainable[name].device) for name, value in saved["weights"].items()}
        self.taken_at = saved["taken_at"]


def _local(parameter: Tensor) -> Tensor:
    """The numbers this process holds: all, or its shard."""
    data = parameter.detach()
    return data.to_local() if hasattr(data, "to_local") else data


def _sharded(model: nn.Module) -> bool:
    return any(hasattr(parameter, "to_local") for parameter in model.parameters())


def _file(folder: str | Path, model: nn.Module) -> Path:
    number = os.environ.get("RANK", "0") if _sharded(model) else "0"
    return Path(folder) / f"psft_old_policy_{number}.pt"
