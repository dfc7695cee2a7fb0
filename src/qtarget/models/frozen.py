"""Models that are only read: a teacher by name, a frozen copy of the start, or the student with its adapters off."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qtarget.errors import ConfigError


def load_frozen(name_or_path: str, revision: str | None, init_kwargs: dict | None, device: torch.device) -> nn.Module:
    """A causal language model by name, in evaluation mode and without gradients.

    Its dtype is ``init_kwargs["dtype"]``; without one, the checkpoint's own on an accelerator and float32 on a CPU.
    """
    from transformers import AutoModelForCausalLM

    kwargs = dict(init_kwargs or {})
    kwargs.setdefault("dtype", torch.float32 if device.type == "cpu" else "auto")
    if revision is not None:
        kwargs["revision"] = revision
    model: Any = AutoModelForCausalLM.from_pretrained(name_or_path, **kwargs)
    if "device_map" not in kwargs and not getattr(model, "is_quantized", False):
        model = model.to(device)
    return freeze(model)


def frozen_copy(model: nn.Module) -> nn.Module:
    """The weights as they are now, without a forward patched onto the original, which would read the original."""
    twin = copy.deepcopy(model)
    twin.__dict__.pop("forward", None)
    return freeze(twin)


def freeze(model: nn.Module) -> nn.Module:
    return model.eval().requires_grad_(False)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off for the duration; every module gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """A PEFT model as its base was, dropout off."""
    if not hasattr(model, "disable_adapter"):
        raise ConfigError("the reference is the model with its adapters off, but the model has no adapters")
    with evaluation_mode(model), model.disable_adapter():
        yield
