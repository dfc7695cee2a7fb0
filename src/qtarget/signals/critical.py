"""cft's signal: the tokens that decide whether an answer is right (arXiv:2510.10974).

For each prompt the model answers greedily, and the right answers are kept. A token y_t is critical iff every alternative
ends in a wrong answer, where an alternative is one of the next likeliest tokens at t (the paper's: the second and the
third) put in its place and the rest decoded greedily again. An answer or a rest that does not end within
max_new_tokens is wrong. The end token is not critical.

As soon as one alternative ends right the token is not critical, and its others are not decoded.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value
from typing_extensions import TypedDict

from qtarget import files
from qtarget.errors import DataError
from qtarget.evaluation.grading import Grader
from qtarget.signals.decoding import Greedy

COLUMN = "critical"
# An alternative to decode: (problem, position in the answer, which of the alternatives). The smallest comes first, so
# that problems end one after the other and a killed search loses little.
_Try = tuple[int, int, int]


class _Record(TypedDict):
    """What every record has; see ``Search`` for the rest."""

    problem: int


class Progress:
    """Finished problems on disk, so that a killed search goes on where it stopped.

    Attributes:
        done: number of a problem → its record.

    Raises:
        StorageError: a whole line of the file cannot be read.
    """

    def __init__(self, file: Path):
        self._journal = files.Journal(file)
        self.done: dict[int, dict[str, Any]] = {}
        for record in files.read_lines(file, _Record, "run the same command again") if file.is_file() else ():
            self.done.setdefault(record["problem"], record)

    def add(self, record: dict[str, Any]) -> None:
        self.done[record["problem"]] = record
        self._journal.add([record])


@dataclass
class _Problem:
    """An answer and, where it is right, what its tokens are tried with."""

    number: int
    answer: list[int]
    alternatives: list[list[int]] = field(default_factory=list)
    critical: list[int | None] = field(default_factory=list)  # None: not decided yet
    counts: Counter[str] = field(default_factory=Counter)  # of the verifier
    verdicts: dict[str, bool] = field(default_factory=dict)  # many alternatives come back to the same text


@dataclass
class Search:
    """Finds the critical tokens of a list of problems.

    Args:
        greedy: the model. grader: of the answers. rows: the original rows. prompts: their token ids.
        alternatives: tokens tried in place of each. batch_size: sequences decoded together; decides nothing else.
        progress: gets each finished problem.
    """

    greedy: Greedy
    grader: Grader
    rows: Sequence[Mapping[str, Any]]
    prompts: Sequence[list[int]]
    alternatives: int
    batch_size: int
    progress: Progress
    _problems: dict[int, _Problem] = field(default_factory=dict, init=False)
    _tries: list[_Try] = field(default_factory=list, init=False)
    _searched: int = field(default=0, init=False)

    def run(self, step: Callable[[int, int], object] = lambda finished, right: None) -> None:
        """Search all problems that are not done.

        ``step`` gets, now and then, how many problems are finished, and how many right answers were searched in this run.
        """
        waiting = iter([number for number in range(len(self.rows)) if number not in self.progress.done])
        while True:
            while len(self._tries) < self.batch_size and (group := [*islice(waiting, self.batch_size)]):
                self._answer(group)
                step(len(self.progress.done), self._searched)
            if not self._tries:
                return
            self._try([heapq.heappop(self._tries) for _ in range(min(self.batch_size, len(self._tries)))])
            step(len(self.progress.done), self._searched)

    def _answer(self, group: list[int]) -> None:
        """Let the model answer, and line up the tokens of its right answers."""
        answers = self.greedy([self.prompts[number] for number in group])
        for number, answer in zip(group, answers, strict=True):
            problem = _Problem(number, answer)
            if not self._is_right(problem, answer):
                ended = answer[-1] in self.greedy.ends
                self.progress.add({"problem": number, "ended": ended, "correct": False, **problem.counts})
                continue
            problem.alternatives = self.greedy.alternatives(self.prompts[number], answer, self.alternatives)
            problem.critical = [*[None] * (len(answer) - 1), 0]
            self._problems[number] = problem
            for place in range(len(answer) - 1):
                heapq.heappush(self._tries, (number, place, 0))
            self._close(problem)

    def _try(self, tries: list[_Try]) -> None:
        replaced = []
        for number, place, which in tries:
            problem = self._problems[number]
            replaced.append([*problem.answer[:place], problem.alternatives[place][which]])
        going_on = [i for i, answer in enumerate(replaced) if answer[-1] not in self.greedy.ends]
        if going_on:
            rests = self.greedy([[*self.prompts[tries[i][0]], *replaced[i]] for i in going_on])
            for i, rest in zip(going_on, rests, strict=True):
                replaced[i] += rest
        for (number, place, which), answer in zip(tries, replaced, strict=True):
            problem = self._problems[number]
            right = self._is_right(problem, answer)
            if not right and which + 1 < self.alternatives:
                heapq.heappush(self._tries, (number, place, which + 1))
            else:
                problem.critical[place] = int(not right)
                self._close(problem)

    def _is_right(self, problem: _Problem, answer: list[int]) -> bool:
        """Whether an answer ends, and says what it should."""
        if answer[-1] not in self.greedy.ends:
            return False
        text, grader = self.greedy.text(answer[:-1]), self.grader
        if text not in problem.verdicts:
            timeouts, errors = grader.timeouts, grader.errors
            problem.verdicts[text] = grader(text, self.rows[problem.number])
            problem.counts.update(timeouts=grader.timeouts - timeouts, errors=grader.errors - errors)
        return problem.verdicts[text]

    def _close(self, problem: _Problem) -> None:
        if None in problem.critical:
            return
        self._problems.pop(problem.number)
        self._searched += 1
        tokens = {"answer": problem.answer, "critical": problem.critical}
        self.progress.add({"problem": problem.number, "ended": True, "correct": True, **tokens, **problem.counts})


# -- results -----------------------------------------------------------------------------------------------------


def report(records: Collection[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts over all problems; ``tokens`` are those of right answers without their end tokens.

    Raises:
        DataError: no answer is right, or no token is critical.
    """
    right = [record for record in records if record["correct"]]
    counts = {
        "problems": len(records),
        "ended": sum(record["ended"] for record in records),
        "correct": len(right),
        "tokens": sum(len(record["answer"]) - 1 for record in right),
        "critical": sum(sum(record["critical"]) for record in right),
        **{name: sum(record.get(name, 0) for record in records) for name in ("timeouts", "errors")},
    }
    verifier = f"the verifier timed out {counts['timeouts']} times and failed {counts['errors']} times"
    if not right:
        raise DataError(
            f"no greedy answer is right: of {counts['problems']} problems {counts['ended']} were answered to the end and "
            f"0 correctly, {verifier}; raise max_new_tokens, check the verifier, or use a model that can answer some"
        )
    if not counts["critical"]:
        raise DataError(
            f"no token is critical: of {counts['problems']} problems {counts['correct']} were answered correctly, and "
            f"each of their {counts['tokens']} tokens can be replaced without harm, {verifier}; check that the "
            "verifier refuses wrong answers, or use harder problems"
        )
    return counts


def table(
    records: Mapping[int, Mapping[str, Any]], prompts: Sequence[list[int]], others: Mapping[str, list]
) -> Dataset:
    """Rows of input_ids, labels (−100 on the prompt) and critical (0 or 1 per label, before the shift), by problem.

    ``others``: further columns of the original rows, a value for each problem.
    """
    right = [number for number in sorted(records) if records[number]["correct"]]
    columns: dict[str, list] = {"input_ids": [], "labels": [], COLUMN: []}
    for number in right:
        prompt, answer = prompts[number], records[number]["answer"]
        columns["input_ids"].append([*prompt, *answer])
        columns["labels"].append([-100] * len(prompt) + answer)
        columns[COLUMN].append([0] * len(prompt) + records[number]["critical"])
    kinds = {"input_ids": "int64", "labels": "int64", COLUMN: "int8"}
    rows = Dataset.from_dict(columns, Features({name: List(Value(kind)) for name, kind in kinds.items()}))
    for name, values in others.items():
        rows = rows.add_column(name, [values[number] for number in right])
    return rows
