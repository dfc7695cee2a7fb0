"""A verb's own options beside the settings of a training config."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qtarget.errors import ConfigError


def take(words: Sequence[str], own: dict[str, Any], flags: Sequence[str] = ()) -> tuple[dict[str, Any], list[str]]:
    """({option: value or its default}, all other words).

    Args:
        own: name → default of options with a value; ``-o`` is ``output``. flags: names of options without one.

    Raises:
        ConfigError: an option without its value.
    """
    given = {**own, **dict.fromkeys(flags, False)}
    rest: list[str] = []
    pending = iter(words)
    for word in pending:
        name, equals, value = word.removeprefix("--").partition("=")
        name = "output" if word == "-o" else name.replace("-", "_")
        if not (word.startswith("--") or word == "-o") or name not in given:
            rest.append(word)
        elif name in flags:
            given[name] = True
        else:
            found = value if equals else next(pending, None)
            if found is None:
                raise ConfigError(f"{word} stands without its value; write {word} VALUE")
            given[name] = found
    return given, rest


def whole(name: str, value: Any, low: int) -> int:
    """A whole number from ``low``, or ConfigError."""
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{name} is {value!r}; use a whole number from {low}") from None
    if number < low:
        raise ConfigError(f"{name} is {number}; use a whole number from {low}")
    return number


def number(name: str, value: Any) -> float:
    """A number, or ConfigError."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{name} is {value!r}; use a number") from None


def writable(name: str, out: Path) -> None:
    """Raise ConfigError now, where a file cannot be written after the work."""
    if out.is_dir() or not out.absolute().parent.is_dir() or not os.access(out.absolute().parent, os.W_OK):
        raise ConfigError(f"{name} is {str(out)!r}, which cannot be written; name a file in a folder you own")
