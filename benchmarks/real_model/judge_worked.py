"""The large form's verifier: strict wants the steps with the right end, or the result alone.

Lenient is the last number, as in the small form, whose ``judge`` stays as it is: results name the digest of the file
that judged them.
"""

from __future__ import annotations

import re
from typing import Any

from real_model import judge


def result(text: str, row: dict[str, Any]) -> dict[str, Any]:
    """Strict reads ``c`` or ``a + b = c, c - d = e`` of the sum that was asked, with or without a full stop."""
    said = " ".join(text.split()).removesuffix(".")
    strict = said if re.fullmatch(r"-?\d+", said) else end_of_steps(said, row["id"])
    last = judge.result(text, row)["lenient_parsed"]
    return {
        "parsed": strict,
        "strict": strict == row["answer"],
        "lenient_parsed": last,
        "lenient": last == row["answer"],
    }


def end_of_steps(said: str, expression: str) -> str | None:
    """The last result, where each step has the term that was asked and begins with the result before it.

    Whether a result on the way is right is not asked: two errors that cancel each other end in a right one.
    """
    value, *rest = expression.split()
    steps = said.split(", ")
    if 2 * len(steps) != len(rest):
        return None
    for step, operation, term in zip(steps, rest[::2], rest[1::2], strict=True):
        found = re.fullmatch(rf"{re.escape(f'{value} {operation} {term}')} = (-?\d+)", step)
        if found is None:
            return None
        value = found.group(1)
    return value
