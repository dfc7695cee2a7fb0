"""Runs an evaluation into a folder, and grades a finished folder again without a model."""

from __future__ import annotations

import itertools
import queue
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qtarget import files
from qtarget.errors import ConfigError, StorageError
from qtarget.evaluation import graders, records, scores
from qtarget.evaluation.grading import Answer, Grader
from qtarget.evaluation.tasks import Problem, Task

GREEDY = "greedy"

Key = tuple[str, int | str]


def plan(problems: Sequence[Problem], n: int) -> list[Key]:
    """(problem, sample) in the order of the file: each problem's greedy answer, then its n samples."""
    return [(problem.id, sample) for problem in problems for sample in (GREEDY, *range(n))]


class Graders:
    """Several killable processes of one grader, asked about a batch at once.

    Attributes:
        last_error: what a call that failed said, of the first process that had one.
    """

    def __init__(self, name: str, timeout: float, processes: int = 1):
        self._graders = [Grader(name, timeout) for _ in range(processes)]
        self._free: queue.SimpleQueue[Grader] = queue.SimpleQueue()
        for grader in self._graders:
            self._free.put(grader)
        self._threads = ThreadPoolExecutor(processes)

    def __enter__(self) -> Graders:
        return self

    def __exit__(self, *error: object) -> None:
        self._threads.shutdown()
        for grader in self._graders:
            grader.__exit__()

    @property
    def last_error(self) -> str | None:
        return next((grader.last_error for grader in self._graders if grader.last_error), None)

    def __call__(self, items: Sequence[tuple[dict[str, Any], dict[str, Any]]], version: str) -> list[dict[str, Any]]:
        """(sample, problem's row) → the samples with their verdicts."""
        return list(self._threads.map(lambda item: self._one(item[0], item[1], version), items))

    def _one(self, sample: dict[str, Any], row: dict[str, Any], version: str) -> dict[str, Any]:
        answer = Answer(None)
        if sample["text"].strip():
            grader = self._free.get()
            try:
                answer = grader.ask(sample["text"], row)
            finally:
                self._free.put(grader)
        verdict = answer.verdict or {"parsed": None, "lenient_parsed": None, "strict": False, "lenient": False}
        # A text that was cut off is wrong, whatever it had said by then.
        ended = sample["finish"] == "stop"
        right = {reading: bool(verdict[reading]) and ended for reading in ("strict", "lenient")}
        unparsed = {"unparsed": True} if verdict.pop("unparsed", False) else {}
        return {**sample, **verdict, **right, "fault": answer.fault, "verifier_version": version, **unparsed}


# -- sampling ------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One run's samples, of this process's share of the batches.

    Args:
        tasks, folder: begun with ``records.begin``. n, seed: see the command's help.
        prompts: of ``tasks.prompts``.
        batch_size: completions at once. timeout, processes: of the verifiers. rank, world: this process among all.

    Attributes:
        held: the samples of each task. last_error: what the latest call of a verifier that failed said.
    """

    tasks: Sequence[Task]
    folder: Path
    _: KW_ONLY
    n: int
    seed: int
    prompts: dict[tuple[str, str], list[int]]
    batch_size: int
    timeout: float
    processes: int = 1
    rank: int = 0
    world: int = 1
    last_error: str | None = field(default=None, init=False)

    def __post_init__(self):
        self.held = {task.name: records.Samples(self.folder, task.name, self.rank) for task in self.tasks}

    def missing(self) -> int:
        """How many samples no process has made."""
        return sum(one not in self.held[t.name].done for t in self.tasks for one in plan(t.problems, self.n))

    def batches(self) -> list[tuple[Task, list[Key]]]:
        """Those of this process that lack a sample. They are cut from the plan: the same however often it was killed."""
        cut = []
        for task in self.tasks:
            order = [one for one in plan(task.problems, self.n) if one not in self.held[task.name].settled]
            cut += [(task, order[at : at + self.batch_size]) for at in range(0, len(order), self.batch_size)]
        own = cut[self.rank :: self.world]
        return [(task, batch) for task, batch in own if not self.held[task.name].done.keys() >= set(batch)]

    def sample(self, sampler: Any, step: Callable[[int], None] = lambda done: None) -> None:
        """Make, judge and write what is missing of this process's share.

        Args:
            sampler: see ``sampling.Sampler``. step: told how many samples of the share are done.
        """
        done = 0
        for _, batches in itertools.groupby(self.batches(), key=lambda one: one[0].name):
            own = [*batches]
            with Graders(own[0][0].grader, self.timeout, self.processes) as open_graders:
                for task, batch in own:
                    self._batch(sampler, open_graders, task, batch)
                    done += len(batch)
                    step(done)
                self.last_error = open_graders.last_error or self.last_error

    def _batch(self, sampler: Any, open_graders: Graders, task: Task, batch: list[Key]) -> None:
        from qtarget.evaluation.sampling import Request, seed_of

        seeds = [
            None if isinstance(sample, str) else seed_of(self.seed, task.name, problem, sample)
            for problem, sample in batch
        ]
        requests = [
            Request(tuple(self.prompts[task.name, problem]), seed)
            for (problem, _), seed in zip(batch, seeds, strict=True)
        ]
        rows = {problem.id: problem.row for problem in task.problems}
        answers = []
        for (problem, sample), seed, completion in zip(batch, seeds, sampler(requests), strict=True):
            if (problem, sample) not in self.held[task.name].done:
                asked = {"task": task.name, "problem": problem, "sample": sample, "seed": seed}
                # In this order in the file.
                said = {name: getattr(completion, name) for name in ("text", "finish", "tokens", "entropy")}
                answers.append((asked | said, rows[problem]))
        self.held[task.name].add(open_graders(answers, task.version))

    def wait(self) -> None:
        """Until the other processes have written their shares."""
        while self.missing():
            time.sleep(0.5)
            for samples in self.held.values():
                samples.look()

    def finish(self) -> dict[str, Any]:
        """Merge the processes' files, and score. Only in the first process, after ``wait``."""
        for task in self.tasks:
            self.held[task.name].merge(plan(task.problems, self.n))
        all_scores = score(self.folder, {task.name: task.suite for task in self.tasks}, self.n)
        records.finish(self.folder, all_scores)
        return all_scores


# -- scores --------------------------------------------------------------------------------------------------------


def score(folder: Path, tasks: dict[str, str | None], n: int) -> dict[str, Any]:
    """{"tasks": {name: summary}, "suites": {name: averages}} of a folder's samples.

    Args:
        tasks: name → suite. n: samples a problem.
    """
    samples_of = {name: records.samples(folder, name) for name in tasks}
    summaries: dict[str, Any] = {name: scores.summary(samples, n) for name, samples in samples_of.items()}
    suites: dict[str, Any] = {}
    for suite in dict.fromkeys(suite for suite in tasks.values() if suite is not None):
        members = [name for name, own in tasks.items() if own == suite]
        suites[suite] = {
            "tasks": members,
            **{r: _suite(r, members, summaries, samples_of, n) for r in ("strict", "lenient")},
        }
    return {"tasks": summaries, "suites": suites}


def _suite(
    reading: str, members: list[str], summaries: dict[str, Any], samples: dict[str, list], n: int
) -> dict[str, Any]:
    """The macro average and its interval: problems are drawn inside each benchmark, then averaged."""
    greedy = scores.macro([summaries[name][reading]["greedy"] for name in members])
    if not n:
        return {"greedy": greedy}
    draws = [
        scores.with_unseen(scores.two_level(right, seed=number), len(right))
        for number, right in enumerate(verdicts(scores.grouped(samples[name]), reading) for name in members)
    ]
    average = scores.macro([summaries[name][reading]["avg"] for name in members])
    return {"avg": average, "interval": list(scores.interval(np.mean(draws, axis=0))), "greedy": greedy}


def verdicts(groups: dict[str, list[dict[str, Any]]], reading: str) -> np.ndarray:
    """[problems, n] of 0 and 1."""
    return np.array(
        [[int(record[reading]) for record in group if record["sample"] != GREEDY] for group in groups.values()]
    )


def rescore(
    folder: Path,
    timeout: float,
    processes: int = 1,
    step: Callable[[int], None] = lambda done: None,
    verifier: str | None = None,
) -> tuple[dict[str, Any], int]:
    """Judge a finished folder's texts again with the verifiers as they are now. Returns (scores, verdicts that changed).

    Args:
        verifier: the one function of the user's own that may be imported; what a folder names is not run for that alone.

    Raises:
        StorageError: the folder is unfinished, damaged or no folder of results.
        ConfigError: it names code that the user does not.
    """
    manifest = finished(folder)
    changed = done = 0
    for name, about in manifest["tasks"].items():
        _check_rescored(folder, name, about["verifier"], verifier)
    for name, about in manifest["tasks"].items():
        version = graders.version(about["verifier"])
        rows = {problem.id: problem.row for problem in records.problems(folder, name)}
        before = records.samples(folder, name)
        judged: list[dict[str, Any]] = []
        with Graders(about["verifier"], timeout, processes) as open_graders:
            for start in range(0, len(before), 64):
                unjudged = [{k: v for k, v in one.items() if k != "unparsed"} for one in before[start : start + 64]]
                judged += open_graders([(one, rows[one["problem"]]) for one in unjudged], version)
                step(done + len(judged))
        done += len(judged)
        changed += sum(
            (old["strict"], old["lenient"]) != (new["strict"], new["lenient"])
            for old, new in zip(before, judged, strict=True)
        )
        files.write(folder / "samples" / f"{name}.jsonl", "".join(map(files.line, judged)))
        about["verifier_version"] = version
    all_scores = score(folder, {name: about["suite"] for name, about in manifest["tasks"].items()}, manifest["n"])
    records.write_manifest(folder, manifest)
    records.finish(folder, all_scores)
    return all_scores, changed


def _check_rescored(folder: Path, task: str, grader: str, verifier: str | None) -> None:
    if graders.is_code(grader) and grader != verifier:
        raise ConfigError(
            f"verifier is {grader!r} in {str(folder)!r}; code that a folder names is not run: write "
            f"--verifier {grader} if you know it"
        )
    graders.check(grader)
    rows = {problem.id: problem.row for problem in records.problems(folder, task)}
    for number, row in enumerate(rows.values(), start=1):
        if missing := [column for column in graders.reads(grader) if column not in row]:
            file = folder / "problems" / f"{task}.jsonl"
            raise StorageError(
                f"{file} is damaged in line {number}; its row has no {missing[0]}: run qtarget eval again"
            )
    for record in records.samples(folder, task):
        if record["problem"] not in rows:
            raise StorageError(
                f"{str(folder)!r} has answers to problem {record['problem']!r} of task {task}, which it does not "
                "contain; run qtarget eval into another folder"
            )


def finished(folder: Path) -> dict[str, Any]:
    """The manifest of a finished folder, or ConfigError."""
    manifest = records.read_manifest(folder)
    if manifest is None:
        raise StorageError(
            f"{str(folder)!r} holds no results (no {records.FILE}); name a folder that qtarget eval wrote"
        )
    if not manifest["finished"]:
        raise StorageError(
            f"{str(folder)!r} is unfinished; run the same qtarget eval command again, it resumes where it stopped"
        )
    return manifest
