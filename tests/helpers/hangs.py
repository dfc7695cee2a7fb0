"""Ends what hangs: the one use that tests make of a clock."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

SECONDS = 600  # ends what hangs, and nothing that a busy machine does


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"still at work after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
