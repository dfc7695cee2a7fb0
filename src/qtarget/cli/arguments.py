"""What a verb takes, declared once, next to the function that does it.

Words are read by the declaration and help is printed from it, docstrings included. Neither argparse nor typer stands
here: words that are no option of a verb are settings of a training run, every fault is to be shown at once and in a
sentence that says how to fix it, and help must answer in a tenth of a second.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from qtarget.errors import ConfigError, check_range, raise_together, unknown

_WIDTH, _MARGIN = 120, 34


@dataclass(frozen=True)
class Kind:
    """What an option's value is.

    Attributes:
        shown: what stands for it in the help; empty: the option has no value and is true where it is given.
        read: (the option's name, the text given) → the value, or ConfigError.
    """

    shown: str
    read: Callable[[str, Any], Any] = lambda name, text: text


FLAG = Kind("")
TEXT = Kind("TEXT")
NAME = Kind("NAME")
FOLDER = Kind("DIR", lambda name, text: Path(text))
FILE = Kind("FILE", FOLDER.read)


def whole(low: int) -> Kind:
    """A whole number from ``low``."""

    def read(name: str, text: Any) -> int:
        try:
            value = int(text)
        except (TypeError, ValueError, OverflowError):
            raise ConfigError(f"{name} is {text!r}; use a whole number from {low}") from None
        if value < low:
            raise ConfigError(f"{name} is {value}; use a whole number from {low}")
        return value

    return Kind("N", read)


def number(low: float | None = None, high: float | None = None, **ends: bool) -> Kind:
    """A number in a range; ``ends`` are those of ``check_range``."""

    def read(name: str, text: Any) -> float:
        try:
            value = int(text) if str(text).lstrip("-").isdecimal() else float(text)
        except (TypeError, ValueError, OverflowError):
            raise ConfigError(f"{name} is {text!r}; use a number") from None
        return check_range(name, value, low, high, **ends)

    return Kind("X", read)


ABOVE_ZERO = number(0, open_low=True)


def one_of(*valid: str) -> Kind:
    """One of some names."""

    def read(name: str, text: Any) -> str:
        if text not in valid:
            raise unknown(name, text, valid)
        return text

    return Kind("|".join(valid), read)


def writable(name: str, text: Any) -> Path:
    """The path, where a file can be written: that is said now and not after the work."""
    out = Path(text)
    if out.is_dir() or not out.absolute().parent.is_dir() or not os.access(out.absolute().parent, os.W_OK):
        raise ConfigError(f"{name} is {str(out)!r}, which cannot be written; name a file in a folder you own")
    return out


NEW_FILE = Kind("FILE", writable)
SWITCH = Kind("true|false", lambda name, text: one_of("true", "false").read(name, text.lower()) == "true")


def only(words: Sequence[str], asked: str) -> str:
    """The one word that stands behind a command; ``asked`` says what is asked for there."""
    if len(words) != 1:
        raise ConfigError(f"{' '.join(words) or 'nothing'} was given; name {asked}")
    return words[0]


@dataclass(frozen=True)
class Option:
    """One option of a command.

    Attributes:
        name: as in ``--name value``; ``output`` is ``-o`` as well. help: what it does. default: where it is not given.
        kind: what its value is. mend: where it must be given, the end of the sentence that says so.
    """

    name: str
    help: str
    kind: Kind = FLAG
    default: Any = None
    mend: str = ""

    @property
    def written(self) -> str:
        """As it stands in a usage line."""
        return f"{'-o' if self.name == 'output' else f'--{self.name}'} {self.kind.shown}".rstrip()

    def lines(self) -> list[str]:
        """Its lines of the help."""
        written = f"-o, --output {self.kind.shown}" if self.name == "output" else self.written
        default = "" if self.default in (None, "") else f" ({self.default})"
        return entry(written, f"{self.help}{default}")


@dataclass(frozen=True)
class Command:
    """What a verb does, or one of the things it does.

    Attributes:
        run: called with the values of the options by name, and ``words``: all other words. Returns the exit status. Its
            docstring says in the help what it does, where a verb does several things.
        word: what it is called behind the verb; empty: the verb itself. options: its own. takes: names it takes beside
            them, as in ``DIR``. settings: whether all other words are the settings of a training run.
    """

    run: Callable[[Any], int]
    word: str
    options: tuple[Option, ...]
    takes: str
    settings: bool

    def read(self, verb: str, words: Sequence[str]) -> SimpleNamespace:
        """The values of the options. Raises ConfigError with every fault."""
        known = {option.name: option for option in self.options}
        values: dict[str, Any] = {
            name: False if option.kind is FLAG else option.default for name, option in known.items()
        }
        others: list[str] = []
        faults: list[str] = []
        pending = iter(words)
        for word in pending:
            name, equals, value = word.removeprefix("--").partition("=")
            name = "output" if word == "-o" else name.replace("-", "_")
            if not (word.startswith("--") or word == "-o") or name not in known:
                if word.startswith("-") and not self.settings:
                    faults += unknown(f"option of {verb}", f"--{name}", [f"--{name}" for name in known]).faults
                elif not self.settings and not self.takes and not (others and others[-1].startswith("-")):
                    faults.append(f"{word!r} belongs to no option; write options of {verb} as --name value")
                others.append(word)
            elif known[name].kind is FLAG:
                values[name] = True
            elif (text := value if equals else next(pending, None)) is None:
                faults.append(f"{word} has no value; write {word} VALUE")
            else:
                try:
                    values[name] = known[name].kind.read(name, text)
                except ConfigError as error:
                    faults += error.faults
        faults += [
            f"{option.name} is not set; {option.mend}"
            for option in self.options
            if option.mend and not values[option.name]
        ]
        raise_together(faults)
        return SimpleNamespace(**values, words=others)

    def usage(self, verb: str) -> str:
        words = [f"qtarget {verb}", self.word, "--config FILE" if self.settings else "", self.takes]
        words += [option.written for option in self.options if option.mend]
        words += ["[options]" if any(not option.mend for option in self.options) else ""]
        return " ".join(word for word in [*words, "[--any_field value ...]" if self.settings else ""] if word)


class Verb:
    """A word behind ``qtarget``: its commands, each declared by ``@verb.command`` above the function that does it.

    Args:
        name: the word. doc: its module's docstring, which is its help. bare: whether it does something without a further
            word. more: makes what the help says behind the options.
    """

    def __init__(self, name: str, doc: str | None, *, bare: bool = False, more: Callable[[], str] | None = None):
        self.name, self.bare, self.more = name, bare, more
        about = (doc or "").partition("``: ")[2].strip()
        self.about = about[:1].upper() + about[1:]
        self.commands: dict[str, Command] = {}

    def command(
        self, *options: Option, word: str = "", takes: str = "", settings: bool = False
    ) -> Callable[[Callable[[Any], int]], Callable[[Any], int]]:
        def declare(run: Callable[[Any], int]) -> Callable[[Any], int]:
            self.commands[word] = Command(run, word, options, takes, settings)
            return run

        return declare

    def __call__(self, words: Sequence[str]) -> int:
        """Read the words and do it. Returns the exit status."""
        if {"-h", "--help"} & {*words} or not (words or self.bare):
            print(self.help(self.more() if self.more else ""), end="")
            return 0
        words = list(words)
        word = words.pop(0) if words and words[0] in self.commands else ""
        named = [name for name in self.commands if name]
        if not word and named and ((words and not words[0].startswith("-")) or "" not in self.commands):
            raise unknown(f"word after {self.name}", words[0], named)
        command = self.commands[word]
        return command.run(command.read(self.name, words))

    def help(self, more: str = "") -> str:
        commands = [*self.commands.values()]
        usages = [f"{' ' * 7 if number else 'usage: '}{one.usage(self.name)}" for number, one in enumerate(commands)]
        parts = ["\n".join(usages), self.about]
        for command in commands:
            lines = [line for option in command.options for line in option.lines()]
            if command.word:
                about = " ".join((command.run.__doc__ or "").split())
                lines = textwrap.wrap(f"{command.word}: {about}", _WIDTH) + lines
            parts.append("\n".join(lines))
        if not more and any(command.settings for command in commands):
            parts.append("Any setting of a training run can also be given as --name value: see qtarget train --help")
        return "\n\n".join(part for part in [*parts, more] if part).rstrip("\n") + "\n"


def entry(name: str, text: str) -> list[str]:
    """A name and what it is, as lines of a help."""
    indent = " " * _MARGIN
    head = f"  {name}  ".ljust(_MARGIN)
    return textwrap.wrap(
        f"{head}{text}", _WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
