"""A grader in a process of its own, which can be killed: grading may take any time."""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qtarget import own_code
from qtarget.errors import ConfigError
from qtarget.evaluation import graders

# How long a grader may take to be imported; some import torch on a busy machine.
_START_SECONDS = 120.0


@dataclass(frozen=True)
class Answer:
    """What a call came to.

    Attributes:
        verdict: see ``graders``; None where there is none. fault: None, "timeout" or "error".
    """

    verdict: graders.Verdict | None
    fault: str | None = None


class Grader:
    """A grader in a child process. A call that hangs, raises or ends the process counts as wrong, and is counted.

    Args:
        name: as on the command line. timeout: seconds for one call. whole_text: see ``graders.load``.

    Attributes:
        timeouts, errors: how many calls took too long, and how many raised or ended the process.
        last_error: what the latest of them said.

    Raises:
        ConfigError: when called, if the grader cannot be started.
    """

    def __init__(self, name: str, timeout: float, whole_text: bool = False):
        self.name, self.timeout = name, timeout
        self.timeouts = self.errors = 0
        self.last_error: str | None = None
        self._whole_text = whole_text
        self._process: Any = None
        self._pipe: Any = None

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def __call__(self, text: str, row: Mapping[str, Any]) -> bool:
        """Whether a text is right, strictly."""
        verdict = self.ask(text, row).verdict
        return verdict is not None and verdict["strict"]

    def ask(self, text: str, row: Mapping[str, Any]) -> Answer:
        """The verdict on a text; it travels as JSON."""
        self._start()
        try:
            self._pipe.send((text, dict(row)))
            if not self._pipe.poll(self.timeout):
                self.timeouts += 1
                self._end()
                return Answer(None, "timeout")
            answer = json.loads(self._pipe.recv_bytes())
        except (EOFError, OSError):
            self._end()
            return self._failed("the verifier ended its process")
        if "error" in answer:
            return self._failed(answer["error"])
        return Answer(answer["verdict"])

    def _failed(self, why: str) -> Answer:
        self.errors += 1
        self.last_error = why
        return Answer(None, "error")

    def _start(self) -> None:
        if self._process is not None:
            return
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        given = theirs, self.name, self._whole_text, own_code.FOLDERS.get()
        self._process = context.Process(target=_serve, args=given, daemon=True)
        with _without_script():
            self._process.start()
        theirs.close()  # else its end would not be seen here
        why = f"it did not start in {_START_SECONDS:g} seconds"
        try:
            if self._pipe.poll(_START_SECONDS):
                why = json.loads(self._pipe.recv_bytes()).get("error")
        except (EOFError, OSError):
            why = "its process ended as it started"
        if why is not None:
            self._end()
            raise ConfigError(f"verifier is {self.name!r}, which cannot be started: {why}; call it once by hand")

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None


def grade(text: str, answer: str | list[str]) -> dict[str, Any]:
    r"""Whether a text answers rightly, as ``qtarget eval --verifier math`` judges it.

    It is judged in one child process, which the first call starts and later ones share. A call of more than 10 seconds
    is ended and judged wrong.

    Args:
        answer: an expression, or several, in any order.

    Returns:
        ``strict``: whether the answer that the text marks is right. ``lenient``: the same, where a text that marks none
        answers with its last number. ``parsed``: the marked answer, None without one.

    Raises:
        ConfigError: math-verify is not installed, or the process cannot be started.

    >>> grade(r"So it is \boxed{\frac{2}{4}}.", "0.5")
    {'strict': True, 'lenient': True, 'parsed': '\\frac{2}{4}'}
    """
    graders.check("math")
    with _ONE_AT_A_TIME:
        verdict = _shared_grader().ask(text, {"answer": answer}).verdict or {}
    return {"strict": False, "lenient": False, "parsed": None} | {
        name: verdict[name] for name in ("strict", "lenient", "parsed") if name in verdict
    }


@contextlib.contextmanager
def _without_script() -> Iterator[None]:
    """Start a process that does not run the present script again: it needs none of it, guarded or not."""
    script = sys.modules["__main__"].__dict__
    before = {name: script.get(name) for name in ("__file__", "__spec__")}
    script.pop("__file__", None)
    script["__spec__"] = None
    try:
        yield
    finally:
        script.update({name: value for name, value in before.items() if name == "__spec__" or value is not None})


_ONE_AT_A_TIME = threading.Lock()


@functools.cache
def _shared_grader() -> Grader:
    return Grader("math", 10.0)


def _serve(pipe: Any, name: str, whole_text: bool, folders: tuple[str, ...]) -> None:
    """The child: load the grader, say so, then answer until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends this process
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    own_code.FOLDERS.set(folders)
    try:
        grade = graders.load_in_child(name, whole_text)
    except BaseException as error:
        pipe.send_bytes(json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())
        return
    pipe.send_bytes(b"{}")
    while True:
        try:
            text, row = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            sent = json.dumps({"verdict": grade(text, row)})
        except Exception as error:
            sent = json.dumps({"error": f"{type(error).__name__}: {error}"[:2000]})
        pipe.send_bytes(sent.encode())


def _end_with(parent: int) -> None:
    """A grader that hangs would outlive a parent that was killed."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
