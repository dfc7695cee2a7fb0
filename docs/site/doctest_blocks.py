"""Griffe's extension: examples in docstrings, lines with >>>, become blocks of code."""

from __future__ import annotations

import griffe


class DoctestBlocks(griffe.Extension):
    """In Markdown >>> would be three quotations in each other."""

    def on_instance(self, *, obj, **kwargs) -> None:
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(text: str) -> str:
    """The text with a fence around each example; an example ends with an empty line."""
    lines, inside = [], False
    for line in [*text.splitlines(), ""]:
        starts, ends = line.startswith(">>>") and not inside, inside and not line.strip()
        lines += ["```pycon", line] if starts else ["```", line] if ends else [line]
        inside = (inside or starts) and not ends
    return "\n".join(lines).rstrip()
