"""Does a text answer a row rightly: decided in a process that can be killed.

A verifier is a function of (text, row) that returns a bool; row is a dict of the dataset's columns. Three kinds are
named on the command line:

    reasoning_gym:NAME            reasoning_gym's scorer of that task; right where its score reaches 1
    math_verify                   math_verify against the column ``answer``
    my_pkg.my_module:function     your own

The first two judge the final answer where the text marks one: in <answer> tags, in \\boxed{}, or after ####, in that
order, the last of its kind. Otherwise they judge the whole text.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qtarget.errors import ConfigError, DataError, unknown
from qtarget.evaluation.extraction import final_answer

# How long a verifier may take to be imported; some import torch on a busy machine.
_START_SECONDS = 120.0
# A score is a float that may have been summed.
_RIGHT = 1.0 - 1e-9
_KINDS = ("math_verify", "reasoning_gym:NAME", "my_pkg.my_module:function")

Verifier = Callable[[str, Mapping[str, Any]], bool]


# -- names -------------------------------------------------------------------------------------------------------


def check(name: str, columns: list[str] | None = None) -> None:
    """Raise ConfigError where a name is no verifier, or where the rows lack the columns that it reads."""
    reads: tuple[str, ...] = ()
    if name == "math_verify":
        _installed(name, "math_verify")
        reads = ("answer",)
    elif name.startswith("reasoning_gym:"):
        _installed(name, "reasoning_gym")
        from reasoning_gym.factory import DATASETS

        task = name.partition(":")[2]
        if task not in DATASETS:
            raise unknown("verifier reasoning_gym", task, DATASETS)
        reads = ("answer",)
    elif ":" in name:
        from qtarget.targets.yaml_form import load_object

        if not callable(load_object(name, "verifier")):
            raise ConfigError(
                f"verifier is {name!r}, which is no function; name one of (text, row) that returns a bool"
            )
    else:
        raise unknown("verifier", name, _KINDS)
    for column in reads:
        if columns is not None and column not in columns:
            raise DataError(
                f"verifier is {name!r}, which reads the column {column!r}, but the rows have {', '.join(columns)}; add "
                "it, or name a verifier of your own: my_pkg.my_module:function"
            )


def _installed(name: str, module: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"verifier is {name!r}, but {module} is not installed; pip install 'qtarget[eval]'")


def load(name: str) -> Verifier:
    """The function a checked name stands for."""
    if name == "math_verify":
        # It warns that its own alarms are off; they are, for a call that takes too long is killed here.
        logging.getLogger("math_verify").setLevel(logging.ERROR)
        _math_verify("1", {"answer": "1"})  # what it imports at its first call is not that call's time
        return _math_verify
    if name.startswith("reasoning_gym:"):
        return _reasoning_gym(name.partition(":")[2])
    # Not load_object: it imports torch, for which a child that was killed would wait each time.
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


# -- the verifiers -----------------------------------------------------------------------------------------------


def _reasoning_gym(task: str) -> Verifier:
    from reasoning_gym import get_score_answer_fn

    score: Any = get_score_answer_fn(task)

    def verify(text: str, row: Mapping[str, Any]) -> bool:
        metadata = row.get("metadata") or {}
        if isinstance(metadata, str):  # JSON lines whose tasks differ keep it as text
            metadata = json.loads(metadata)
        entry = {"question": row.get("question"), "answer": row["answer"], "metadata": metadata}
        return score(answer=final_answer(text), entry=entry) >= _RIGHT

    return verify


def _math_verify(text: str, row: Mapping[str, Any]) -> bool:
    """Raises ValueError where the row's own answer cannot be read."""
    from math_verify import parse, verify

    gold = _parsed(parse, final_answer(str(row["answer"])))
    if not gold:
        raise ValueError(f"the answer {row['answer']!r} cannot be read")
    return bool(verify(gold, _parsed(parse, final_answer(text)), timeout_seconds=None))


def _parsed(parse: Callable, text: str) -> list:
    """Plain LaTeX is read only between dollars."""
    return parse(text, parsing_timeout=None) or parse(f"${text}$", parsing_timeout=None)


# -- the process -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What a call came to.

    Attributes:
        value: what the function returned; None where it gave nothing. fault: None, "timeout" or "error".
    """

    value: Any
    fault: str | None = None


class Judge:
    """A verifier in a child process. A call that hangs, raises or ends the process counts as wrong, and is counted.

    Args:
        name: as on the command line. timeout: seconds for one call.
        loader: module:function that turns the name into the function the child calls.

    Attributes:
        timeouts, errors: how many calls took too long, and how many raised or ended the process.
        last_error: what the latest of them said.

    Raises:
        ConfigError: when called, if the verifier cannot be started.
    """

    def __init__(self, name: str, timeout: float, loader: str = "qtarget.evaluation.verifiers:load"):
        self.name, self.timeout = name, timeout
        self.timeouts = self.errors = 0
        self.last_error: str | None = None
        self._loader = loader
        self._process: Any = None
        self._pipe: Any = None

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def __call__(self, text: str, row: Mapping[str, Any]) -> bool:
        return bool(self.ask(text, row).value)

    def ask(self, text: str, row: Mapping[str, Any]) -> Answer:
        """What the function says of a text; its value travels as JSON."""
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
        return Answer(answer["value"])

    def _failed(self, why: str) -> Answer:
        self.errors += 1
        self.last_error = why
        return Answer(None, "error")

    def _start(self) -> None:
        if self._process is not None:
            return
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self.name, self._loader), daemon=True)
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


def _serve(pipe: Any, name: str, loader: str) -> None:
    """The child: load the verifier, say so, then answer until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends this process
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    try:
        module, _, function = loader.partition(":")
        verify = getattr(importlib.import_module(module), function)(name)
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
            value = verify(text, row)
            answer: dict[str, Any] = {"value": value if isinstance(value, dict) else bool(value)}
            sent = json.dumps(answer)
        except Exception as error:
            sent = json.dumps({"error": f"{type(error).__name__}: {error}"[:2000]})
        pipe.send_bytes(sent.encode())


def _end_with(parent: int) -> None:
    """A verifier that hangs would outlive a parent that was killed."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
