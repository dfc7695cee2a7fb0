"""The task: chains of arithmetic modulo 10, with solutions whose every token is known to be unique, free or wrong.

A problem is a start digit and K operations: ``7+3*4-2>`` asks for ((7+3)*4−2) mod 10, from left to right. A solution
has a line per step and then the answer: a connective (w, x, y or z), the step in one of three layouts, a stop.

    A   w7+3=0;      B   w0=7+3;      C   w+73:0;       and at the end   #8

At each position the set of right tokens is known: all connectives at the start of a line; after it, what any layout of
the world would write; elsewhere one token. A noisy step has a wrong result digit, and the chain goes on from it
("carried") or from the right one ("isolated").
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

DIGITS, OPERATORS, CONNECTIVES = "0123456789", "+-*", "wxyz"
TOKENS = ["<pad>", "<eos>", *DIGITS, *OPERATORS, *CONNECTIVES, "=", ":", ";", ">", "#"]
ID = {token: number for number, token in enumerate(TOKENS)}
PAD, EOS, ANSWER = ID["<pad>"], ID["<eos>"], ID["#"]
VOCAB = len(TOKENS)
IGNORED = -100
LINE = 7  # tokens of a line, in every layout
UNIQUE, FREE, NOISY = 0, 1, 2
KINDS = ("unique", "free", "noisy")


@dataclass(frozen=True)
class Problem:
    """start: a digit. steps: (operator, digit), at least one."""

    start: int
    steps: tuple[tuple[str, int], ...]

    @property
    def prompt(self) -> list[int]:
        return [ID[str(self.start)], *(ID[c] for op, d in self.steps for c in (op, str(d))), ID[">"]]

    @property
    def answer(self) -> int:
        value = self.start
        for operator, digit in self.steps:
            value = result(value, operator, digit)
        return value

    @property
    def part(self) -> str:
        """Which split it belongs to, whatever the seed: a hash of the problem decides, so that splits never meet."""
        at = random.Random(f"part {self}").random()
        return "test" if at < 0.1 else "dev" if at < 0.2 else "train"


@dataclass(frozen=True)
class Style:
    """What a writer chooses from, and which layouts exist in his world (they decide what else would be right)."""

    layouts: str = "AB"
    connectives: str = CONNECTIVES
    world: str = "AB"


MIXED = Style()
ONE = Style("B", "w")
OTHER = Style("A")
UNSEEN = Style("C", "w", "ABC")


@dataclass
class Solution:
    """ids: of the tokens after the prompt. kinds: one of KINDS a token. right: the set of right ids a token."""

    ids: list[int]
    kinds: list[int]
    right: list[set[int]]


def result(value: int, operator: str, digit: int) -> int:
    return {"+": value + digit, "-": value - digit, "*": value * digit}[operator] % 10


def problem(rng: random.Random, length: int, part: str) -> Problem:
    while True:
        found = Problem(rng.randrange(10), tuple((rng.choice(OPERATORS), rng.randrange(10)) for _ in range(length)))
        if found.part == part:
            return found


def line(layout: str, value: int, operator: str, digit: int, written: int) -> list[int]:
    a, d, r = ID[str(value)], ID[str(digit)], ID[str(written)]
    if layout == "A":
        return [a, ID[operator], d, ID["="], r]
    if layout == "B":
        return [r, ID["="], a, ID[operator], d]
    return [ID[operator], a, d, ID[":"], r]


def solve(asked: Problem, rng: random.Random, style: Style, noise: float = 0.0, kind: str = "carried") -> Solution:
    """A solution with every step's result wrong at rate ``noise``; layout and connective are drawn for each line."""
    made = Solution([], [], [])
    every = {ID[c] for c in CONNECTIVES}

    def put(token: int, right: set[int], sort: int | None = None) -> None:
        made.ids.append(token)
        made.right.append(right)
        made.kinds.append(sort if sort is not None else FREE if len(right) > 1 else UNIQUE)

    value = asked.start
    for operator, digit in asked.steps:
        true = result(value, operator, digit)
        wrong = rng.random() < noise
        written = (true + rng.randrange(1, 10)) % 10 if wrong else true
        layout = rng.choice(style.layouts)
        put(ID[rng.choice(style.connectives)], every)
        tokens = line(layout, value, operator, digit, written)
        at = 0 if layout == "B" else 4
        first = {line(other, value, operator, digit, true)[0] for other in style.world}
        for position, token in enumerate(tokens):
            right = first if position == 0 else {ID[str(true)]} if position == at else {token}
            put(token, right, NOISY if position == at and wrong else None)
        put(ID[";"], {ID[";"]})
        value = written if kind == "carried" else true
    for token in (ANSWER, ID[str(value)], EOS):
        put(token, {token})
    return made


def is_right(asked: Problem, completion: list[int]) -> bool:
    """Whether a completion ends in ``# answer <eos>`` with the right digit; nothing else is looked at."""
    end = completion.index(EOS) if EOS in completion else -1
    return end >= 2 and completion[end - 2 : end] == [ANSWER, ID[str(asked.answer)]]


@dataclass
class Rows:
    """ids, labels, kinds: [rows, length] int64, labels before the shift; kinds is −1 where nothing is supervised.

    right: [rows, length, VOCAB] booleans of the labels, or None where not asked for.
    """

    ids: Tensor
    labels: Tensor
    kinds: Tensor
    right: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, which: slice) -> Rows:
        right = None if self.right is None else self.right[which]
        longest = int((self.ids[which] != PAD).sum(1).max())
        cut = (slice(None), slice(longest))
        return Rows(self.ids[which][cut], self.labels[which][cut], self.kinds[which][cut], right)


def rows(pairs: list[tuple[Problem, Solution]], right: bool = False) -> Rows:
    """Right-padded; a causal model needs no mask for that."""
    length = max(len(p.prompt) + len(s.ids) for p, s in pairs)
    ids = torch.full((len(pairs), length), PAD)
    labels, kinds = torch.full_like(ids, IGNORED), torch.full_like(ids, -1)
    sets = torch.zeros(len(pairs), length, VOCAB, dtype=torch.bool) if right else None
    for row, (asked, solution) in enumerate(pairs):
        start, end = len(asked.prompt), len(asked.prompt) + len(solution.ids)
        ids[row, :end] = torch.tensor(asked.prompt + solution.ids)
        labels[row, start:end] = ids[row, start:end]
        kinds[row, start:end] = torch.tensor(solution.kinds)
        if sets is not None:
            for position, allowed in enumerate(solution.right):
                sets[row, start + position, list(allowed)] = True
    return Rows(ids, labels, kinds, sets)


def demonstrations(
    seed: str, count: int, lengths: tuple[int, ...], style: Style, noise: float = 0.0, kind: str = "carried"
) -> list[tuple[Problem, Solution]]:
    """Drawn from the training split; the same seed gives the same problems whatever the noise and style."""
    problems, writer = random.Random(f"{seed} problems"), random.Random(f"{seed} solutions")
    asked = [problem(problems, problems.choice(lengths), "train") for _ in range(count)]
    return [(p, solve(p, writer, style, noise, kind)) for p in asked]


def problems(part: str, count: int, lengths: tuple[int, ...]) -> list[Problem]:
    """Different problems of a split, the same for every seed, so that arms and seeds are paired on them."""
    rng = random.Random(f"problems {part} {lengths}")
    found: dict[Problem, None] = {}
    while len(found) < count:
        found[problem(rng, lengths[len(found) % len(lengths)], part)] = None
    return list(found)
