"""Extraction: what a text answers, on hand-made cases; and in linear time."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest

from eval_cases import EQUAL, LETTERS, NORMAL, PARSED
from hangs import SECONDS, within
from qtarget.evaluation import equality, extraction, grade, graders
from qtarget.evaluation.grading import Grader

PAIRS = [json.loads(line) for line in Path(__file__).with_name("grading_pairs.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("text", "strict", "lenient"), PARSED)
def test_parsed(text, strict, lenient):
    verdict = graders._math_verdict(extraction.marked(text), extraction.lenient(text), "no answer")
    assert (verdict["parsed"], verdict["lenient_parsed"]) == (strict, lenient)


@pytest.mark.parametrize(("answer", "normal"), NORMAL)
def test_normal(answer, normal):
    assert extraction.normal(answer) == normal


@pytest.mark.parametrize(("gold", "answer", "same", "published"), EQUAL)
def test_equal(gold, answer, same, published):
    assert equality.same(gold, answer) is same
    assert equality.same(gold, answer, percent=True) is published


@pytest.mark.parametrize(("text", "options", "strict", "lenient"), LETTERS)
def test_letters(text, options, strict, lenient):
    assert extraction.letter_strict(text, options) == strict
    assert extraction.letter_lenient(text, options) == lenient


def test_there_are_enough_cases():
    assert len(PARSED) + len(NORMAL) + len(EQUAL) + len(LETTERS) >= 150


LONG = {
    "boxes": "\\boxed{" * 14_000,
    "boxes half closed": "\\boxed{1" * 12_000 + "}" * 6_000,
    "tags": "<answer>" * 12_500,
    "closing tags": "</answer>" * 11_000,
    "braces": "{" * 100_000,
    "wrappers": "\\text{" * 16_000,
    "digits": "7" * 100_000,
    "groups": "1,000" * 20_000,
    "commas": "1," * 50_000,
    "phrases": "answer is " * 10_000,
    "letters": "A " * 50_000,
    "spaces": " " * 100_000 + "x",
    "units": "1 m" * 33_000,
    "dollars": "$" * 100_000,
    "marks": "####" * 25_000,
    "an answer and spaces": "answer" + " " * 100_000,
    "an answer is and spaces": "answer is" + "\n" * 50_000 + ":" + " " * 50_000,
    "answers": "answer is: " * 9_000,
    "unit letters": "1" + "m" * 60 + "x",
    "unit words": "1 " + "mm m " * 30 + "x",
    "wrapped units": "1" + r"\text{ m}" * 20,
    "long wrapped units": "1" + r"\text{ m}" * 10_000,
}


@pytest.mark.parametrize("name", LONG)
def test_an_output_of_400_kb_is_read(name):
    """Each reading is linear in the text: a quadratic one takes minutes at a fourth of it, and is stopped here."""
    text = LONG[name] * 4
    with within(SECONDS):
        extraction.marked(text), extraction.lenient(text), extraction.normal(extraction.said(text))
        equality.number(text), equality.members(text)
        extraction.letter_lenient(text, ["x", "y"])
        extraction.normal(extraction.marked(f"\\boxed{{{text}}}") or "")


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("18 eggs", 18),
        (r"18 \text{ eggs}", 18),
        ("5 km/h", 5),
        (r"5 \mathrm{kJ/mol}", 5),
        (r"5\text{ m}^2", 5),
        ("2.50 cm^3", Fraction(5, 2)),
        ("2 1/3", Fraction(7, 3)),
        ("12 m", 12),
        ("2m", None),
        ("3 x", None),
        ("3 pi", None),
        ("3 million", None),
        ("3 or 4", None),
        ("12 eggs and 3 more", None),
        ("1/0", None),
    ],
)
def test_a_number_may_have_a_unit_and_no_more(answer, value):
    assert equality.number(answer) == value


# -- graders -------------------------------------------------------------------------------------------------------


def test_math_keeps_strict_and_lenient_apart():
    grade = graders._math
    assert [
        grade(text, {"answer": "50"})[key] for text in ["so 50", r"\boxed{50\%}"] for key in ("strict", "lenient")
    ] == [
        False,
        True,
        False,
        True,
    ]
    assert grade(r"\boxed{1, 2}", {"answer": ["2", "1"]})["strict"]
    assert grade(r"\boxed{5, 1234}", {"answer": ["1,234", "5 \\text{ cm}"]})["strict"]
    assert not grade(r"\boxed{5, 1, 234}", {"answer": ["1,234", "5"]})["strict"]
    assert grade("", {"answer": "1"}) == {"parsed": None, "lenient_parsed": None, "strict": False, "lenient": False}


def test_choice_accepts_letters_that_exist_and_abstains():
    row = {"options": ["x", "y"], "answer": "B"}
    assert graders._choice(r"\boxed{B}", row)["strict"]
    assert graders._choice("gibberish", row) == {
        "parsed": None,
        "lenient_parsed": None,
        "strict": False,
        "lenient": False,
    }


@pytest.mark.parametrize(
    ("text", "strict", "lenient"),
    [
        ("<answer>7</answer>", True, True),
        ("It is 7", False, True),
        ("7 or 8", False, False),
        (r"\boxed{7}", True, True),
        ("<answer>8</answer> 7", False, False),
    ],
)
def test_reasoning_gym(text, strict, lenient):
    grade = graders.load("reasoning_gym:chain_sum")
    said = grade(text, {"question": "3 + 4", "answer": "7", "metadata": {}})
    assert (said["strict"], said["lenient"]) == (strict, lenient)


def test_answers_of_several_lines():
    assert graders.unmarked("Here:\n1 2\n3 4\n", "5 6\n7 8") == "1 2\n3 4"
    assert graders.unmarked("the word\ncat", "dog") == "cat"
    assert graders.unmarked("  ", "dog") is None


# -- pairs ---------------------------------------------------------------------------------------------------------


def test_pairs_are_judged_as_mathematics_does():
    """gold, text and the verdict, null where it is a convention. Some right ones hold no mark: strictly no answer."""
    known = [pair for pair in PAIRS if pair["right"] is not None]
    with Grader("math", timeout=600.0) as patient, Grader("math", timeout=5.0) as brief:
        # A tower of powers has no verdict in any time, and so is wrong.
        graders_of = [brief if "^{10^" in pair["text"] else patient for pair in known]
        verdicts = [
            grader.ask(pair["text"], {"answer": pair["gold"]}).verdict or {}
            for grader, pair in zip(graders_of, known, strict=True)
        ]
    judged = [
        (pair["right"], said.get("strict", False), said.get("lenient", False))
        for pair, said in zip(known, verdicts, strict=True)
    ]
    assert not [pair for pair, (right, *said) in zip(known, judged, strict=True) if any(said) and not right]
    assert sum(right == strict for right, strict, _ in judged) >= 109
    assert sum(right == lenient for right, _, lenient in judged) >= 116


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}", False),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", True),
        (r"(-\infty,-2)\cup(2,\infty)", r"(-\infty,-2]\cup(2,\infty)", False),
        (r"(-\infty,-2)\cup(2,\infty)", r"(-\infty,-2)\cap(2,\infty)", False),
        (r"(-\infty,-2)\cup(2,\infty)", r"(2,\infty)\cup(-\infty,-2)", True),
        ("6", r"6\sqrt(5)", False),
        (r"2\sqrt{3}", "2", False),
        ("0", "10^{-9}", False),
        ("18", r"18 \text{ eggs}", True),
    ],
)
def test_grade(gold, answer, right):
    said = grade(rf"<think>\boxed{{no}}</think> \boxed{{{answer}}}", gold)
    assert said["strict"] is said["lenient"] is right


@pytest.mark.parametrize(
    "text", [r"<think>\boxed{5}", r"<Thinking>\boxed{5}", r"<think>\boxed{5}</think> No.", r"\boxed{5}</think>"]
)
def test_thinking_answers_nothing(text):
    assert grade(text, "5") == {"strict": False, "lenient": False, "parsed": None}
