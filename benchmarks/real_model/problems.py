"""The rows: reasoning-gym's ``chain_sum``, each sum with a solution worked step by step.

    12 + 34 - 5 = ?        is answered by        12 + 34 = 46, 46 - 5 = 41

The small form's sums have two terms, and so one step. A wrong label is a wrong result of a step, from which the rest
goes on. A problem trained on is never tested, and a teacher's is no student's: they are drawn from streams far apart,
and a sum whose signed numbers stand among the others' in any order is left out.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

SYSTEM = "Calculate."
TEST_SEED = 1_000_000_000  # chain_sum draws item i from seed + i, so seeds are kept far apart
TRAIN_SEED = 1_000_000  # times the training seed
TEACHER_SEED = 2_000_000_000  # more, for the rows of the teacher that is trained
LARGEST_ERROR = 10  # of a wrong result


@dataclass(frozen=True)
class Sums:
    """How many terms, and the digits of their numbers: ``short_digits`` in a third of the sums, and of the rest."""

    fewest_terms: int
    most_terms: int
    short_digits: int
    long_digits: int


PAIRS = Sums(2, 2, 1, 2)
CHAINS = Sums(3, 5, 2, 3)


def expression_key(expression: str) -> str:
    """The same text for 3 + 5 and 5 + 3."""
    return " ".join(sorted(operation + term for operation, term in signed(f"+ {expression}")))


def signed(terms: str) -> list[tuple[str, str]]:
    """(operation, number) of ``+ 3 - 5``."""
    words = terms.split()
    return [*zip(words[::2], words[1::2], strict=True)]


def draw(count: int, seed: int, taken: frozenset[str] = frozenset(), sums: Sums = PAIRS) -> list[tuple[str, int]]:
    """``count`` different sums (expression, result) without those in ``taken``, in an order that belongs to the seed."""
    short = count // 3
    drawn: list[tuple[str, int]] = []
    for digits, wanted in (sums.short_digits, short), (sums.long_digits, count - short):
        seen = set(taken)
        stream = _stream(sums, digits, seed)
        while wanted:
            expression, result = next(stream)
            if (key := expression_key(expression)) not in seen:
                seen.add(key)
                drawn.append((expression, result))
                wanted -= 1
    random.Random(seed).shuffle(drawn)
    return drawn


def _stream(sums: Sums, digits: int, seed: int) -> Iterator[tuple[str, int]]:
    import reasoning_gym

    items = reasoning_gym.create_dataset(
        "chain_sum",
        seed=seed,
        size=TRAIN_SEED // 2,  # far more than are taken: there are few sums of two digits
        min_terms=sums.fewest_terms,
        max_terms=sums.most_terms,
        min_digits=digits,
        max_digits=digits,
    )
    for item in items:
        yield item["metadata"]["expression"], int(item["answer"])


def prompt(expression: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"{expression} = ?"}]


def worked(expression: str, errors: Mapping[int, int] = MappingProxyType({})) -> str:
    """The solution. errors: {step: what is added to its result}; the steps behind it go on from there."""
    first, _, rest = expression.partition(" ")
    value, steps = int(first), []
    for step, (operation, term) in enumerate(signed(rest)):
        result = (value + int(term) if operation == "+" else value - int(term)) + errors.get(step, 0)
        steps.append(f"{value} {operation} {term} = {result}")
        value = result
    return ", ".join(steps)


def answer(expression: str) -> str:
    return worked(expression).rpartition(" = ")[2]


def train_rows(
    count: int, seed: int, noise: float, tested: frozenset[str], sums: Sums = PAIRS, stream: int = 0
) -> list[dict[str, Any]]:
    """Worked demonstrations. The column ``solution`` is right in every row; it is for the teacher's context alone.

    Args:
        noise: the share of steps, to the nearest whole one, whose result is wrong. The same seed gives the same problems
            in the same order for every noise.
        tested: keys of the problems that are left out.
        stream: added to the seed of the problems.
    """
    drawn = draw(count, stream + TRAIN_SEED * seed, tested, sums)
    lengths = [expression.count(" ") // 2 for expression, _ in drawn]
    wrong = wrong_steps(sum(lengths), seed, noise)
    rows, before = [], 0
    for (expression, _), length in zip(drawn, lengths, strict=True):
        errors = {step: wrong[before + step] for step in range(length) if before + step in wrong}
        rows.append(demonstration(expression, errors))
        before += length
    return rows


def demonstration(expression: str, errors: Mapping[int, int] = MappingProxyType({})) -> dict[str, Any]:
    return {
        "prompt": prompt(expression),
        "completion": [{"role": "assistant", "content": worked(expression, errors)}],
        "solution": worked(expression),
    }


def wrong_steps(count: int, seed: int, noise: float) -> dict[int, int]:
    """{step: what is added to its result}, of steps counted over all rows in their order."""
    choice = random.Random(f"wrong results of seed {seed}")
    wrong = sorted(choice.sample(range(count), round(noise * count)))
    return {step: choice.choice([-1, 1]) * choice.randint(1, LARGEST_ERROR) for step in wrong}


def teacher_rows(count: int, seed: int, students: int, tested: frozenset[str], sums: Sums) -> list[dict[str, Any]]:
    """Right demonstrations of none of the problems that the ``students`` rows of that seed have."""
    own = {expression_key(expression) for expression, _ in draw(students, TRAIN_SEED * seed, tested, sums)}
    return train_rows(count, seed, 0.0, tested | own, sums, TEACHER_SEED)


def tested_keys(count: int, sums: Sums = PAIRS) -> frozenset[str]:
    return frozenset(expression_key(expression) for expression, _ in draw(count, TEST_SEED, sums=sums))


def test_problems(count: int, sums: Sums = PAIRS) -> list[dict[str, Any]]:
    """For ``qtarget eval``: prompt, answer, and the sum itself as the problem's name."""
    return [
        {"id": expression, "prompt": prompt(expression), "answer": str(result)}
        for expression, result in draw(count, TEST_SEED, sums=sums)
    ]


def held_out_rows(count: int, of: int, sums: Sums = PAIRS) -> list[dict[str, Any]]:
    """The first test problems as clean demonstrations, for their nll."""
    return [demonstration(row["id"]) for row in test_problems(of, sums)[:count]]


def write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
