"""Are two mathematical answers equal: as numbers, as words, by members, else by math-verify?"""

from __future__ import annotations

import logging
import re
from fractions import Fraction

from qtarget.evaluation.extraction import ASSIGNED, WRAPPER, bare, normal

_NUMBER = re.compile(r"([-+]?)(\d+(?:\.\d*)?|\.\d+)(?:[eE]([-+]?\d{1,3}))?(?:/(\d+))?\s?(%?)")
_FRACTION = re.compile(r"([-+]?)\\frac(?:\{(-?\d+)\}\{(\d+)\}|(\d)(\d))")
_MIXED = re.compile(r"([-+]?)(\d+)(?:\s+(\d+)/(\d+)|\s*\\frac\{(\d+)\}\{(\d+)\})")
_BASED = re.compile(r"[0-9A-Z]+_\{?\d+\}?")
# What no unit is called, so that 3 million is not 3, nor 3 or 4.
_NO_UNIT = (
    r"(?!(?:e|i|and|or|to|over|mod|pi|sqrt|sin|cos|tan|log|ln|exp|hundred|thousand|million|billion|trillion|dozen)\b)"
)
# \text{ cm}^2, or words apart from the number; a letter there may be a variable, unless it is a unit's.
_POWER = r"(?:\^\{?-?\d\}?|⁻?[¹²³]|\d\b)?"
_WORDED = rf"{WRAPPER}\s*+{_NO_UNIT}[^{{}}]*\}}{_POWER}"
_UNIT = re.compile(
    rf"(.*\d)(?:(?:\s*(?:\\mu\s*|\\cdot\s*|/)?{_WORDED}|\s*\\frac\{{{_WORDED}\}}\{{{_WORDED}\}})+|"
    rf"(?:\s+|/){_NO_UNIT}(?:[^\W\d_](?:[^\W\d_]|['’])+|[mshglJNWKVATCFΩΩ]\b|\\Omega\b|\\mu\s*[A-Za-z]\b){_POWER}"
    rf"(?:[\s/*.·]+{_NO_UNIT}[^\W\d_]+{_POWER})*)"
)
_ROMAN = re.compile(rf"(?<![A-Za-z]){WRAPPER}\s*([ei]|[\d.]+)\s*\}}")
# What is no expression: a letter of a choice, or words. As LaTeX a bare B would be the symbol b.
_WORDS = re.compile(r"\(?([A-Za-z])\)?|[A-Za-z]{2,}(?:[ '-][A-Za-z]+)*")


def same(gold: str, answer: str, percent: bool = False) -> bool:
    """Whether an answer equals the gold one.

    Args:
        percent: also accept the answer times or over 100, as the published scorers do.

    Raises:
        ValueError: the gold answer cannot be read.
        Exception: what math-verify raises; the caller runs this in a process that can be killed.
    """
    if not normal(gold):
        raise ValueError(f"the gold answer {gold!r} cannot be read")
    if not normal(answer):
        return False
    if _equal(bare(gold), bare(answer)):
        return True
    if percent:
        wanted, given = (number(normal(text).rstrip("% ")) for text in (gold, answer))
        return wanted is not None and given is not None and given in (wanted, wanted * 100, wanted / 100)
    return False


def _equal(gold: str, answer: str) -> bool:
    wanted, given = normal(gold), normal(answer)
    # Spaces do not count, but for those that part two numbers.
    if re.sub(r"(?<!\d) | (?!\d)", "", wanted) == re.sub(r"(?<!\d) | (?!\d)", "", given):
        return True
    values = number(wanted), number(given)
    if None not in values:
        return values[0] == values[1]
    if _BASED.fullmatch(wanted) and _BASED.fullmatch(given):
        return False  # math-verify drops the base
    if values[1] is not None and re.fullmatch(r".*\d[A-Za-z]", wanted):
        return False  # math-verify would take the variable of 2m for a unit
    if words := _WORDS.fullmatch(wanted):
        return words[0].strip("()").lower() == given.strip("()! ").lower()
    golds, answers = members(gold), members(answer)
    for union, parts in ((gold, answers), (answer, golds)):
        if "\\cup" in union and re.search(r"[<>]|\\[lg]eq?\b", "".join(parts)):  # x < 1 or x > 2
            golds, answers = union.split("\\cup"), parts
    if len(golds) != len(answers):
        return False
    if len(golds) > 1:
        return _unordered(golds, answers)
    return math_verify(gold, answer)


def number(text: str) -> Fraction | None:
    """The exact value of a normal form: an integer, a decimal, a fraction or one of these in percent, with or without a
    unit; None for anything else.

    >>> number("2.50 km/h"), number("50%"), number("2m")
    (Fraction(5, 2), Fraction(1, 2), None)
    """
    if len(text) > 400:
        return None
    if unit := _UNIT.fullmatch(text):
        text = unit[1]
    if found := _NUMBER.fullmatch(text):
        sign, value, power, below, percent = found.groups()
        divisor = int(below or 1) * (100 if percent else 1)
        result = Fraction(f"{value}e{power or 0}") / divisor if divisor else None
    elif found := _FRACTION.fullmatch(text) or _MIXED.fullmatch(text):
        sign = found[1]
        *whole, above, under = (int(part) for part in found.groups()[1:] if part)
        result = sum(whole) + Fraction(above, under) if under else None
    else:
        return None
    return -result if sign == "-" and result is not None else result


def members(text: str) -> list[str]:
    r"""The answers of a list without brackets, or in set braces: split at commas outside of every bracket.

    >>> members(r"(1,2), \frac{1}{2} and 3")
    ['(1,2)', '\\frac{1}{2}', '3']
    """
    if re.search(r"\\begin|\\cup|\\cap|\\ldots", text) or number(normal(text)) is not None:
        return [text]
    text = re.sub(r"^.*\\in\b(?=\s*\\\{)|\\left(?=\\\{)|\\right(?=\\\})", "", text).strip()
    if text.startswith("\\{") and text.endswith("\\}"):
        text = text[2:-2]
    text = re.sub(rf"({WRAPPER}[^{{}}]*)\b(and|or)\s*\}}", r"\1} \2 ", text)
    text = re.sub(rf"{WRAPPER}\s*\}}", " ", text)
    parts, depth, start = list[str](), 0, 0
    text = re.sub(r"\s(?:and|or)\s", ",", text.replace("\\,", " "))
    for place, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append(text[start:place])
            start = place + 1
    found = [part for part in (word.strip() for word in [*parts, text[start:]]) if part]
    return [one for part in found for one in _signs(part)]


def _signs(part: str) -> list[str]:
    r"""Both values of a \pm; what has more than one stays, for their signs may belong together."""
    if part.count("\\pm") != 1 or part[0] in "([":
        return [part]
    before, after = (side.strip() for side in part.split("\\pm"))
    return [f"{before}{'+' if before else ''}{after}", f"{before}-{after}"]


def _unordered(golds: list[str], answers: list[str]) -> bool:
    """Each gold answer with an answer of its own; equality is taken as transitive, so that greed is enough.

    Where both sides name the same several unknowns, x = 1, y = 2, each is compared with its namesake.
    """
    unknowns = [
        [found[1] if (found := ASSIGNED.match(bare(one))) else None for one in side] for side in (golds, answers)
    ]
    by_name = len({*unknowns[0]} - {None}) > 1 and {*unknowns[0]} == {*unknowns[1]}
    paired = list(zip(unknowns[1], answers, strict=True))
    for name, gold in zip(unknowns[0], golds, strict=True):
        match = next((one for one in paired if (not by_name or one[0] == name) and _equal(gold, one[1])), None)
        if match is None:
            return False
        paired.remove(match)
    return True


def math_verify(gold: str, answer: str) -> bool:
    """Whether math-verify takes two texts for equal, each read as LaTeX.

    Raises:
        ValueError: it reads nothing in the gold answer.
    """
    from math_verify import LatexExtractionConfig, parse, verify

    # It warns that its own alarms are off; they are, for a call that takes too long is killed.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    # math-verify takes the roman e of 2^{\mathrm{e}} for a variable, and 3e8 for a product.
    gold, answer = (
        re.sub(r"(?<=\d)[eE]([-+]?\d+)", r" \\times 10^{\1}", _ROMAN.sub(r"\1", text)) for text in (gold, answer)
    )
    # Without its second way, which takes 6 for the value of 6\sqrt(5).
    wanted, given = (parse(f"${text}$", [LatexExtractionConfig()], parsing_timeout=None) for text in (gold, answer))
    if not wanted:
        raise ValueError(f"the gold answer {gold[:80]!r} cannot be read")
    if not verify(wanted, given, timeout_seconds=None, allow_set_relation_comp=True):
        return False
    first = wanted[0], given[0]
    if not all(getattr(one, "is_number", False) for one in first):
        return True
    # It rounds to six decimal places, where all small numbers are zero.
    return first[0] == first[1] or bool(abs((first[0] - first[1]).evalf(30)) <= abs(first[0].evalf(30)) * 1e-6)
