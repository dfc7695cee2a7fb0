"""Griffe's extension: forms of docstrings that the house has and Markdown or Google's style has not."""

from __future__ import annotations

import re

import griffe

_SECTION = re.compile(r"^(?:Args|Attributes):\n(?:(?: {4}.*)?\n)+", re.M)
_SECOND_ENTRY = re.compile(r"(?<=\.) (?=[a-z_]\w*(?:, [a-z_]\w*)*: )")
_TWO_NAMES = re.compile(r"^( {4}\w+), (?=\w+(?:, \w+)*: )", re.M)


class DocstringForms(griffe.Extension):
    """On every docstring as it is read."""

    def on_instance(self, *, obj, **kwargs) -> None:
        if obj.docstring is not None:
            obj.docstring.value = fenced(entries(obj.docstring.value))


def entries(text: str) -> str:
    """Entries that share a line get one each; names that share an entry are kept together by a no-break space."""

    def section(found: re.Match) -> str:
        lines = re.sub(r"\n {8,}(?=\S)", " ", found[0])  # a continued entry on one line, so that it can be split
        return _TWO_NAMES.sub("\\1,\u00a0", _SECOND_ENTRY.sub("\n    ", lines))

    return _SECTION.sub(section, f"{text}\n").rstrip()


def fenced(text: str) -> str:
    """A fence around each example, which ends with an empty line: in Markdown >>> would be three quotations."""
    lines, indent, inside = [], "", False
    for line in [*text.splitlines(), ""]:
        starts, ends = line.lstrip().startswith(">>>") and not inside, inside and not line.strip()
        if starts:
            indent = line[: len(line) - len(line.lstrip())]
        shown = re.sub(r" +# doctest: .*", "", line)  # an instruction to the test runner
        lines += [f"{indent}```pycon", shown] if starts else [f"{indent}```", shown] if ends else [shown]
        inside = (inside or starts) and not ends
    return "\n".join(lines).rstrip()
