"""Models that are only read: by name, a copy of the initial model, or with adapters off."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from qtarget.errors import ConfigError
from qtarget.models.forward import add_target_forward, head_parameters
from qtarget.models.loading import load_causal_lm


def load_frozen(name_or_path: str, revision: str | None, init_kwargs: dict | None, device: torch.device) -> nn.Module:
    """A causal language model or an adapter by name, in evaluation mode and without gradients.

    Its dtype is ``init_kwargs["dtype"]``; without one, the checkpoint's own on an accelerator and float32 on a CPU.
    """
    kwargs = {"dtype": torch.float32 if device.type == "cpu" else "auto", **(init_kwargs or {})}
    model: Any = load_causal_lm(name_or_path, revision or kwargs.pop("revision", None), **kwargs)
    if "device_map" not in kwargs and not getattr(model, "is_quantized", False):
        model = model.to(device)
    return freeze(model)


def copy_of_the_start(student: nn.Module) -> nn.Module:
    """The reference, where none is named: the model as it starts, frozen.

    Raises:
        ConfigError: this process does not hold all weights.
    """
    if any(parameter.is_meta for parameter in student.parameters()):
        raise ConfigError(
            "the reference is the initial model, but this process holds no weights to copy (FSDP's "
            "cpu_ram_efficient_loading); set reference_model_name_or_path to the model's own name"
        )
    if is_deepspeed_zero3_enabled():
        raise ConfigError(
            "the reference is the initial model, which ZeRO-3 keeps in pieces; set reference_model_name_or_path to "
            "the model's own name, or use ZeRO-2 or FSDP2"
        )
    twin = copy.deepcopy(student)
    for patched in ("forward", "_qtarget_forward"):  # the patched forward would read the original
        twin.__dict__.pop(patched, None)
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


def place_as_student(model: nn.Module, role: str, accelerator: Any, device: torch.device) -> nn.Module:
    """The model frozen, on the student's device or in pieces as the student is, and able to hand out hidden states.

    Args:
        model: a causal language model. role: teacher or reference, as errors call it. accelerator: the run's.

    Raises:
        ConfigError: it is prompt tuning, or ``device_map`` put its head on another device than the student's.
    """
    freeze(model)
    kind = getattr(model, "active_peft_config", None)
    if kind is not None and kind.is_prompt_learning:
        raise ConfigError(
            f"the {role} is an adapter of kind {kind.peft_type.value}, whose virtual prompt would be shared by packed "
            "documents; name a whole model, or an adapter of another kind, such as LoRA"
        )
    plain: Any = getattr(model, "get_base_model", lambda: model)()  # of an adapter
    add_target_forward(plain)
    head = head_parameters(plain)[0]
    if getattr(accelerator.state, "deepspeed_plugin", None) is not None:
        from trl.models.utils import prepare_deepspeed

        return prepare_deepspeed(model, accelerator)
    if getattr(accelerator.state, "fsdp_plugin", None) is not None:
        return _sharded(model, accelerator)
    if getattr(model, "hf_device_map", None) is None:
        return model.to(device)
    if head.device.type != torch.device(device).type:
        raise ConfigError(
            f"{role}_model_init_kwargs.device_map puts the {role}'s head on {head.device.type!r}, but the loss needs "
            f"it on the student's device, {str(device)!r}; leave device_map out, or map the head to that device"
        )
    return model


def _sharded(model: nn.Module, accelerator: Any) -> nn.Module:
    """By FSDP, layer by layer as the student is."""
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version == 1:
        from trl.models.utils import prepare_fsdp

        sharded: Any = prepare_fsdp(model, accelerator)
        return sharded
    # TRL's would make one group of it, so that every forward gathers the whole model.
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    policy = plugin.auto_wrap_policy  # set to the layers of whichever model comes first
    try:
        return fsdp2_prepare_model(accelerator, model).eval()
    finally:
        plugin.auto_wrap_policy = policy


def name_and_fingerprint(model: Any) -> str:
    """What to call a model that was handed over and not named: its name if it has one, and its weights."""
    return f"{loaded_from(model) or type(model).__name__}, weights {fingerprint(model)}"


def loaded_from(model: Any) -> str:
    """The folder or hub id of a model or of an adapter; empty where it was made in memory."""
    own = getattr(model, "loaded_from", None)
    return str(own or getattr(getattr(model, "config", None), "_name_or_path", "") or "")


def fingerprint(model: nn.Module, trained: bool = False) -> str:
    """Eight digits that tell other weights of the same shape: of the first numbers of every parameter, or of those
    that are ``trained``."""
    digest = hashlib.sha256()
    for parameter in (one for one in model.parameters() if one.requires_grad or not trained):
        digest.update(parameter.detach().flatten()[:64].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:8]
