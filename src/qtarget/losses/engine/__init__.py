"""Ways to compute the engine's chunks, and the rule that picks one."""

from __future__ import annotations

from qtarget.errors import unknown


def available() -> list[str]:
    """Names of the backends that can run here."""
    return ["torch"]


def pick(name: str) -> str:
    """The backend for ``backend=name``; "auto" takes the fastest that can run."""
    if name == "auto":
        return "torch"
    if name not in available():
        raise unknown("backend", name, ["auto", *available()])
    return name
