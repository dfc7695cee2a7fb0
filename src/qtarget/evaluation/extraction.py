"""Extracts the answer from a text in two readings that are never mixed.

strict    where the text marks its answer: <answer> tags, a complete \\boxed{}, or ####. Without a mark: no answer.
lenient   the published habit: without a mark, or with a #### and no number behind it, what follows "the answer is",
          else the last number (or option letter).

Every function is linear in the length of the text: outputs of 100 kB full of unclosed boxes are met in practice.
"""

from __future__ import annotations

import re
import unicodedata
from collections import deque
from collections.abc import Sequence
from string import ascii_uppercase

# Changes when a text would give another answer; part of the verifier version in every sample.
VERSION = 5

_BOX = re.compile(r"\\boxed\s*\{|\\[{}]|[{}]")
_NUMBER = re.compile(
    r"(?<![\w.^])[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+(?:\.\d+)?)?(?:[eE][-+]?\d+)?(?![\d])"
    r"|(?<=[\w.)])\d+(?:\.\d+)?|(?<![\w.])[-+]?\.\d+"
)
# No numbers of their own: the exponents of cm^3, cm^{3}, s^-1 and m2.
_EXPONENT = re.compile(r"\^(?:\{[-+]?\d+\}|[-+]?\d+)|(?<=[A-Za-z])(?<!\d[eE])\d(?![\d.]\d|\d)")
_THINKING, _THOUGHT = (re.compile(f"<{slash}(?:think|thinking|thought)>", re.IGNORECASE) for slash in ("", "/"))
_PHRASE = re.compile(r"(?:final\s+answer|answer)\s*(?:is|:|=)\s*:?\s*", re.IGNORECASE)
# A letter of an option where it is said to be the answer, in whatever brackets or marks.
_LETTER_PHRASE = re.compile(
    r"(?:answer|(?:correct|right|best)\s(?:option|choice))\b\s*+(?:(?:is|:|=)\s*+)?(?::\s*+)?"
    r"(?:(?:option|choice)\b\s*+(?::\s*+)?)?"
    r"(?:[*_$\"“]|\\[(\[])*+(?:\\text\{)?"
    r"[(\[]?([A-Za-z])\b(?!['’]\w)",
    re.IGNORECASE,
)
# "A" and "I" before another word are words of a sentence, unless that word goes on from a letter: A because ...
_WORD = re.compile(r"\s+(?!(?:and|or|but|not|because|since|as|for|due|while|which|with|from|is|was|by|given)\b)[a-z]")
# At the end: in brackets, alone on its line, or after a word that chooses; not hepatitis B, nor vitamin A.
_LETTER_END = re.compile(
    r"(?:^|[\n:*$=-]|\b(?i:is|be|choose|chose|select|pick|option|choice|answer|so|thus|therefore|hence|clearly|"
    r"likely|probably|definitely)(?=\s))\s*\*{0,2}([A-Z])[.*$]*\s*$|[(\[]([A-Z])[)\]][.*$]*\s*$"
)
_LETTER_ALONE = re.compile(r"(?<![A-Za-z])([A-Z])(?![A-Za-z''’])")
WRAPPER = r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|mbox|operatorname)\s*\{"
# Neither holds "!", for 5! is 120; a point in front belongs to .5.
_TRAILING = " \t\r\n.,;:。．，；"
_LEADING = " \t\r\n,;:。，；"
_FULL_WIDTH = {0xFF21 + i: ord("A") + i for i in range(26)}


def ascii_digits(text: str) -> str:
    """Decimal digits and separators of any script as ASCII, and typographers' minus signs; superscripts stay.

    >>> ascii_digits("−４٢")
    '-42'
    """
    if text.isascii():
        return text
    return "".join(str(unicodedata.decimal(letter, letter)) for letter in text).translate(
        {0x2212: "-", 0xFF0D: "-", 0xFE63: "-", 0xFF0E: ".", 0xFF0F: "/", 0x066B: ".", 0x066C: ","}
    )


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


def enclosed(text: str) -> str | None:
    """The last answer in <answer> tags, else in a box; None without one. A box inside of tags is the answer in them."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    inner = text[start + len("<answer>") : end] if start >= 0 else None
    box = boxed(text if inner is None else inner)
    answer = inner if box is None else box
    return None if answer is None else answer.strip()


def said(text: str) -> str:
    """A text without its thinking: what follows the last </think>; nothing where a <think> is not closed."""
    *_, rest = _THOUGHT.split(text)
    return "" if _THINKING.search(rest) else rest


def marked(text: str) -> str | None:
    """The last answer the text marks, its kinds in this order: <answer> tags, a box, ####; None without one."""
    found = enclosed(text)
    if found is None and "####" in text:
        return next(iter(text.rpartition("####")[2].strip().splitlines()), "").strip()
    return found


def final_answer(text: str) -> str:
    """What a text marks as its final answer, or the text itself.

    >>> final_answer("so 3 + 4 = 7. #### 7")
    '7'
    """
    found = marked(text)
    return text.strip() if found is None else found


def last_number(text: str) -> str | None:
    """The last number of the text as it stands there, without thousands separators; None without one.

    >>> last_number("from 5-3 to 1,234.50.")
    '1234.50'
    """
    last = _last(_NUMBER, _EXPONENT.sub(" ", ascii_digits(text)))
    return None if last is None else last[0].replace(",", "").removeprefix("+")


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return next(iter(deque(pattern.finditer(text), maxlen=1)), None)


def lenient(text: str) -> str | None:
    """The marked answer; else the number after the last "the answer is"; else the last number; else None.

    A #### without a digit behind it marks an answer only where the text holds no number at all.

    >>> lenient("3 + 4 = 7 #### is the answer")
    '7'
    """
    found = marked(text) or None
    if found is not None and (re.search(r"\d", found) or enclosed(text)):
        return found
    if (said := _last(_PHRASE, text)) is not None:
        sentence = re.split(r"(?<=[^\d])\.(?:\s|$)|\.\s|\.$|\n", text[said.end() : said.end() + 400], maxsplit=1)[0]
        if "$" in sentence and (inner := re.findall(r"\$([^$]+)\$", sentence)):
            return inner[0]
        if _FRACTION.fullmatch(whole := normal(sentence)):
            return whole
        if (number := last_number(sentence)) is not None:
            return number
    number = last_number(text)
    return found if number is None else number


# -- normal form ---------------------------------------------------------------------------------------------------

_FRACTION = re.compile(r"[-+]?\\frac\{-?\d+\}\{\d+\}")
_GROUPED = re.compile(r"(?<![\d.])(\d{1,3})((?:(?:,|\{,\}|\\,|\\!,|,\\!| )\d{3})+)(?![\d])")
_SPACES = re.compile(r"\\[,;:!> ]|~|\\q?quad|\\left(?![a-z])|\\right(?![a-z])|\\displaystyle|\\limits")
ASSIGNED = re.compile(r"^\s*(?:([A-Za-z])(?:_\{?\w+\}?)?(?:\([A-Za-z]\))?)?\s*(?:=|\\in(?![a-z]))\s*(?=[^=]+$)")
_SCALES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALE = re.compile(rf"(?<=\d)\s*({WRAPPER})?\s*({'|'.join(_SCALES)})\b")
_SYMBOLS = {"±": r"\pm ", "∞": r"\infty ", "π": r"\pi ", "∅": r"\emptyset ", "½": r"\frac{1}{2}", "°": r"^{\circ}"}


def bare(answer: str) -> str:
    """An answer as LaTeX without what stands around it: dollars, stars, stops; Unicode's symbols as commands."""
    text = ascii_digits(answer).lstrip(_LEADING).rstrip(_TRAILING)
    while len(text) > 1 and (
        (text[0] == text[-1] == "$") or (text[:2], text[-2:]) in ((r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"))
    ):
        text = text.strip("$").strip() if text[0] == "$" else text[2:-2].strip()
        text = text.lstrip(_LEADING).rstrip(_TRAILING)
    for symbol, command in _SYMBOLS.items():
        text = text.replace(symbol, command)
    text = re.sub(r"\\\\\[[\d.]+[a-z]{2}\]", r"\\\\", text)  # a matrix's \\[2pt]
    text = _SCALE.sub(lambda found: f"e{_SCALES[found[2]]}{found[1] or ''}", text)
    return re.sub(r"^[A-Z]{3}\s+(?=[\d.]+$)|\\\$|[$£€¥]", "", text.replace("\\varnothing", "\\emptyset")).strip()


def normal(answer: str) -> str:
    r"""``bare`` without what does not change its value: sizes, spaces, separators of thousands, degrees, ``x =``; words
    without their \text. The percent sign stays: 50 % is 1/2, and that it may be 50 is for the lenient score to grant.

    >>> normal(r"$x = 1{,}234\,\text{cm}$."), normal(r"\text{Tom}")
    ('1234 \\text{cm}', 'Tom')
    """
    text = bare(answer)
    # Commas part thousands only in a number that is alone: 1,234 and not 1,234,5.
    alone = _GROUPED.sub("0", re.sub(rf"{WRAPPER}[^{{}}]*\}}|\\[,;](?!\d)", "", text))
    if "," not in alone and not text.startswith(("(", "[", "\\{")):
        text = _GROUPED.sub(lambda found: found[1] + re.sub(r"\D", "", found[2]), text)
    text = re.sub(r"\\[dtc]frac", r"\\frac", _SPACES.sub(" ", text).replace("\\%", "%"))
    text = re.sub(rf"{WRAPPER}\s*percent\s*\}}|\bpercent\b", "%", text)
    text = re.sub(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\degree", " ", text)
    text = ASSIGNED.sub("", text)
    if re.match(WRAPPER, text):
        text = _unwrap(text)
    return re.sub(r"\s+", " ", text).strip().rstrip(_TRAILING)


def _unwrap(text: str) -> str:
    r"""\text{...} and its kin replaced by their contents, in one pass whatever their depth."""
    kept: list[str] = []
    braces: list[bool] = []  # whether the brace belongs to a wrapper
    place = 0
    for found in re.finditer(rf"{WRAPPER}|\\[{{}}]|[{{}}]", text):
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


# -- letters -------------------------------------------------------------------------------------------------------


def letter_strict(text: str, options: Sequence[str]) -> str | None:
    """The option a text chooses: a mark, else "answer is X", else X at the start, else at the end, else an option's text.

    Args:
        options: texts of A, B, C, ... Only letters that exist count; options may hold commas and are never split.
    """
    text = text.translate(_FULL_WIDTH)
    found = marked(text)
    if found is not None:
        return _as_letter(found, options)
    valid = _letters(options)
    said = [
        match[1].upper()
        for match in _LETTER_PHRASE.finditer(text)
        if match[1].upper() in valid and not (match[1] in "aAiI" and _WORD.match(text, match.end()))
    ]
    if said:
        return said[-1]
    if (phrase := _last(_PHRASE, text)) is not None:
        line = text[phrase.end() : phrase.end() + 2000].partition("\n")[0]
        for words in (line, line.partition(". ")[0]):
            if (by_text := _option_text(words, options)) is not None:
                return by_text
    if (first := _first(text.strip(), options)) is not None:
        return first
    tail = text.rstrip()[-80:]
    if (end := _LETTER_END.search(tail)) and (letter := end[1] or end[2]) in valid:
        return letter
    return _option_text(text.strip().rpartition("\n")[2], options)


def letter_lenient(text: str, options: Sequence[str]) -> str | None:
    """``letter_strict``; else the last letter that stands alone; else the option named last; else None.

    The published script goes on to the most similar option and so never abstains; this one does.
    """
    if (found := letter_strict(text, options)) is not None:
        return found
    text, valid = text.translate(_FULL_WIDTH), _letters(options)
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
    return ascii_uppercase[: len(options)]


def _first(text: str, options: Sequence[str]) -> str | None:
    """The letter a text begins with, unless it goes through the options one by one, or begins with "A. fib"."""
    line, _, rest = text.partition("\n")
    letter = _as_letter(line[:2000], options)
    if letter is None or len(line) == 1:
        return letter
    listed = re.search(r"^\W{0,9}([A-Z])[).:]", rest, re.MULTILINE)
    if listed and ord(listed[1]) == ord(letter) + 1:
        return None
    goes_on = re.match(r"\W*[A-Z]\. [a-z]", line) and options[ord(letter) - ord("A")].lower() not in line.lower()
    return None if goes_on else letter


def _as_letter(answer: str, options: Sequence[str]) -> str | None:
    """B, (b), "B. Aspirin", \\text{B}, or an option's text."""
    valid = _letters(options)
    if (by_text := _option_text(answer, options)) is not None:
        return by_text
    plain = re.sub(r"\\[()\[\]]", " ", _unwrap(answer)).strip(" $*_\n\t")
    found = re.match(
        r"(?:option|choice|answer)?\s*(?::\s*)?[(\[]?([A-Za-z])(?:[)\].:,]|\s*$|\s*[-–—*]|\s+(?:because|since)\b"
        r"|\s+is\s+(?:the\s+)?(?:answer|correct|right|best|most)\b)",
        plain,
        re.I,
    )
    if found is None or found[1].upper() not in valid:
        return None
    # "A, B" and "(A) or (B)" choose two; "B, since A ..." one.
    several = re.match(r"\W*(?:,|\band|\bor)\s*(?:and|or)?\s*[(\[]?[A-Z](?:[)\],.]|\s|$)", plain[found.end(1) :])
    return None if several else found[1].upper()


def _option_text(text: str, options: Sequence[str]) -> str | None:
    def plain(words: str) -> str:
        return re.sub(r"\s+", " ", _unwrap(words)).strip(_TRAILING + "$*!").lower()

    wanted = plain(text)
    same = [letter for letter, option in zip(_letters(options), options, strict=True) if plain(option) == wanted]
    return same[0] if wanted and len(same) == 1 else None
