"""The rows: reasoning-gym's ``chain_sum`` with two terms, a third of one digit each and the rest of two.

A problem trained on is never tested: the two are drawn from streams far apart, and a sum whose numbers and operation
stand among the test problems in any order is left out of training.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SYSTEM = "Calculate."
TEST_SEED = 1_000_000_000  # chain_sum draws item i from seed + i, so seeds are kept far apart
TRAIN_SEED = 1_000_000  # times the training seed
LARGEST_ERROR = 10  # of a wrong result


def expression_key(expression: str) -> str:
    """The same text for 3 + 5 and 5 + 3."""
    first, operation, second = expression.split()
    return " + ".join(sorted((first, second))) if operation == "+" else expression


def draw(count: int, seed: int, taken: frozenset[str] = frozenset()) -> list[tuple[str, int]]:
    """``count`` different sums (expression, result) without those in ``taken``, in an order that belongs to the seed."""
    short = count // 3
    drawn: list[tuple[str, int]] = []
    for digits, wanted in (1, short), (2, count - short):
        seen = set(taken)
        stream = _stream(digits, seed)
        while wanted:
            expression, result = next(stream)
            if (key := expression_key(expression)) not in seen:
                seen.add(key)
                drawn.append((expression, result))
                wanted -= 1
    random.Random(seed).shuffle(drawn)
    return drawn


def _stream(digits: int, seed: int) -> Iterator[tuple[str, int]]:
    import reasoning_gym

    # far more than are taken: there are 126 different sums of one digit
    items = reasoning_gym.create_dataset(
        "chain_sum", seed=seed, size=5000, min_terms=2, max_terms=2, min_digits=digits, max_digits=digits
    )
    for item in items:
        yield item["metadata"]["expression"], int(item["answer"])


def prompt(expression: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"{expression} = ?"}]


def train_rows(count: int, seed: int, noise: float, tested: frozenset[str]) -> list[dict[str, Any]]:
    """Demonstrations ``a + b = c``. The column ``solution`` is right in every row; it is for the teacher's context alone.

    Args:
        noise: the share of rows, to the nearest whole row, whose demonstration ends in a wrong result. The same seed
            gives the same problems in the same order for every noise.
        tested: keys of the test problems.
    """
    sums = draw(count, TRAIN_SEED * seed, tested)
    choice = random.Random(f"wrong results of seed {seed}")
    wrong = set(choice.sample(range(count), round(noise * count)))
    rows = []
    for i, (expression, result) in enumerate(sums):
        error = choice.choice([-1, 1]) * choice.randint(1, LARGEST_ERROR) if i in wrong else 0
        rows.append(
            {
                "prompt": prompt(expression),
                "completion": [{"role": "assistant", "content": f"{expression} = {result + error}"}],
                "solution": f"{expression} = {result}",
            }
        )
    return rows


def tested_keys(count: int) -> frozenset[str]:
    return frozenset(expression_key(expression) for expression, _ in draw(count, TEST_SEED))


def test_problems(count: int) -> list[dict[str, Any]]:
    """For ``qtarget eval``: prompt, answer, and the sum itself as the problem's name."""
    return [
        {"id": expression, "prompt": prompt(expression), "answer": str(result)}
        for expression, result in draw(count, TEST_SEED)
    ]


def held_out_rows(count: int, of: int) -> list[dict[str, Any]]:
    """The first test problems as clean demonstrations, for their nll."""
    return [
        {
            "prompt": row["prompt"],
            "completion": [{"role": "assistant", "content": f"{row['id']} = {row['answer']}"}],
            "solution": f"{row['id']} = {row['answer']}",
        }
        for row in test_problems(of)[:count]
    ]


def write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
