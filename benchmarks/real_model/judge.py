"""The verifier of ``qtarget eval``: strict wants the result alone or behind the repeated sum, lenient the last number."""

from __future__ import annotations

import re
from typing import Any

_NUMBER = re.compile(r"(?<![\d.])-?\d+(?:\.\d+)?(?![\d.]*\d)")


def result(text: str, row: dict[str, Any]) -> dict[str, Any]:
    """Strict reads ``c`` or ``a + b = c`` of the sum that was asked, with or without a full stop, and nothing else."""
    said = " ".join(text.split()).removesuffix(".")
    alone = re.fullmatch(rf"(?:{re.escape(row['id'])} = )?(-?\d+)", said)
    strict = alone.group(1) if alone else None
    numbers = _NUMBER.findall(text)
    lenient = strict if strict is not None else (numbers[-1] if numbers else None)
    return {
        "parsed": strict,
        "strict": strict == row["answer"],
        "lenient_parsed": lenient,
        "lenient": lenient == row["answer"],
    }
