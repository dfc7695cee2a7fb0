"""cft's signal: the tokens that decide whether an answer is right (arXiv:2510.10974).

For each prompt the model answers greedily, and the right answers are kept. A token y_t is critical iff every alternative
ends in a wrong answer, where an alternative is one of the next likeliest tokens at t (the paper's: the second and the
third) put in its place and the rest decoded greedily anew. An answer or a rest that does not end within
max_new_tokens is wrong. The end token is not critical.

As soon as one alternative ends right the token is not critical, and its others are not decoded.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from datasets import Dataset, Features, List, Value

from qtarget.errors import DataError
from qtarget.evaluation.grading import Grader
from qtarget.signals.decoding import Greedy
from qtarget.signals.progress import Progress

COLUMN = "critical"
# An alternative to decode: (problem, position in the answer, which of the alternatives). The smallest comes first, so
# that problems end one after the other and a killed search loses little.
_Try = tuple[int, int, int]


@dataclass
class _Problem:
    """A right answer whose tokens are being tried."""

    number: int
    row: Mapping[str, Any]
    prompt: list[int]
    answer: list[int]
    alternatives: list[list[int]]
    critical: list[int]
    open: int  # tokens not decided yet
    counts: dict[str, int]  # of the verifier
    verdicts: dict[str, bool] = field(default_factory=dict)  # many alternatives come back to the same text


class Search:
    """Finds the critical tokens of a list of problems.

    Args:
        greedy: the model. grader: of the answers. rows: the original rows. prompts: their token ids.
        alternatives: tokens tried in place of each. batch_size: sequences decoded together; decides nothing else.
        progress: gets each finished problem.
    """

    def __init__(
        self,
        greedy: Greedy,
        grader: Grader,
        rows: Sequence[Mapping[str, Any]],
        prompts: Sequence[list[int]],
        alternatives: int,
        batch_size: int,
        progress: Progress,
    ):
        self._greedy, self._grader, self._rows, self._prompts = greedy, grader, rows, prompts
        self._count, self._batch_size, self._progress = alternatives, batch_size, progress
        self._problems: dict[int, _Problem] = {}
        self._tries: list[_Try] = []
        self._searched = 0

    def run(self, step: Callable[[int, int], object] = lambda finished, right: None) -> None:
        """Search all problems that are not done.

        ``step`` gets, now and then, how many problems are finished, and how many right answers were searched in this run.
        """
        waiting = iter([number for number in range(len(self._rows)) if number not in self._progress.done])
        while True:
            while len(self._tries) < self._batch_size and (group := [*islice(waiting, self._batch_size)]):
                self._answer(group)
                step(len(self._progress.done), self._searched)
            if not self._tries:
                return
            self._try([heapq.heappop(self._tries) for _ in range(min(self._batch_size, len(self._tries)))])
            step(len(self._progress.done), self._searched)

    def _answer(self, group: list[int]) -> None:
        """Let the model answer, and line up the tokens of its right answers."""
        answers = self._greedy([self._prompts[number] for number in group])
        for number, answer in zip(group, answers, strict=True):
            problem = _Problem(number, self._rows[number], self._prompts[number], answer, [], [], 0, {})
            ended = answer[-1] in self._greedy.ends
            if not ended or not self._right(problem, answer[:-1]):
                self._progress.add({"problem": number, "ended": ended, "correct": False, **problem.counts})
                continue
            problem.alternatives = self._greedy.alternatives(problem.prompt, answer, self._count)
            problem.critical, problem.open = [0] * len(answer), len(answer) - 1
            self._problems[number] = problem
            for place in range(len(answer) - 1):
                heapq.heappush(self._tries, (number, place, 0))
            self._close(problem)

    def _try(self, tries: list[_Try]) -> None:
        replaced = []
        for number, place, which in tries:
            problem = self._problems[number]
            replaced.append([*problem.answer[:place], problem.alternatives[place][which]])
        going_on = [i for i, answer in enumerate(replaced) if answer[-1] not in self._greedy.ends]
        if going_on:
            rests = self._greedy([[*self._problems[tries[i][0]].prompt, *replaced[i]] for i in going_on])
            for i, rest in zip(going_on, rests, strict=True):
                replaced[i] += rest
        for (number, place, which), answer in zip(tries, replaced, strict=True):
            problem = self._problems[number]
            right = answer[-1] in self._greedy.ends and self._right(problem, answer[:-1])
            if not right and which + 1 < self._count:
                heapq.heappush(self._tries, (number, place, which + 1))
                continue
            problem.critical[place] = int(not right)
            problem.open -= 1
            self._close(problem)

    def _right(self, problem: _Problem, answer: list[int]) -> bool:
        text = self._greedy.text(answer)
        if text not in problem.verdicts:
            before = self._grader.timeouts, self._grader.errors
            problem.verdicts[text] = self._grader(text, problem.row)
            after = self._grader.timeouts, self._grader.errors
            for name, was, now in zip(("timeouts", "errors"), before, after, strict=True):
                problem.counts[name] = problem.counts.get(name, 0) + now - was
        return problem.verdicts[text]

    def _close(self, problem: _Problem) -> None:
        if problem.open:
            return
        self._problems.pop(problem.number)
        self._searched += 1
        told = {"answer": problem.answer, "critical": problem.critical}
        self._progress.add({"problem": problem.number, "ended": True, "correct": True, **told, **problem.counts})


# -- results -----------------------------------------------------------------------------------------------------


def report(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts over all problems; ``tokens`` are those of right answers without their end tokens.

    Raises:
        DataError: no answer is right, or no token is critical.
    """
    records = [*records]
    right = [record for record in records if record["correct"]]
    counts = {
        "problems": len(records),
        "ended": sum(record["ended"] for record in records),
        "correct": len(right),
        "tokens": sum(len(record["answer"]) - 1 for record in right),
        "critical": sum(sum(record["critical"]) for record in right),
        "timeouts": sum(record.get("timeouts", 0) for record in records),
        "errors": sum(record.get("errors", 0) for record in records),
    }
    verifier = f"the verifier took too long {counts['timeouts']} times and failed {counts['errors']} times"
    if not right:
        raise DataError(
            f"no greedy answer is right: of {counts['problems']} problems {counts['ended']} were answered to the end and "
            f"0 correctly, {verifier}; raise max_new_tokens, check the verifier, or take a model that can answer some"
        )
    if not counts["critical"]:
        raise DataError(
            f"no token is critical: of {counts['problems']} problems {counts['correct']} were answered correctly, and "
            f"each of their {counts['tokens']} tokens can be replaced without harm, {verifier}; check that the verifier "
            "refuses wrong answers, or take harder problems"
        )
    return counts


def table(
    records: Mapping[int, Mapping[str, Any]], prompts: Sequence[list[int]], others: Mapping[str, list]
) -> Dataset:
    """Rows of input_ids, labels (−100 on the prompt) and critical (0 or 1 per label, before the shift), by problem.

    ``others``: further columns of the original rows, a value for each problem.
    """
    right = [number for number in sorted(records) if records[number]["correct"]]
    made: dict[str, list] = {"input_ids": [], "labels": [], COLUMN: []}
    for number in right:
        prompt, answer = prompts[number], records[number]["answer"]
        made["input_ids"].append([*prompt, *answer])
        made["labels"].append([-100] * len(prompt) + answer)
        made[COLUMN].append([0] * len(prompt) + records[number]["critical"])
    features = Features(
        {"input_ids": List(Value("int64")), "labels": List(Value("int64")), COLUMN: List(Value("int8"))}
    )
    rows = Dataset.from_dict(made, features=features)
    for name, values in others.items():
        rows = rows.add_column(name, [values[number] for number in right])
    return rows


def prompts_of(greedy: Greedy, rows: Iterable[Mapping[str, Any]]) -> Iterator[list[int]]:
    """Token ids of every row's prompt; see ``Greedy.prompt``."""
    for number, row in enumerate(rows):
        yield greedy.prompt(row, number)
