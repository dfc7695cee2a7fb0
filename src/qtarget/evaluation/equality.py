"""Are two mathematical answers equal: as text, as numbers, by members, by math-verify?"""

from __future__ import annotations

import logging
import re
from fractions import Fraction

from qtarget.evaluation.extraction import normal, value_without_letter

_PLAIN = re.compile(r"([-+]?)(\d+(?:\.\d*)?|\.\d+)(?:[eE]([-+]?\d{1,3}))?(?:/(\d+))?(%?)")
_FRAC = re.compile(r"([-+]?)\\frac\{(-?\d+)\}\{(\d+)\}")
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?: \d{3})+(?:\.\d+)?%?")
_FRAC_SHORT = re.compile(r"([-+]?)\\frac(\d)(\d)")
# What is no expression: a letter of a choice, or words. As LaTeX a bare B would be the symbol b.
_WORDS = re.compile(r"\(?([A-Za-z])\)?|[A-Za-z]{2,}(?:[ '-][A-Za-z]+)*")


def same(gold: str, answer: str, percent: bool = False) -> bool:
    """Whether an answer equals the gold one; both are normalised here.

    Args:
        percent: also accept the answer times or over 100, as the published scorers do.

    Raises:
        Exception: what math-verify raises on text it cannot read; the caller runs this in a process that can be killed.
    """
    gold, answer = normal(gold), normal(answer)
    if not gold or not answer:
        return False
    if number(gold) is not None:
        answer = value_without_letter(answer)
    if _equal(gold, answer):
        return True
    if percent:
        wanted, given = number(gold.rstrip("% ")), number(answer.rstrip("% "))
        if wanted is not None and given is not None:
            return given in (wanted, wanted * 100, wanted / 100)
    return False


def _equal(gold: str, answer: str) -> bool:
    if _bare(gold) == _bare(answer):
        return True
    wanted, given = number(gold), number(answer)
    if wanted is not None and given is not None:
        return wanted == given
    if given is not None and value_without_letter(gold) != gold:
        return False  # math-verify would take the variable of 2m for a unit
    if words := _WORDS.fullmatch(gold):
        return words[0].strip("()").lower() == answer.strip("()! ").lower()
    golds, answers = members(gold), members(answer)
    if len(golds) != len(answers):
        return False
    if len(golds) > 1:
        return _unordered(golds, answers)
    ordered = _tuple(gold), _tuple(answer)
    if ordered[0] and ordered[1]:
        return len(ordered[0]) == len(ordered[1]) and all(map(_equal, ordered[0], ordered[1]))
    # Dollars first: without them a fraction may be read as its last number.
    return math_verify(gold, answer, f"gold answer {gold[:80]!r}", ("${}$", "{}"))


def number(text: str) -> Fraction | None:
    """The exact value of an integer, a decimal, a simple fraction, or one of these in percent; else None."""
    compact = text.replace(" ", "")
    if len(compact) > 400 or (re.search(r"\d \d", text) and not _THOUSANDS.fullmatch(text)):
        return None
    if found := _PLAIN.fullmatch(compact):
        sign, value, power, below, percent = found.groups()
        if below is not None and not int(below):
            return None
        result = Fraction(f"{value}e{power or 0}") / int(below or 1) / (100 if percent else 1)
    elif found := _FRAC.fullmatch(compact) or _FRAC_SHORT.fullmatch(compact):
        sign, value, below = found.groups()
        if not int(below):
            return None
        result = Fraction(int(value), int(below))
    else:
        return None
    return -result if sign == "-" else result


def members(text: str) -> list[str]:
    r"""The answers of a list without brackets, or in set braces: split at commas outside of every bracket.

    >>> members(r"(1,2), \frac{1}{2} and 3")
    ['(1,2)', '\\frac{1}{2}', '3']
    """
    text = text.strip()
    if text.startswith("\\{") and text.endswith("\\}"):
        text = text[2:-2]
    parts = _split(re.sub(r"\s(?:and|or)\s", ",", text).replace(",,", ","))
    return [one for part in parts for one in _signs(part)]


def _signs(part: str) -> list[str]:
    r"""Both values of a \pm; what has more than one stays, for their signs may belong together."""
    if part.count("\\pm") != 1 or _tuple(part) is not None:
        return [part]
    before, after = (side.strip() for side in part.split("\\pm"))
    return [f"{before}{'+' if before else ''}{after}", f"{before}-{after}"]


def _tuple(text: str) -> list[str] | None:
    """The entries of a tuple or interval with its brackets as entries of their own; None for anything else."""
    if len(text) < 2 or text[0] not in "([" or text[-1] not in ")]":
        return None
    parts = _split(text[1:-1])
    return [f"open{text[0]}", *parts, f"close{text[-1]}"] if len(parts) > 1 else None


def _split(text: str) -> list[str]:
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        if letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append(text[start:place])
            start = place + 1
    return [part for part in (word.strip() for word in [*parts, text[start:]]) if part]


def _unordered(golds: list[str], answers: list[str]) -> bool:
    """Each gold answer with an answer of its own; equality is taken as transitive, so that greed is enough."""
    left = list(answers)
    for gold in golds:
        match = next((i for i, answer in enumerate(left) if _equal(gold, answer)), None)
        if match is None:
            return False
        left.pop(match)
    return True


def _bare(text: str) -> str:
    """Without spaces, but for those that part two numbers."""
    return re.sub(r"(?<!\d) | (?!\d)", "", text)


def math_verify(gold: str, answer: str, named: str, readings: tuple[str, str]) -> bool:
    """Whether math-verify takes two texts for equal.

    Args:
        named: the gold answer in an error. readings: formats in which a text is given to it, the second where it reads
            nothing in the first.

    Raises:
        ValueError: it reads nothing in the gold answer.
    """
    from math_verify import parse, verify

    # It warns that its own alarms are off; they are, for a call that takes too long is killed.
    logging.getLogger("math_verify").setLevel(logging.ERROR)

    def parsed(text: str) -> list:
        first, second = (reading.format(text) for reading in readings)
        return parse(first, parsing_timeout=None) or parse(second, parsing_timeout=None)

    wanted = parsed(gold)
    if not wanted:
        raise ValueError(f"the {named} cannot be read")
    return bool(verify(wanted, parsed(answer), timeout_seconds=None))
