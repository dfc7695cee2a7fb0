"""The trained rows in a terminal: figures, and texts with their trained tokens marked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qtarget.cli import terminal
from qtarget.cli.arguments import Option, whole

if TYPE_CHECKING:
    from qtarget.data.picture import Picture

SHOW_ROWS = Option("show_rows", "rows shown as text, their trained tokens marked; 0: none", whole(0), 1)
_LONGEST = 2000  # characters of a row; of a longer one the beginning and the end are shown
_MARKS = ("«", "»")  # where there are no colours


def show(picture: Picture, rows: int) -> None:
    """Print it. rows: shown as text."""
    for what, text in _lines(picture):
        terminal.tell(what, text)
    for sentence in picture.warnings:
        terminal.tell("warning", sentence)
    picture.printed = True
    for row, tokens, spans in picture.spans(rows):
        _show_row(row, tokens, spans)


def _lines(picture: Picture) -> list[tuple[str, str]]:
    of = f" of {picture.given:,}" if picture.dropped else ""
    read = "the first rows of a stream: " if picture.of_stream else ""
    share = f", {picture.trained / picture.tokens:.1%}" if picture.tokens else ""
    lines = [
        ("trained", f"{read}{picture.trained:,} of {picture.tokens:,} tokens{share}, in {picture.rows:,}{of} rows"),
        ("by role", picture.by_role),
    ]
    if picture.untrained:
        fate = f"; {picture.dropped:,} of them are dropped" if picture.dropped else ""
        lines.append(("untrained", f"{picture.untrained:,} rows have no trained token and teach nothing{fate}"))
    for number, end in enumerate(picture.ends):
        stops = "generation stops at it" if end.stops else "generation does not stop at it"
        lines.append(("" if number else "ends with", f"{end} in {end.rows:,} of {picture.ended:,} rows; {stops}"))
    return lines


def _show_row(row: int, tokens: int, spans: list[tuple[str, bool]]) -> None:
    from rich.padding import Padding
    from rich.text import Text

    console = terminal.console(120)
    coloured = console.is_terminal and console.color_system is not None and not console.no_color
    marks = ("", "") if coloured else _MARKS
    text = Text()
    for part, trained in _shortened(spans):
        shown = _printable(part)
        if trained:
            text.append(f"{marks[0]}{shown}{marks[1]}", style="green")
        else:
            text.append(shown, style="dim")
    legend = "trained in green" if coloured else f"trained between {' and '.join(_MARKS)}"
    print(f"  row {row}, {tokens:,} tokens, {legend}:")
    for line in text.split("\n"):
        if console.is_terminal:
            console.print(Padding(line, (0, 0, 0, 4)))
        else:
            console.print(Text("    ") + line, soft_wrap=True)


def _shortened(spans: list[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """The beginning and the end of a long row."""
    total = sum(len(text) for text, _ in spans)
    if total <= _LONGEST:
        return spans
    shown, place, half = [], 0, _LONGEST // 2
    for text, trained in spans:
        head, tail = text[: max(0, half - place)], text[max(0, total - half - place) :]
        shown += [(head, trained)] * bool(head)
        if place < half <= place + len(text):
            shown.append((f" [... {total - 2 * half:,} characters ...] ", False))
        shown += [(tail, trained)] * bool(tail)
        place += len(text)
    return shown


def _printable(text: str) -> str:
    """Nothing that a terminal would obey but line breaks."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\u{{{ord(c):x}}}" for c in text)
