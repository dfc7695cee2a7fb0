"""What ``qtarget targets`` says, as data: the pages say the same as the command."""

from __future__ import annotations

import contextlib
import io
import json
from typing import Any

from qtarget.cli.__main__ import main


def asked(*words: str) -> Any:
    """The output of ``qtarget targets WORDS --json``."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = main(["targets", *words, "--json"])
    if status:
        raise SystemExit(f"qtarget targets {' '.join(words)} ended with {status}")
    return json.loads(printed.getvalue())
