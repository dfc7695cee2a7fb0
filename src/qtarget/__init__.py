"""qtarget: what each token is taught.

    rows → data → hidden states → losses(target) → loss + stats → training | lens → report | evaluation

The names below are loaded when first used, so that ``qtarget --help`` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "Head": "qtarget.losses",
    "LossOutput": "qtarget.losses",
    "TopK": "qtarget.losses",
    "linear_target_loss": "qtarget.losses",
    "target_distribution": "qtarget.losses",
    "target_loss": "qtarget.losses",
    "InducedTarget": "qtarget.targets.induced",
    "induced_target": "qtarget.targets.induced",
    "Target": "qtarget.targets",
    "QTargetConfig": "qtarget.training",
    "QTargetTrainer": "qtarget.training",
    "ConfigError": "qtarget.errors",
    "DataError": "qtarget.errors",
    "NonFiniteLogits": "qtarget.errors",
    "QTargetError": "qtarget.errors",
    "StorageError": "qtarget.errors",
}
_MODULES = {
    "presets": "qtarget.targets.presets",
    "residual": "qtarget.targets.residual",
    "trust": "qtarget.targets.trust",
}

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
    "TopK",
    "induced_target",
    "linear_target_loss",
    "preset",
    "presets",
    "residual",
    "target_distribution",
    "target_loss",
    "trust",
]

if TYPE_CHECKING:
    from qtarget.errors import ConfigError, DataError, NonFiniteLogits, QTargetError, StorageError
    from qtarget.losses import Head, LossOutput, TopK, linear_target_loss, target_distribution, target_loss
    from qtarget.targets import Target, presets, residual, trust
    from qtarget.targets.induced import InducedTarget, induced_target
    from qtarget.targets.presets import build as preset
    from qtarget.training import QTargetConfig, QTargetTrainer


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value: Any = importlib.import_module(_MODULES[name])
    elif name == "preset":
        value = importlib.import_module("qtarget.targets.presets").build
    elif name in _WHERE:
        value = getattr(importlib.import_module(_WHERE[name]), name)
    else:
        raise AttributeError(f"module 'qtarget' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
