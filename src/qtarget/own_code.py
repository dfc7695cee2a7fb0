"""Where the user's own code may be, in addition to and after installed packages."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

# The command line's current folder and that of its config file.
FOLDERS: ContextVar[tuple[str, ...]] = ContextVar("FOLDERS", default=())

_IMPORTED: dict[str, str] = {}  # module → the folder it was found in


def look_in(folder: str | Path) -> None:
    """Find own code in this folder too, after those that are searched already."""
    if (found := str(Path(folder).absolute())) not in FOLDERS.get():
        FOLDERS.set((*FOLDERS.get(), found))


@contextmanager
def searched() -> Iterator[None]:
    """The folders at the end of the path, so that nothing in them stands for an installed package.

    What an earlier call imported from a folder that is no longer among them is forgotten: its name may be another's here.
    """
    for name in [name for name, folder in _IMPORTED.items() if folder not in FOLDERS.get()]:
        del _IMPORTED[name]
        sys.modules.pop(name, None)
    added, before = [folder for folder in FOLDERS.get() if folder not in sys.path], {*sys.modules}
    sys.path.extend(added)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = [folder for folder in sys.path if folder not in added]
        for name in {*sys.modules} - before:
            file = getattr(sys.modules[name], "__file__", None) or ""
            for folder in added:
                if Path(folder) in Path(file).parents:
                    _IMPORTED[name] = folder


def hidden_by(module: Any) -> Path | None:
    """The user's file that an installed module of the same name comes before."""
    found = getattr(module, "__file__", None)
    for folder in map(Path, FOLDERS.get()):
        for file in (folder / f"{module.__name__}.py", folder / module.__name__ / "__init__.py"):
            if file.is_file() and (found is None or not file.samefile(found)):
                return file
    return None
