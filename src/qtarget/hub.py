"""Folders and hub ids: does a name exist, before a library tries to load it."""

from __future__ import annotations

import difflib
import functools
import re
from pathlib import Path

_OF_FILES = (".json", ".jsonl", ".csv", ".parquet", ".jinja", ".yaml")


def is_path(name: str) -> bool:
    """Whether a name can only be a folder or a file: no hub id looks like it."""
    return not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) or Path(name).suffix in _OF_FILES


def nowhere(name: str, kind: str = "model") -> str | None:
    """Why a name cannot be loaded, in a few words with the fix; None where it is here, or the hub can be asked for it.

    Args:
        name: a folder, a file or a hub id. kind: "model" or "dataset", as the hub's cache files it.
    """
    if Path(name).exists() or (not is_path(name) and (_is_cached(name, kind) or answers())):
        return None
    near = _near(name)
    mend = "" if near is None else f"did you mean {near!r}? "
    hub = "" if is_path(name) else ", and the hub does not answer"
    what = "file" if Path(name).suffix in _OF_FILES else "folder"
    return f"no such {what} exists here{hub}; {mend}name one that exists, or a hub id"


@functools.cache
def answers() -> bool:
    """Asked once, and briefly: the hub's own functions would ask for half a minute, about each name."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # of httpx or httpx2, as the client's version has it
        return False
    return True


def _is_cached(name: str, kind: str) -> bool:
    from huggingface_hub import constants

    if (Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}").is_dir():
        return True
    if kind != "dataset":
        return False
    from datasets import config

    return (Path(config.HF_DATASETS_CACHE) / name.replace("/", "___")).is_dir()


def _near(name: str) -> str | None:
    """What is there and nearly has this name."""
    path = Path(name).expanduser()
    try:
        if path.exists():  # ~ is the shell's
            return str(path)
        beside = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return None
    near = difflib.get_close_matches(path.name, beside, n=1, cutoff=0.7)
    return str(path.parent / near[0]) if near else None
