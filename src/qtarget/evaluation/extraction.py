"""What a text gives as its answer. Two readings, never mixed:

strict    where the text marks its answer: <answer> tags, a complete \\boxed{}, or ####. Without a mark: no answer.
lenient   the published habit: without a mark what follows "the answer is", else the last number (or option letter).

Every function is linear in the length of the text: outputs of 100 kB full of unclosed boxes are met in practice.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

# Changes when a text would give another answer; part of the verifier version in every sample.
VERSION = 1

_BOX = re.compile(r"\\boxed\s*\{|\\[{}]|[{}]")
_NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+(?:\.\d+)?)?(?:[eE][-+]?\d+)?(?![\d])"
    r"|(?<=[\w.)])\d+(?:\.\d+)?|(?<![\w.])[-+]?\.\d+"
)
_PHRASE = re.compile(r"(?:final\s+answer|answer)\s*(?:is|:|=)\s*:?\s*", re.IGNORECASE)
# A letter of an option by itself: not part of a word, and not "A" or "I" as words of a sentence.
_LETTER_PHRASE = re.compile(
    r"answer\s*(?:is|:|=)?\s*:?\s*(?:option|choice)?\s*[*_$]*(?:\\text\{)?\(?([A-Za-z])\b(?![''’])", re.IGNORECASE
)
_LETTER_END = re.compile(r"(?:^|[\s(*])\(?([A-Z])\)?[.)*]*\s*$")
_LETTER_ALONE = re.compile(r"(?<![A-Za-z])([A-Z])(?![A-Za-z''’])")
_WRAPPER = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|mbox|operatorname)\s*\{")
_TRAILING = " \t\r\n.,;:!。．，；"


def ascii_digits(text: str) -> str:
    """Decimal digits of any script as ASCII, and the minus signs of typographers; superscripts stay as they are.

    >>> ascii_digits("−４٢")
    '-42'
    """
    if text.isascii():
        return text
    kept = []
    for letter in text:
        value = unicodedata.decimal(letter, None)
        kept.append(letter if value is None else str(value))
    return "".join(kept).translate({0x2212: "-", 0xFF0D: "-", 0xFE63: "-", 0xFF0E: ".", 0xFF0F: "/"})


# -- marks ---------------------------------------------------------------------------------------------------------


def boxed(text: str) -> str | None:
    r"""What stands in the last complete \boxed{...}; of nested ones the inner, of unclosed ones none.

    >>> boxed(r"\boxed{1}, no: \boxed{\boxed{\frac{1}{2}}} and \boxed{3")
    '\\frac{1}{2}'
    """
    open_braces: list[int] = []  # where a box's content starts; -1 for another brace
    best: tuple[int, int] | None = None
    for found in _BOX.finditer(text):
        word = found[0]
        if word in ("\\{", "\\}"):  # set braces, no grouping
            continue
        if word == "}":
            start = open_braces.pop() if open_braces else -1
            if start >= 0 and (best is None or start > best[0]):
                best = (start, found.start())
        else:
            open_braces.append(-1 if word == "{" else found.end())
    return None if best is None else text[best[0] : best[1]]


def marked(text: str) -> str | None:
    """The last answer the text marks, its kinds in this order: <answer> tags, a box, ####; None without one."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    if start >= 0:
        return text[start + len("<answer>") : end].strip()
    if (box := boxed(text)) is not None:
        return box.strip()
    if "####" in text:
        lines = text.rpartition("####")[2].strip().splitlines()
        return lines[0].strip() if lines else ""
    return None


def final_answer(text: str) -> str:
    """What a text marks as its final answer, or the text itself.

    >>> final_answer("so 3 + 4 = 7. #### 7")
    '7'
    """
    found = marked(text)
    return text.strip() if found is None else found


def strict(text: str) -> str | None:
    """The marked answer, normalised; None where nothing is marked or the mark is empty."""
    found = marked(text)
    return None if found is None else (normal(found) or None)


def last_number(text: str) -> str | None:
    """The last number of the text as it stands there, without thousands separators; None without one.

    >>> last_number("from 5-3 to 1,234.50.")
    '1234.50'
    """
    last = None
    for last in _NUMBER.finditer(ascii_digits(text)):  # noqa: B007
        pass
    return None if last is None else last[0].replace(",", "").removeprefix("+")


def lenient(text: str) -> str | None:
    """The marked answer; else the number after the last "the answer is"; else the last number; else None."""
    found = strict(text)
    if found is not None:
        return found
    said = None
    for said in _PHRASE.finditer(text):  # noqa: B007
        pass
    if said is not None:
        sentence = re.split(r"(?<=[^\d])\.(?:\s|$)|\.\s|\.$|\n", text[said.end() : said.end() + 400], maxsplit=1)[0]
        if "$" in sentence and (inner := re.findall(r"\$([^$]+)\$", sentence)):
            return normal(inner[0]) or None
        if (number := last_number(sentence)) is not None:
            return number
    return last_number(text)


# -- normal form ---------------------------------------------------------------------------------------------------

_UNITS = (
    "degrees?|deg|cm|mm|km|dm|m|meters?|metres?|centimeters?|kilometers?|miles?|feet|foot|ft|inch(?:es)?|in|yards?|"
    "seconds?|secs?|s|minutes?|mins?|hours?|hrs?|h|days?|weeks?|months?|years?|dollars?|cents?|euros?|pounds?|grams?|"
    "kg|kilograms?|mg|g|liters?|litres?|ml|l|mph|km/h|m/s|square|cubic|sq|units?|points?|percent|people|students?|"
    "ways|apples?|J|N|W|K|Hz|eV|erg|AU|pc|Pa|V|A|T|C|mol|rad|radians?|solar|masses?"
)
_UNIT = re.compile(rf"(?<=[\d)}}\s])\s*(?:(?:{_UNITS})(?:\s*\^?\s*\{{?-?\d\}}?)?(?:\s+|/|$|\\cdot|\*)*)+$")
_GROUPED = re.compile(r"(?<![\d.])(\d{1,3})((?:(?:,|\{,\}|\\,|\\!,|,\\!)\d{3})+)(?![\d])")
_SPACES = re.compile(r"\\[,;:!> ]|~|\\quad|\\qquad|\\left(?![a-z])|\\right(?![a-z])|\\displaystyle|\\limits")
_ASSIGNED = re.compile(r"^\s*[A-Za-z](?:_\{?\w+\}?)?(?:\([A-Za-z]\))?\s*=\s*(?=[^=]+$)")


def normal(answer: str) -> str:
    r"""An answer without what does not change its value: dollars, \text, sizes, trailing stops, units, separators.

    The percent sign stays: 50 % is 1/2, and that it may be 50 is for the lenient score to grant.

    >>> normal(r"$x = \text{ } 1{,}234\,\text{cm}^2$.")
    '1234'
    """
    text = ascii_digits(answer).strip().strip(_TRAILING).strip()
    while len(text) > 1 and (
        (text[0] == text[-1] == "$") or (text[:2], text[-2:]) in ((r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"))
    ):
        text = text.strip("$").strip() if text[0] == "$" else text[2:-2].strip()
        text = text.strip(_TRAILING)
        if not text:
            return ""
    text = _GROUPED.sub(lambda found: found[1] + re.sub(r"\D", "", found[2]), text) if _is_one_number(text) else text
    text = _SPACES.sub(" ", text).replace(r"\$", "").replace("\\%", "%").replace("£", "").replace("€", "")
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    text = re.sub(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\degree|°", "", text)
    text = _unwrap(text).strip().strip("$").strip()
    text = _ASSIGNED.sub("", text)
    text = _strip_units(text).strip().strip(_TRAILING)
    return re.sub(r"\s+", " ", text)


def _is_one_number(text: str) -> bool:
    """Whether commas in it part thousands rather than the members of a list: 1,234 and not 1,234,5."""
    parts = _GROUPED.sub("0", re.sub(r"\\text\{[^{}]*\}|\\[,;](?!\d)", "", text))
    return "," not in parts and not text.lstrip("$ ").startswith(("(", "[", "\\{"))


def _unwrap(text: str) -> str:
    r"""\text{...} and its kin replaced by their contents, in one pass whatever their depth."""
    kept: list[str] = []
    braces: list[bool] = []  # whether the brace belongs to a wrapper
    place = 0
    for found in re.finditer(rf"{_WRAPPER.pattern}|\\[{{}}]|[{{}}]", text):
        kept.append(text[place : found.start()])
        place, word = found.end(), found[0]
        if word in ("\\{", "\\}"):
            kept.append(word)
        elif word == "}":
            kept.append(" " if braces and braces.pop() else "}")
        else:
            braces.append(word != "{")
            kept.append("{" if word == "{" else " ")
    return "".join(kept) + text[place:]


def _strip_units(text: str) -> str:
    """A unit goes only where a number stands before it."""
    if len(text) > 200 or not re.search(r"\d", text):
        return text
    short = _UNIT.sub("", text.strip())
    return short if re.search(r"\d", short) else text


# -- letters -------------------------------------------------------------------------------------------------------


def letter_strict(text: str, options: Sequence[str]) -> str | None:
    """The option a text chooses: box, tags or ####, else "answer is X", else X at the end, else an option's own text.

    Args:
        options: texts of A, B, C, ... Only letters that exist count; options may hold commas and are never split.
    """
    found = marked(text)
    if found is not None:
        return _as_letter(found, options)
    valid = _letters(options)
    said = None
    for match in _LETTER_PHRASE.finditer(text):
        upper = match[1].upper()
        # "the answer is a disease": a lower-case letter followed by a word is an article.
        if upper in valid and not (match[1] in "aAI" and re.match(r"\s+[a-z]", text[match.end() : match.end() + 20])):
            said = upper
    if said is not None:
        return said
    tail = text.rstrip()[-80:]
    if (end := _LETTER_END.search(tail)) and end[1] in valid:
        return end[1]
    last_line = text.strip().rpartition("\n")[2]
    return _option_text(last_line, options)


def letter_lenient(text: str, options: Sequence[str]) -> str | None:
    """``letter_strict``; else the last letter that stands alone; else the option named last; else None.

    The published script goes on to the most similar option and so never abstains; this one does.
    """
    if (found := letter_strict(text, options)) is not None:
        return found
    valid = _letters(options)
    alone = [
        match[1]
        for match in _LETTER_ALONE.finditer(text)
        if match[1] in valid and not (match[1] in "AI" and re.match(r" [a-z]", text[match.end() : match.end() + 2]))
    ]
    if alone:
        return alone[-1]
    lower = text.lower()
    places = {letter: lower.rfind(option.lower()) for letter, option in zip(valid, options, strict=True) if option}
    letter = max(places, key=lambda name: places[name], default=None)
    return letter if letter is not None and places[letter] >= 0 else None


def _letters(options: Sequence[str]) -> str:
    return "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(options)]


def _as_letter(answer: str, options: Sequence[str]) -> str | None:
    """B, (b), "B. Aspirin", \\text{B}, or an option's text."""
    valid = _letters(options)
    if (by_text := _option_text(answer, options)) is not None:
        return by_text
    plain = _unwrap(answer).strip(" $*_\n\t")
    found = re.match(r"(?:option|choice|answer)?\s*\(?([A-Za-z])(?:[).:,]|\s*$|\s*-\s)", plain, re.IGNORECASE)
    return found[1].upper() if found and found[1].upper() in valid else None


def _option_text(text: str, options: Sequence[str]) -> str | None:
    def plain(words: str) -> str:
        return re.sub(r"\s+", " ", _unwrap(words)).strip(_TRAILING + "$*").lower()

    wanted = plain(text)
    same = [letter for letter, option in zip(_letters(options), options, strict=True) if plain(option) == wanted]
    return same[0] if wanted and len(same) == 1 else None
