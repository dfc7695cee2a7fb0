"""Errors a user can act on: each names the field, the value and the fix."""

from __future__ import annotations

import contextlib
import difflib
import math
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from qtarget import extras, hub

if TYPE_CHECKING:
    from qtarget.losses.inputs import Tokens

# Names that an error lists.
_LISTED = 30
# Letters of a library's own words in a sentence.
_LONGEST = 400
# A data loader's worker sends its traceback for a message; the error stands in its last lines.
_OF_A_WORKER = re.compile(r"Caught \w+ in DataLoader worker process .*\n[\w.]+: (.*)", re.DOTALL)


class QTargetError(Exception):
    """Base of every error that qtarget raises on purpose; it can hold several faults, shown together.

    Args:
        faults: sentences, each naming a field, its value and the fix.
    """

    def __init__(self, faults: str | Sequence[str]):
        self.faults = [_OF_A_WORKER.sub(r"\1", faults).strip()] if isinstance(faults, str) else list(faults)
        super().__init__("\n".join(self.faults))

    def during(self, what: str) -> None:
        """Put ``what`` before each fault; the kind of the error and its attributes stay."""
        self.faults = [f"{what}: {fault}" for fault in self.faults]
        self.args = ("\n".join(self.faults),)


class ConfigError(QTargetError, ValueError):
    """An invalid setting or argument. Catching it also catches its subclasses below."""


class DataError(ConfigError):
    """Rows or columns that cannot be trained on, or do not belong to the run."""


class StorageError(ConfigError):
    """A file or folder that cannot be read or written, such as a full disk, a damaged file or another run's folder."""


class MissingPackage(QTargetError, ImportError):
    """A package that a part of qtarget needs is not installed; names the extra that brings it."""


class NonFiniteLogits(ConfigError):
    """NaN or infinite logits at a supervised token.

    Args:
        what: whose logits. token: number of the supervised token. tokens: the batch's ``Tokens``.
        mend: what to do before anything else, as the target has it (``Target.on_ruled_out``).

    Attributes:
        row, position: where in the labels; ``position`` is None where they have one dimension.
    """

    def __init__(self, what: str, token: int, tokens: Tokens, mend: str = ""):
        place = token if tokens.index is None else int(tokens.index[token])
        self.what = what
        self.row: int = place
        self.position: int | None = None
        if len(tokens.shape) > 1:
            self.row, self.position = divmod(place, tokens.shape[-1])
        where = f"row {self.row}" + ("" if self.position is None else f", position {self.position}")
        super().__init__(
            f"{what} are NaN or infinite at {where}; {mend}lower the learning rate, check the data of that row, "
            "or train in float32 or bfloat16 instead of float16"
        )


def raise_together(faults: Iterable[str], kind: type[QTargetError] = ConfigError) -> None:
    """Raise one error with every fault, each once; nothing where there is none."""
    if faults := list(dict.fromkeys(faults)):
        raise kind(faults)


def faults_of(check: Callable[..., object], *arguments: Any, **named: Any) -> list[str]:
    """What a check raises as ConfigError, a sentence each; none where it passes."""
    try:
        check(*arguments, **named)
    except ConfigError as error:
        return error.faults
    return []


def unknown(field: str, got: object, valid: Iterable[str]) -> ConfigError:
    """The error for a name that is not on a list: offers the nearest one and the list, of a long one the nearest."""
    valid = sorted(valid)
    near = difflib.get_close_matches(str(got), valid, n=1, cutoff=0.5)
    mend = f"did you mean {near[0]!r}? " if near else ""
    shown, more = valid, ""
    if len(valid) > _LISTED:
        shown = difflib.get_close_matches(str(got), valid, n=_LISTED // 2, cutoff=0.0)
        more = f" and {len(valid) - len(shown)} more"
    return ConfigError(f"{field} is {got!r}; {mend}valid: {', '.join(shown)}{more}")


def check_range(
    field: str,
    value: object,
    low: float | None = None,
    high: float | None = None,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> float:
    """Return ``value`` as a float, or raise with the range it must lie in."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise ConfigError(f"{field} is {value!r}; use a number")
    try:
        infinite = math.isinf(value)
    except OverflowError:  # a whole number beyond what a float holds
        infinite = True
    if infinite:
        raise ConfigError(f"{field} is {value!r}; use a finite number")
    too_low = low is not None and (value <= low if open_low else value < low)
    too_high = high is not None and (value >= high if open_high else value > high)
    if too_low or too_high:
        left = "any number" if low is None else f"{'above' if open_low else 'from'} {low:g}"
        right = "" if high is None else f" {'below' if open_high else 'to'} {high:g}"
        raise ConfigError(f"{field} is {value!r}; use a number {left}{right}".replace("number any number", "number"))
    return float(value)


def check_bool(field: str, value: object) -> None:
    """Raise unless ``value`` is true or false."""
    if not isinstance(value, bool):
        raise ConfigError(f"{field} is {value!r}; use true or false")


@contextlib.contextmanager
def importing(what: str) -> Iterator[None]:
    """A package of an extra that is not installed becomes one sentence; ``what`` needs it."""
    try:
        yield
    except ImportError as error:
        if said := extras.missing(what, error):
            raise MissingPackage(said) from error
        raise


@contextlib.contextmanager
def loading(field: str, name: object, what: str = "") -> Iterator[None]:
    """Whatever a library raises for a folder or hub id that it cannot read becomes one sentence.

    A name that leads nowhere is refused before a library asks the hub for it.

    Args:
        field: the setting. name: its value. what: the part that is loaded, such as ``tokenizer``; none: all of it.
    """
    if isinstance(name, str) and (why := hub.nowhere(name)):
        raise ConfigError(f"{field} is {name!r}, which cannot be loaded: {why}")
    try:
        yield
    except QTargetError:
        raise
    except Exception as error:  # a missing file, broken JSON, half a file, another shape: many kinds
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"{field} is {name!r}, which brings code of its own; read it, then set trust_remote_code: true to run it"
            ) from error
        part = f"whose {what}" if what else "which"
        raise ConfigError(f"{field} is {name!r}, {part} cannot be loaded: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """What an error of a library says, and what it was raised from, on one line and not over a page."""
    text = _words(error)
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if (root := str(cause)).strip() and "Traceback" not in root and " ".join(root.split()) not in text:
        text = f"{text}: {' '.join(root.split())}"
    # What it is about stands at the beginning, what to do at the end.
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"


def _words(error: BaseException) -> str:
    text = " ".join(_OF_A_WORKER.sub(r"\1", str(error)).split())
    if isinstance(error, pickle.UnpicklingError):
        text = "it is a pickle that asks for more than tensors; use weights in safetensors"
    elif not isinstance(error, (OSError, ValueError, ImportError)):
        text = f"{type(error).__name__}: {text}"
    return text or type(error).__name__
