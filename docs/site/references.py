"""Which names the reference describes, and whether every public one is among them and has a description."""

from __future__ import annotations

import pkgutil
import re
from pathlib import Path

import qtarget as qt

FOLDER = Path(__file__).resolve().parent.parent / "reference"


def identifiers() -> list[str]:
    """Those of the lines ``::: qtarget...`` on the reference's pages."""
    texts = (page.read_text(encoding="utf-8") for page in sorted(FOLDER.glob("*.md")))
    return [name for text in texts for name in re.findall(r"^::: (\S+)$", text, re.M)]


def faults() -> list[str]:
    """A sentence for each public name that is on no page, or that has no docstring of its own."""
    described = [pkgutil.resolve_name(name) for name in identifiers()]
    found = []
    for name in qt.__all__:
        public = getattr(qt, name)
        if not any(public is one for one in described):
            found.append(f"qtarget.{name} is on no page of docs/reference; add a line ::: with where it is defined")
        written = public.__doc__ or ""
        if not written or written.startswith(f"{name}("):  # the signature, which dataclasses put there
            found.append(f"qtarget.{name} has no docstring; write one")
    return found
