"""A notebook as a page: its text, its code, and what the code gave as it is stored."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable

import run_notebook


def markdown(notebook: str, linked: Callable[[str], str]) -> str:
    """The page of a notebook's JSON.

    A picture is part of the page, no file. What it shows is said by its cell's first line, which is a comment.

    Args:
        linked: turns the links of a text cell into the site's.
    """
    parts = []
    for cell in json.loads(notebook)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(linked(source))
            continue
        parts.append(_fence("python", source))
        if text := run_notebook.printed(cell["outputs"]):
            parts.append(_fence("{ .text .qt-output }", text))
        said = source.partition("\n")[0].removeprefix("# ")
        for picture in run_notebook.pictures(cell["outputs"]):
            parts.append(f"![{said}](data:image/png;base64,{base64.b64encode(picture).decode()})")
    return "\n\n".join(parts) + "\n"


def _fence(language: str, text: str) -> str:
    return f"```{language}\n{text.strip(chr(10))}\n```"
