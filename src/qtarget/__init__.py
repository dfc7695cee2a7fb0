"""qtarget: what each token is taught.

    rows → data → hidden states → losses(target) → loss + stats → training | lens → report | evaluation

The names below are loaded when first used, so that ``qtarget --help`` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

_NAMES = {
    "qtarget.losses": ("Head", "LossOutput", "TopK", "linear_target_loss", "target_distribution", "target_loss"),
    "qtarget.targets": ("Target", "divergence", "presets", "residual", "trust"),
    "qtarget.targets.induced": ("InducedTarget", "induced_target"),
    "qtarget.targets.presets": ("preset",),
    "qtarget.models.applied": ("applied_to", "apply_target", "remove_target"),
    "qtarget.integrations.callback": ("TargetCallback",),
    "qtarget.training": ("QTargetConfig", "QTargetTrainer"),
    "qtarget.errors": ("ConfigError", "DataError", "NonFiniteLogits", "QTargetError", "StorageError"),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "ConfigError",
    "DataError",
    "Head",
    "InducedTarget",
    "LossOutput",
    "NonFiniteLogits",
    "QTargetConfig",
    "QTargetError",
    "QTargetTrainer",
    "StorageError",
    "Target",
    "TargetCallback",
    "TopK",
    "applied_to",
    "apply_target",
    "divergence",
    "induced_target",
    "linear_target_loss",
    "preset",
    "presets",
    "remove_target",
    "residual",
    "target_distribution",
    "target_loss",
    "trust",
]

if TYPE_CHECKING:
    from qtarget.errors import ConfigError, DataError, NonFiniteLogits, QTargetError, StorageError
    from qtarget.integrations.callback import TargetCallback
    from qtarget.losses import Head, LossOutput, TopK, linear_target_loss, target_distribution, target_loss
    from qtarget.models.applied import applied_to, apply_target, remove_target
    from qtarget.targets import Target, divergence, presets, residual, trust
    from qtarget.targets.induced import InducedTarget, induced_target
    from qtarget.targets.presets import build as preset
    from qtarget.training import QTargetConfig, QTargetTrainer


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'qtarget' has no attribute {name!r}")
    from qtarget.errors import importing

    with importing(f"qtarget.{name}"):
        value = getattr(importlib.import_module(_MODULE_OF[name]), "build" if name == "preset" else name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
