"""What rules and residuals have in common: a name, by which YAML writes them."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

C = TypeVar("C", bound=type)


class Part:
    """Base of rules and residuals.

    A class with parameters is a frozen dataclass; they are written and read by the names of its fields. One without a
    name of its own is written as ``my_pkg.my_module:MyClass``.
    """

    name: ClassVar[str] = ""
    known: ClassVar[dict[str, Any]]  # of the kind, by name

    @property
    def label(self) -> str:
        """What messages call it."""
        return self.name or type(self).__name__


def named(name: str):
    """Class decorator: known by this name among its kind."""

    def add(cls: C) -> C:
        cls.name = name  # type: ignore[attr-defined]
        cls.known[name] = cls  # type: ignore[attr-defined]
        return cls

    return add
