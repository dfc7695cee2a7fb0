"""Python in a process of its own where packages are not installed, as far as it can tell."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Collection

# A finder returns None for what it does not find: find_spec and import both take that for not installed.
_BEGIN = """
import sys
from importlib.machinery import PathFinder

missing, only = {missing!r}, {only!r}

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        root = name.partition(".")[0]
        allowed = only is None or root in only or root in sys.stdlib_module_names or root.startswith("_sysconfigdata")
        return PathFinder.find_spec(name, path, target) if allowed and root not in missing else None

sys.meta_path = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
"""


def python(
    code: str, *, missing: Collection[str] = (), only: Collection[str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``code`` where ``missing`` is not installed, nor anything but ``only`` and the standard library."""
    begin = _BEGIN.format(missing=sorted(missing), only=None if only is None else sorted(only))
    return subprocess.run([sys.executable, "-c", begin + code], capture_output=True, text=True)


def verb(*words: str, **blocked: Collection[str] | None) -> subprocess.CompletedProcess[str]:
    """``qtarget WORDS`` there."""
    return python(f"from qtarget.cli.__main__ import main; sys.exit(main({list(words)!r}))", **blocked)


def with_what_it_needs(package: str) -> set[str]:
    """The modules of a package and of what it requires, extras left out."""
    of = importlib.metadata.packages_distributions()
    pending, seen = [package], set()
    while pending:
        name = pending.pop().replace("_", "-").lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # of another platform
            continue
        pending += [found[0] for line in lines if "extra ==" not in line and (found := re.match(r"[\w.-]+", line))]
    return {module for module, names in of.items() if any(name.replace("_", "-").lower() in seen for name in names)}
