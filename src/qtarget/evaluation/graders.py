"""Grades a text against a problem's row, strictly and leniently, in a Judge's process.

A grader's name: ``math`` (answer: the gold expression), ``choice`` (options: their texts; answer: the letter),
``reasoning_gym:NAME`` (answer, metadata), or ``my_pkg.my_module:function`` of (text, row). The last returns a bool, or
a dict with ``strict`` and perhaps ``lenient`` (bools) and ``parsed`` (a string); a bool alone is both judgements, and
what it read is unknown.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

from qtarget.errors import ConfigError, unknown
from qtarget.evaluation import equality, extraction, verifiers

LOADER = "qtarget.evaluation.graders:load_in_child"
# A judgement that takes more memory than this fails instead of taking the machine with it; qtarget's own graders only,
# since a user's may map a model.
MEMORY_BYTES = 4 << 30

Grader = Callable[[str, Mapping[str, Any]], dict[str, Any]]


def check(name: str) -> None:
    """Raise ConfigError where a name is no grader or what it needs is not installed."""
    if name == "choice":
        return
    if name != "math" and ":" not in name:
        raise unknown("verifier", name, ("math", "choice", "reasoning_gym:TASK", "my_pkg.my_module:function"))
    verifiers.check("math_verify" if name == "math" else name)


def reads(name: str) -> tuple[str, ...]:
    """The columns of a row that qtarget's own graders read."""
    return ("options", "answer") if name == "choice" else ("answer",) if name == "math" or _is_gym(name) else ()


def is_code(name: str) -> bool:
    """Whether a name stands for a user's own function, which is imported to judge."""
    return ":" in name and not _is_gym(name)


def _is_gym(name: str) -> bool:
    return name.startswith("reasoning_gym:")


def version(name: str) -> str:
    """What a verdict depends on beside the text: of packages their version, of a user's function its file."""
    own = f"qtarget-{extraction.VERSION}"
    if name == "choice":
        return own
    if name == "math":
        return f"{own} math-verify-{importlib.metadata.version('math-verify')}"
    if name.startswith("reasoning_gym:"):
        return f"{own} reasoning-gym-{importlib.metadata.version('reasoning-gym')}"
    module = importlib.import_module(name.partition(":")[0])
    try:
        source = inspect.getsource(module)
    except (OSError, TypeError):  # no source to be read: an extension, say
        return "unknown"
    return f"sha256-{hashlib.sha256(source.encode()).hexdigest()[:12]}"


def load_in_child(name: str) -> Grader:
    """``load``, and a limit on the memory of this process."""
    if ":" not in name or name.startswith("reasoning_gym:"):
        _limit_memory()
    return load(name)


def load(name: str) -> Grader:
    """The grader of a checked name, with what it imports at its first call imported."""
    if name == "choice":
        return _choice
    if name == "math":
        equality.same(r"\frac{\sqrt{1}}{2}", r"\frac{\sqrt{4}}{4}")
        return _math
    if name.startswith("reasoning_gym:"):
        return _reasoning_gym(name)
    own = verifiers.load(name)
    return lambda text, row: _verdict(name, own(text, row))


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # not on this system; the time limit remains
        return
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


# -- graders -------------------------------------------------------------------------------------------------------


def _math(text: str, row: Mapping[str, Any]) -> dict[str, Any]:
    strict, lenient = extraction.strict(text), extraction.lenient(text)
    golds = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
    golds = [extraction.final_answer(str(one)) for one in golds]
    # Of several each is normalised before a comma parts them: 1,234 is one of them.
    gold = golds[0] if len(golds) == 1 else ", ".join(map(extraction.normal, golds))
    right = strict is not None and equality.same(gold, strict)
    return {
        "parsed": strict,
        "lenient_parsed": lenient,
        "strict": right,
        "lenient": right or (lenient is not None and equality.same(gold, lenient, percent=True)),
    }


def _choice(text: str, row: Mapping[str, Any]) -> dict[str, Any]:
    strict = extraction.letter_strict(text, row["options"])
    lenient = extraction.letter_lenient(text, row["options"])
    return {
        "parsed": strict,
        "lenient_parsed": lenient,
        "strict": strict == row["answer"],
        "lenient": lenient == row["answer"],
    }


def _reasoning_gym(name: str) -> Grader:
    verify = verifiers.load(name)

    def grade(text: str, row: Mapping[str, Any]) -> dict[str, Any]:
        strict = extraction.marked(text) or None
        lenient = strict if strict is not None else unmarked(text, str(row["answer"]))
        # The scorer reads its text's mark itself; what is parsed already has none.
        right = strict is not None and verify(_tagged(strict), row)
        return {
            "parsed": strict,
            "lenient_parsed": lenient,
            "strict": right,
            "lenient": right if lenient == strict else lenient is not None and verify(_tagged(lenient), row),
        }

    return grade


def _tagged(answer: str) -> str:
    return f"<answer>{answer}</answer>"


def unmarked(text: str, gold: str) -> str | None:
    """The lenient answer of a text without a mark, of the gold answer's shape: a number, or as many lines."""
    if equality.number(gold) is not None:
        return extraction.lenient(text)
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return "\n".join(lines[-max(1, len(gold.strip().splitlines())) :]).strip() or None


def _verdict(name: str, said: Any) -> dict[str, Any]:
    if not isinstance(said, dict):
        return {"parsed": None, "lenient_parsed": None, "strict": bool(said), "lenient": bool(said), "unparsed": True}
    if "strict" not in said:
        raise ConfigError(
            f"verifier is {name!r}, which returned {json.dumps(said, default=str)[:100]} without 'strict'"
        )
    parsed = None if said.get("parsed") is None else str(said["parsed"])
    lenient = said.get("lenient_parsed", parsed)
    lenient = None if lenient is None else str(lenient)
    strict = bool(said["strict"])
    return {
        "parsed": parsed,
        "lenient_parsed": lenient,
        "strict": strict,
        "lenient": bool(said.get("lenient", strict)),
        **({} if "parsed" in said else {"unparsed": True}),
    }
