"""Compares result folders on the same problems and seeds, with bootstrap intervals.

An arm is one folder, or several that differ in their training seed alone. Every arm is compared with the first. Three
levels are drawn: training seeds (where an arm has several; arms are paired by their order), problems, samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qtarget import files
from qtarget.errors import ConfigError, StorageError
from qtarget.evaluation import records, running, scores

# To be told apart in four of five repetitions at 95 %: (1.96 + 0.84)² standard errors squared.
_NEEDED = (1.959964 + 0.841621) ** 2
_FEW = 20
MEAN = "mean of tasks"


@dataclass(frozen=True)
class Arm:
    """name: in tables. folders: one a training seed. groups: per folder {task: {problem: records}}."""

    name: str
    folders: tuple[Path, ...]
    groups: tuple[dict[str, dict[str, list[dict[str, Any]]]], ...]


@dataclass(frozen=True)
class Difference:
    """An arm's score minus the first arm's.

    Attributes:
        task: its name, or which mean: see ``_means``. measure: strict, lenient, greedy, pass@n or tokens.
        first, other: the two scores. low, high: the 95 % interval of the difference. problems: how many.
        needed: how many problems would show a difference of this size in four of five repetitions; None where the
            interval excludes zero, or where the difference is 0 and no number would do.
    """

    task: str
    arm: str
    measure: str
    first: float
    other: float
    low: float
    high: float
    problems: int
    needed: int | None

    @property
    def value(self) -> float:
        return self.other - self.first

    @property
    def shown(self) -> bool:
        """Whether the interval excludes zero. One problem has no spread of problems, so that it shows nothing."""
        return self.problems > 1 and (self.low > 0 or self.high < 0)

    def sentence(self) -> str:
        """What may be said of it."""
        if self.shown:
            return "higher" if self.value > 0 else "lower"
        if self.needed is None:
            return "no difference shown" + ("; the scores are the same" if self.value == 0 else "")
        return f"no difference shown; about {self.needed:,} problems would be needed"


@dataclass(frozen=True)
class Comparison:
    """arms: names and folders. tasks: names. n: samples a problem. settings: those all share.

    scores: {arm: {task: {"strict", "lenient", "greedy", "tokens", "truncated", "no_answer", "pass", "pass_low",
    "pass_high"}}}, means over training seeds. notes: what a reader must know.
    """

    arms: list[Arm]
    tasks: list[str]
    n: int
    settings: dict[str, Any]
    scores: dict[str, dict[str, dict[str, Any]]]
    differences: list[Difference]
    notes: list[str]


# -- reading -------------------------------------------------------------------------------------------------------


def read(words: Sequence[str]) -> tuple[list[Arm], dict[str, Any]]:
    """Arms from the command line: DIR, NAME=DIR, or NAME=DIR,DIR,... with a folder a training seed.

    Raises:
        ConfigError: fewer than two, unfinished, or of other problems or settings; names the first that differs.
    """
    if len(words) < 2:
        raise ConfigError(f"compare has {len(words)} result folders; name two or more")
    named: list[tuple[str, list[Path]]] = []
    for word in words:
        name, equals, rest = word.partition("=")
        if not equals or Path(word).is_dir():
            name, rest = Path(word.partition(",")[0]).name, word
        named.append(
            (name, [Path(rest)] if rest and Path(rest).is_dir() else [Path(part) for part in rest.split(",") if part])
        )
    for name, folders in named:
        if not folders:
            raise ConfigError(f"arm {name!r} names no folder; write {name}=DIR")
    names = [name for name, _ in named]
    if len(set(names)) < len(names):
        raise ConfigError(f"two arms are called {next(n for n in names if names.count(n) > 1)!r}; write NAME=DIR")
    first = running.finished(named[0][1][0])
    for _, folders in named:
        if len(folders) != len(named[0][1]):
            raise ConfigError("the arms have different numbers of training seeds; name as many folders for each")
        for folder in folders:
            there = running.finished(folder)
            told = "prompt_style" in first and "prompt_style" in there  # older folders do not say
            ignored = records.UNCOMPARED if told else (*records.UNCOMPARED, "prompt_style")
            for setting, was, now in files.differences(first, there, ignored=ignored):
                raise ConfigError(
                    f"{setting} is {now!r} in {str(folder)!r} and {was!r} in {str(named[0][1][0])!r}; compare "
                    "runs of one setting: run qtarget eval again, or --rescore where the verifier version differs"
                )
    return [Arm(name, tuple(folders), tuple(map(_groups, folders))) for name, folders in named], first


def _groups(folder: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    manifest = running.finished(folder)
    made = {}
    for task in manifest["tasks"]:
        held = records.samples(folder, task)
        version = manifest["tasks"][task]["verifier_version"]
        if other := next((r for r in held if r["verifier_version"] != version), None):
            raise StorageError(
                f"{str(folder)!r} has verdicts of verifier version {other['verifier_version']!r} beside {version!r} in "
                f"task {task}: a re-scoring was broken off; run qtarget eval --rescore {folder} again"
            )
        groups = scores.grouped(held)
        wanted = [problem.id for problem in records.problems(folder, task)]
        whole = {id: len(groups.get(id, ())) for id in wanted}
        asked = ["greedy", *range(manifest["n"])]
        lacking = next((id for id in wanted if [r["sample"] for r in groups.get(id, ())] != asked), None)
        if lacking is not None or len(groups) != len(wanted):
            raise StorageError(
                f"{str(folder)!r} has {whole.get(lacking or '', 0)} of {manifest['n'] + 1} answers to problem {lacking} "
                f"of task {task}; its samples were changed: run qtarget eval into another folder"
            )
        made[task] = {id: groups[id] for id in wanted}
    return made


# -- differences ---------------------------------------------------------------------------------------------------


def compare(words: Sequence[str], draws: int = 10_000, seed: int = 0) -> Comparison:
    """All differences to the first arm. ``words``: see ``read``. ``draws``: of each bootstrap."""
    arms, manifest = read(words)
    n, tasks = manifest["n"], [*manifest["tasks"]]
    made = {arm.name: {task: _scores(arm, task, n) for task in tasks} for arm in arms}
    differences = []
    for arm in arms[1:]:
        for measure in ("strict", "lenient", "greedy", f"pass@{n}", "tokens"):
            if n or measure in ("greedy", "tokens"):
                differences += _measure(arms[0], arm, measure, tasks, _means(manifest), n, draws, seed)
    notes = [
        f"Task {task} has {count} problems: too few for an interval to be trusted."
        for task in tasks
        if (count := manifest["tasks"][task]["problems"]) < _FEW
    ]
    seeds = len(arms[0].folders)
    if seeds == 1:
        notes.append(
            "One training run an arm: the intervals are for these models, and say nothing of training again with another "
            "seed."
        )
    elif seeds < 5:
        notes.append(f"{seeds} training seeds an arm are few: intervals drawn from so few are too narrow.")
    if len(arms) > 2:
        notes.append(f"{len(arms) - 1} arms are compared with one, each at 95 %: one of them may stand out by chance.")
    settings = {name: manifest[name] for name in manifest if name not in (*records.UNCOMPARED, "tasks")}
    return Comparison(arms, tasks, n, settings, made, differences, notes)


def _means(manifest: dict[str, Any]) -> dict[str, list[str]]:
    """{what a mean is called: its tasks}: each suite's, and of all tasks where none belongs to a suite.

    So hle beside med10 never enters med10's mean, as it does in a published one.
    """
    suites: dict[str, list[str]] = {}
    for task, about in manifest["tasks"].items():
        if about["suite"] is not None:
            suites.setdefault(about["suite"], []).append(task)
    if suites:
        return {f"mean of {suite}": members for suite, members in suites.items()}
    return {MEAN: [*manifest["tasks"]]} if len(manifest["tasks"]) > 1 else {}


def _measure(
    first: Arm,
    other: Arm,
    measure: str,
    tasks: list[str],
    means_of: dict[str, list[str]],
    n: int,
    draws: int,
    seed: int,
) -> list[Difference]:
    """One measure of every task, and of the means."""
    made, drawn, both = [], [], []
    for number, task in enumerate(tasks):
        if measure in ("strict", "lenient"):
            a, b = (_verdicts(arm, task, measure) for arm in (first, other))  # [s, p, n]
            means = scores.two_level(b - a, draws, seed + number)
        else:
            a, b = (_values(arm, task, measure, n) for arm in (first, other))  # [s, p]
            means = scores.one_level(b - a, draws, seed + number)
        drawn.append(means)
        both.append((float(a.mean()), float(b.mean())))
        made.append(_difference(task, other.name, measure, both[-1], means, a.shape[1]))
    for name, members in means_of.items():
        own = [tasks.index(task) for task in members]
        pair = (scores.macro([both[i][0] for i in own]), scores.macro([both[i][1] for i in own]))
        problems = sum(made[i].problems for i in own)
        made.append(_difference(name, other.name, measure, pair, np.mean([drawn[i] for i in own], axis=0), problems))
    return made


def _difference(
    task: str, arm: str, measure: str, pair: tuple[float, float], means: np.ndarray, problems: int
) -> Difference:
    low, high = scores.interval(means)
    value, error = pair[1] - pair[0], float(means.std())
    needed = None
    if low <= 0 <= high and abs(value) > 1e-12:
        needed = max(problems + 1, math.ceil(problems * _NEEDED * (error / value) ** 2))
    return Difference(task, arm, measure, *pair, low, high, problems, needed)


def _verdicts(arm: Arm, task: str, reading: str) -> np.ndarray:
    return np.array([running.verdicts(groups[task], reading) for groups in arm.groups], dtype=float)


def _values(arm: Arm, task: str, measure: str, n: int) -> np.ndarray:
    """[s, p] of a measure that is one number a problem."""
    if measure.startswith("pass@"):
        return _pass(arm, task, n, n)
    return np.array([[_value(group, measure) for group in groups[task].values()] for groups in arm.groups], float)


def _value(group: list[dict[str, Any]], measure: str) -> float:
    if measure == "greedy":
        return float(group[0]["strict"])  # ``grouped`` puts it first
    counted = group[1:] or group
    return sum(record["tokens"] for record in counted) / len(counted)


def _pass(arm: Arm, task: str, n: int, k: int) -> np.ndarray:
    """[s, p] strict pass@k."""
    return np.array([scores.pass_at(n, right_pn.sum(1), k) for right_pn in _verdicts(arm, task, "strict")])


def _scores(arm: Arm, task: str, n: int) -> dict[str, Any]:
    summaries = [scores.summary([r for group in groups[task].values() for r in group], n) for groups in arm.groups]

    def mean(get: Any) -> float | None:
        values = [get(summary) for summary in summaries]
        return None if None in values else float(np.mean(values))

    made = {
        "strict": mean(lambda s: s["strict"].get("avg")),
        "lenient": mean(lambda s: s["lenient"].get("avg")),
        "majority": mean(lambda s: s["strict"].get("majority")),
        "greedy": mean(lambda s: s["strict"]["greedy"]),
        "no_answer": mean(lambda s: s["strict"]["no_answer"]),
        "tokens": mean(lambda s: s["mean_tokens"]),
        "truncated": mean(lambda s: s["truncated"]),
        "entropy": mean(lambda s: s["entropy"]),
        "timeouts": sum(s["timeouts"] for s in summaries),
        "errors": sum(s["errors"] for s in summaries),
        "pass": [],
        "pass_low": [],
        "pass_high": [],
    }
    for k in range(1, n + 1):
        values = _pass(arm, task, n, k)
        low, high = scores.interval(scores.one_level(values, 2000))
        made["pass"].append(float(values.mean()))
        made["pass_low"].append(low)
        made["pass_high"].append(high)
    return made
