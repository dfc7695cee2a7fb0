"""Imports code of the user's own by its path, as ``my_pkg.my_module:name``."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from qtarget.errors import ConfigError

# Where own code may lie beside what is installed: the command line's current folder and that of its config file.
FOLDERS: ContextVar[tuple[str, ...]] = ContextVar("FOLDERS", default=())


def look_in(folder: str | Path) -> None:
    """Find own code in this folder too, after those that are searched already."""
    if (found := str(Path(folder).absolute())) not in FOLDERS.get():
        FOLDERS.set((*FOLDERS.get(), found))


def load_object(path: str, field: str) -> Any:
    """What ``my_pkg.my_module:name`` points to. Importing runs the module: only for a path that the user wrote.

    Raises:
        ConfigError: it is no such path, or the module cannot be imported, whatever it raises.
    """
    module_name, _, attribute = path.partition(":")
    is_file = module_name.endswith(".py") or "/" in module_name
    if is_file or not all(part.isidentifier() for part in (*module_name.split("."), attribute)):
        mend = "a module is named without folder and .py: " if is_file else ""
        raise ConfigError(f"{field} is {path!r}; {mend}write the path of an object, my_pkg.my_module:name")
    try:
        with _searched():
            module = importlib.import_module(module_name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # what a module does when it is imported is its own: it may even exit
        why = str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
        missing = isinstance(error, ModuleNotFoundError) and error.name == module_name.partition(".")[0]
        searched = f" among installed packages or in {' or '.join(FOLDERS.get())}" if missing and FOLDERS.get() else ""
        raise ConfigError(
            f"{field} is {path!r}, but importing {module_name} failed: {why}{searched}; mend that, or check the path"
        ) from error
    if not hasattr(module, attribute):
        if hidden := _hidden_by(module):
            raise ConfigError(
                f"{field} is {path!r}, but {module_name} is an installed module, which comes before {hidden}; rename "
                "that file"
            )
        near = difflib.get_close_matches(attribute, vars(module), n=1)
        mend = f"did you mean {near[0]!r}?" if near else "name something it has"
        raise ConfigError(f"{field} is {path!r}, but {module_name} has no {attribute!r}; {mend}")
    return getattr(module, attribute)


@contextmanager
def _searched() -> Iterator[None]:
    """The folders at the end of the path, so that nothing in them stands for an installed package."""
    added = [folder for folder in FOLDERS.get() if folder not in sys.path]
    sys.path.extend(added)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = [folder for folder in sys.path if folder not in added]


def _hidden_by(module: Any) -> Path | None:
    """The user's file that an installed module of the same name comes before."""
    found = getattr(module, "__file__", None)
    for folder in map(Path, FOLDERS.get()):
        for file in (folder / f"{module.__name__}.py", folder / module.__name__ / "__init__.py"):
            if file.is_file() and (found is None or not file.samefile(found)):
                return file
    return None
