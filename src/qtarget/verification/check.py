"""What a check is, and what it can find."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qtarget.verification.subject import Subject

PASS, FAIL, NOT_APPLICABLE = "pass", "fail", "not applicable"


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        status: PASS, FAIL or NOT_APPLICABLE. told: the figures in words, or why it does not apply.
        figures: the same as numbers, by name. hint: in place of the check's own.
    """

    status: str
    told: str
    figures: dict[str, Any] = field(default_factory=dict)
    hint: str | None = None


@dataclass(frozen=True)
class Check:
    """One promise, held against the user's own model, rows and target.

    Attributes:
        name: as tables and JSON call it. promise: what must hold, a sentence without its stop. hint: what to look at
            where it does not. run: looks. of_gradient: whether it divides by a gradient, and says nothing where that
            is nothing.
    """

    name: str
    promise: str
    hint: str
    run: Callable[[Subject], Finding]
    of_gradient: bool = False


def check(name: str, hint: str, of_gradient: bool = False) -> Callable[[Callable[[Subject], Finding]], Check]:
    """Makes a function a check, with its docstring as the promise."""

    def checked(run: Callable[[Subject], Finding]) -> Check:
        promise = " ".join((run.__doc__ or "").split()).rstrip(".")
        return Check(name, promise[:1].lower() + promise[1:], hint, run, of_gradient)

    return checked


def worst(errors: Mapping[Any, float]) -> Any:
    """The name of the largest error; NaN is larger than any, which ``max`` would pass over."""
    return max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])


def not_applicable(why: str, **figures: Any) -> Finding:
    return Finding(NOT_APPLICABLE, why, figures)


def within(error: float, allowed: float, told: str, **figures: Any) -> Finding:
    """A pass where ``error`` is at most ``allowed``; NaN is none."""
    status = PASS if error <= allowed else FAIL
    return Finding(status, told, {"error": error, "allowed": allowed, **figures})


def expect(holds: bool, told: str, **figures: Any) -> Finding:
    return Finding(PASS if holds else FAIL, told, figures)
