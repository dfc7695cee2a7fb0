"""The teacher's settings as one mapping, `teacher: {model: ...}`, which is stored flat."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from qtarget import files
from qtarget.errors import ConfigError, raise_together, unknown

# key of the mapping → the setting it stands for
SETTINGS = {
    "model": "teacher_model_name_or_path",
    **{key: f"teacher_model_{key}" for key in ("revision", "init_kwargs")},
    "models": "teachers",
    **{key: f"teacher_{key}" for key in ("cache", "tail", "ema_decay", "context", "end_token", "check_rows")},
}


def flat(value: Any) -> dict[str, Any]:
    """The settings that a mapping stands for; text is the model.

    >>> flat({"model": "org/large", "tail": "even"})
    {'teacher_model_name_or_path': 'org/large', 'teacher_tail': 'even'}

    Raises:
        ConfigError: with every unknown key, or a value that is neither text nor a mapping.
    """
    if value is None:
        return {}
    value = from_json(value)
    if isinstance(value, str):
        value = {"model": value}
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"teacher is {value!r}; write a folder or hub id, or a mapping, as in {{model: org/name, tail: even}}"
        )
    raise_together(
        fault for key in value if key not in SETTINGS for fault in unknown("teacher's key", key, SETTINGS).faults
    )
    return {SETTINGS[key]: inner for key, inner in value.items()}


def from_json(value: Any) -> Any:
    """A mapping that is written as JSON text, as Transformers takes its own; whatever else it is, as it is."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        with contextlib.suppress(ValueError):
            return files.loads(value)
    return value


def twice(setting: str, inside: Any, beside: Any) -> str:
    """The sentence for a setting that was given in the mapping and by its own name."""
    key = next(key for key, name in SETTINGS.items() if name == setting)
    return f"teacher.{key} is {inside!r} and {setting} is {beside!r}; keep one of them"


def spread(config: Any) -> list[str]:
    """Move ``config.teacher`` into the settings it stands for; what is wrong with it, a sentence each.

    A setting that has its default counts as not given.
    """
    try:
        given = flat(config.teacher)
    except ConfigError as error:
        return error.faults
    faults = []
    for setting, value in given.items():
        beside = getattr(config, setting)
        if beside not in (getattr(type(config), setting), value):
            faults.append(twice(setting, value, beside))
        setattr(config, setting, value)
    config.teacher = None
    return faults
