r"""The registry of graders: from a text and a problem's row to a verdict.

A grader's name, as ``--verifier`` takes it:

    math                        the marked answer against ``answer``, an expression or a list of them
    math_verify                 the same, and a text that marks no answer is one as a whole
    choice                      the letter of an option against ``answer``; ``options`` are the texts
    reasoning_gym:TASK          reasoning_gym's scorer of that task, right where its score reaches 1
    my_pkg.my_module:function   your own, of (text, row)

A verdict has two judgements, ``strict`` and ``lenient``, and what each read, ``parsed`` and ``lenient_parsed``. Your own
function returns a bool, or a dict with ``strict`` and perhaps the others; a bool alone is both judgements, and what it
read is unknown. qtarget's own graders read what follows the thinking. The final answer of that is what it marks, in
<answer> tags, in \boxed{} or after ####, the last of its kind, or else the whole.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qtarget import extras, own_code
from qtarget.errors import ConfigError, DataError, unknown
from qtarget.evaluation import equality, extraction
from qtarget.evaluation.extraction import final_answer, marked, normal

# A judgement that takes more memory than this fails instead of taking the machine with it; qtarget's own graders only,
# since a user's may map a model.
MEMORY_BYTES = 4 << 30
# A score is a float that may have been summed.
_RIGHT = 1.0 - 1e-9

Verdict = dict[str, Any]
Grade = Callable[[str, Mapping[str, Any]], Verdict]


@dataclass(frozen=True)
class _Kind:
    """reads: the columns of a row. package: what it imports, None for nothing beside qtarget."""

    reads: tuple[str, ...]
    package: str | None = None


_GYM, _OWN = "reasoning_gym:TASK", "my_pkg.my_module:function"
_KINDS = {
    "math": _Kind(("answer",), "math_verify"),
    "math_verify": _Kind(("answer",), "math_verify"),
    "choice": _Kind(("options", "answer")),
    _GYM: _Kind(("answer",), "reasoning_gym"),
}


# -- names ---------------------------------------------------------------------------------------------------------


def check(name: str, columns: Sequence[str] | None = None) -> None:
    """Raise ConfigError where a name is no grader, needs what is not installed, or reads columns the rows lack."""
    kind = _kind(name)
    if kind is None and ":" not in name:
        raise unknown("verifier", name, (*_KINDS, _OWN))
    if kind is None:
        from qtarget.targets.parts import load_object

        if not callable(load_object(name, "verifier")):
            raise ConfigError(
                f"verifier is {name!r}, which is not a function; name one of (text, row) that returns a bool"
            )
        return
    if kind.package is not None and importlib.util.find_spec(kind.package) is None:
        raise ConfigError(f"verifier is {name!r}, but {kind.package} is not installed; {extras.pip_line('eval')}")
    if kind is _KINDS[_GYM]:
        from reasoning_gym.factory import DATASETS

        if (task := name.partition(":")[2]) not in DATASETS:
            raise unknown("verifier reasoning_gym", task, DATASETS)
    for column in kind.reads:
        if columns is not None and column not in columns:
            raise DataError(
                f"verifier is {name!r}, which reads the column {column!r}, but the rows have {', '.join(columns)}; add "
                f"it, or name a verifier of your own: {_OWN}"
            )


def reads(name: str) -> tuple[str, ...]:
    """The columns of a row that qtarget's own graders read."""
    kind = _kind(name)
    return () if kind is None else kind.reads


def is_code(name: str) -> bool:
    """Whether a name stands for a user's own function, which is imported to judge."""
    return ":" in name and _kind(name) is None


def version(name: str) -> str:
    """What a verdict depends on beside the text: of packages their version, of a user's function its file."""
    if kind := _kind(name):
        package = (kind.package or "").replace("_", "-")
        return f"qtarget-{extraction.VERSION}" + (
            f" {package}-{importlib.metadata.version(package)}" if package else ""
        )
    try:
        source = inspect.getsource(_module(name))
    except (OSError, TypeError):  # no source to be read: an extension, say
        return "unknown"
    return f"sha256-{hashlib.sha256(source.encode()).hexdigest()[:12]}"


def _module(name: str) -> Any:
    with own_code.searched():
        return importlib.import_module(name.partition(":")[0])


def _kind(name: str) -> _Kind | None:
    return _KINDS.get(_GYM if name.startswith("reasoning_gym:") else name)


def load(name: str, whole_text: bool = False) -> Grade:
    """The function of a checked name, with what it imports at its first call imported.

    Args:
        whole_text: reasoning_gym's scorers take a text that marks no answer for the answer.
    """
    if name == "choice":
        return _after_thinking(_choice)
    if name in ("math", "math_verify"):
        equality.same(r"\frac{\sqrt{1}}{2}", r"\frac{\sqrt{4}}{4}")
        return _after_thinking(_math if name == "math" else _math_of_the_whole)
    if not is_code(name):
        return _after_thinking(_reasoning_gym(name.partition(":")[2], whole_text))
    # Not load_object: it imports torch, for which a child that was killed would wait each time.
    own = getattr(_module(name), name.partition(":")[2])
    return lambda text, row: _verdict(name, own(text, row))


def load_in_child(name: str, whole_text: bool = False) -> Grade:
    """``load``, and for qtarget's own graders a limit on the memory of this process."""
    if not is_code(name):
        _limit_memory()
    return load(name, whole_text)


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # not on this system; the time limit remains
        return
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


# -- graders -------------------------------------------------------------------------------------------------------


def _after_thinking(grade: Grade) -> Grade:
    return lambda text, row: grade(extraction.said(text), row)


def _math(text: str, row: Mapping[str, Any]) -> Verdict:
    return _math_verdict(marked(text), extraction.lenient(text), row["answer"])


def _math_of_the_whole(text: str, row: Mapping[str, Any]) -> Verdict:
    return _math_verdict(final_answer(text), final_answer(text), row["answer"])


def _math_verdict(strict: str | None, lenient: str | None, answer: Any) -> Verdict:
    golds = [final_answer(str(one)) for one in (answer if isinstance(answer, list) else [answer])]
    # Of several each is normalised before a comma parts them: 1,234 is one of them.
    gold = golds[0] if len(golds) == 1 else ", ".join(map(normal, golds))
    right = strict is not None and equality.same(gold, strict)
    leniently = right or (lenient is not None and equality.same(gold, lenient, percent=True))
    parsed = [None if read is None else normal(read) or None for read in (strict, lenient)]
    return {"parsed": parsed[0], "lenient_parsed": parsed[1], "strict": right, "lenient": leniently}


def _choice(text: str, row: Mapping[str, Any]) -> Verdict:
    strict = extraction.letter_strict(text, row["options"])
    lenient = extraction.letter_lenient(text, row["options"])
    gold = row["answer"]
    return {"parsed": strict, "lenient_parsed": lenient, "strict": strict == gold, "lenient": lenient == gold}


def _reasoning_gym(task: str, whole_text: bool) -> Grade:
    from reasoning_gym import get_score_answer_fn

    score: Any = get_score_answer_fn(task)

    def right(answer: str, row: Mapping[str, Any]) -> bool:
        metadata = row.get("metadata") or {}
        if isinstance(metadata, str):  # JSON lines whose tasks differ keep it as text
            metadata = json.loads(metadata)
        entry = {"question": row.get("question"), "answer": row["answer"], "metadata": metadata}
        return score(answer=answer, entry=entry) >= _RIGHT

    def grade(text: str, row: Mapping[str, Any]) -> Verdict:
        strict = (final_answer(text) if whole_text else marked(text)) or None
        lenient = strict if strict is not None else unmarked(text, str(row["answer"]))
        strictly = strict is not None and right(strict, row)
        leniently = strictly if lenient == strict else lenient is not None and right(lenient, row)
        return {"parsed": strict, "lenient_parsed": lenient, "strict": strictly, "lenient": leniently}

    return grade


def unmarked(text: str, gold: str) -> str | None:
    """The lenient answer of a text without a mark, of the gold answer's shape: a number, or as many lines."""
    if equality.number(gold) is not None:
        return extraction.lenient(text)
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return "\n".join(lines[-max(1, len(gold.strip().splitlines())) :]).strip() or None


def _verdict(name: str, returned: Any) -> Verdict:
    """From what a function returned; raises ConfigError where that is a dict without ``strict``."""
    given = returned if isinstance(returned, dict) else {"strict": returned}
    if "strict" not in given:
        raise ConfigError(
            f"verifier is {name!r}, which returned {json.dumps(given, default=str)[:100]} without 'strict'"
        )
    parsed = given.get("parsed")
    read = [None if one is None else str(one) for one in (parsed, given.get("lenient_parsed", parsed))]
    strict, lenient = bool(given["strict"]), bool(given.get("lenient", given["strict"]))
    verdict = {"parsed": read[0], "lenient_parsed": read[1], "strict": strict, "lenient": lenient}
    return verdict if "parsed" in given else {**verdict, "unparsed": True}
