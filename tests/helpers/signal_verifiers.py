"""Verifiers by import path for the tests of signals; a child process imports this file alone."""

from __future__ import annotations

import json
import os
import re
import sys
import time

_calls: list[str] = []


def last_number(text: str, row: dict) -> bool:
    """Right where the last number of the text is the row's answer."""
    return re.findall(r"\d+", text)[-1:] == [row["answer"]]


def logged(text: str, row: dict) -> bool:
    """The same, each call noted in a file beside the process that made it.

    ``SIGNAL_HOLD``: the call of that number, the first is 1, waits to be killed.
    """
    with open(os.environ["SIGNAL_CALLS"], "a") as stream:
        stream.write(json.dumps({"answer": row["answer"], "pid": os.getpid()}) + "\n")
    _calls.append(row["answer"])
    while len(_calls) == int(os.environ.get("SIGNAL_HOLD", 0)):
        time.sleep(0.05)
    return last_number(text, row)


def no_fours(text: str, row: dict) -> bool:
    if row["answer"] == "4":
        raise ValueError("four")
    return last_number(text, row)


def always(text: str, row: dict) -> bool:
    return True


def never(text: str, row: dict) -> bool:
    return False


def moody(text: str, row: dict) -> bool:
    """What the text says: hang, raise, exit, die, or the answer."""
    if text == "hang":
        time.sleep(600)
    if text == "raise":
        raise KeyError("no such thing")
    if text == "exit":
        sys.exit(3)
    if text == "die":
        os._exit(0)
    return text == "right"


def in_two_readings(text: str, row: dict) -> dict:
    return {"strict": text == "strictly", "lenient": text != "neither", "parsed": text}


not_a_function = 3
