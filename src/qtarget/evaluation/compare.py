"""Compares result folders on the same problems and seeds, with bootstrap intervals.

An arm is one folder, or several that differ in their training seed alone. Every arm is compared with the first. Three
levels are drawn: training seeds (where an arm has several; arms are paired by their order), problems, samples.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from qtarget import files
from qtarget.errors import ConfigError, StorageError
from qtarget.evaluation import harness_logs, records, running, scores

# To be told apart in four of five repetitions at 95 %: (1.96 + 0.84)² standard errors squared.
_NEEDED = (1.959964 + 0.841621) ** 2
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
    "pass_high"}}}, means over training seeds. notes: what a reader must know. metrics: of other programs' logs, each
    task's score; ``scores`` then holds "value" alone.
    """

    arms: list[Arm]
    tasks: list[str]
    n: int
    settings: dict[str, Any]
    scores: dict[str, dict[str, dict[str, Any]]]
    differences: list[Difference]
    notes: list[str]
    metrics: dict[str, str] = field(default_factory=dict)


# -- reading -------------------------------------------------------------------------------------------------------


def _named(words: Sequence[str]) -> dict[str, list[Path]]:
    """The folders of each arm from the command line: DIR, NAME=DIR, or NAME=DIR,DIR,... with one a training seed."""
    if len(words) < 2:
        raise ConfigError(f"compare has {len(words)} result folders; name two or more")
    named: dict[str, list[Path]] = {}
    for word in words:
        name, equals, rest = word.partition("=")
        if not equals or Path(word).is_dir():
            name, rest = Path(word.partition(",")[0]).name, word
        if name in named:
            raise ConfigError(f"two arms are called {name!r}; write NAME=DIR")
        is_one = rest != "" and Path(rest).is_dir()
        named[name] = [Path(part) for part in ([rest] if is_one else rest.split(",")) if part]
        if not named[name]:
            raise ConfigError(f"arm {name!r} names no folder; write {name}=DIR")
    if len({len(folders) for folders in named.values()}) > 1:
        raise ConfigError("the arms have different numbers of training seeds; name as many folders for each")
    return named


def read(named: dict[str, list[Path]]) -> tuple[list[Arm], dict[str, Any]]:
    """Arms of qtarget eval's folders.

    Raises:
        ConfigError: unfinished, or of other problems or settings; names the first that differs.
    """
    first_folders = next(iter(named.values()))
    first = running.finished(first_folders[0])
    for folders in named.values():
        for folder in folders:
            manifest = running.finished(folder)
            told = "prompt_style" in first and "prompt_style" in manifest  # older folders do not say
            ignored = [*records.UNCOMPARED, *([] if told else ["prompt_style"])]
            if "server" in first or "server" in manifest:  # which has its own precision, and does not tell it
                ignored.append("dtype")
            for setting, was, now in files.differences(first, manifest, ignored=ignored):
                raise ConfigError(
                    f"{setting} is {now!r} in {str(folder)!r} and {was!r} in {str(first_folders[0])!r}; compare runs "
                    "with the same settings: run qtarget eval again, or --rescore where the verifier version differs"
                )
    return [Arm(name, tuple(folders), tuple(map(_groups, folders))) for name, folders in named.items()], first


def _groups(folder: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    manifest = running.finished(folder)
    groups_of = {}
    for task, about in manifest["tasks"].items():
        held, version = records.samples(folder, task), about["verifier_version"]
        if other := next((r for r in held if r["verifier_version"] != version), None):
            raise StorageError(
                f"{str(folder)!r} has verdicts of verifier versions {other['verifier_version']!r} and {version!r} in "
                f"task {task}: a re-scoring was interrupted; run qtarget eval --rescore {folder} again"
            )
        groups = scores.grouped(held)
        wanted = [problem.id for problem in records.problems(folder, task)]
        asked = ["greedy", *range(manifest["n"])]
        lacking = next((id for id in wanted if [r["sample"] for r in groups.get(id, ())] != asked), None)
        if lacking is not None or len(groups) != len(wanted):
            count = len(groups.get(lacking or "", ()))
            raise StorageError(
                f"{str(folder)!r} has {count} of {manifest['n'] + 1} answers to problem {lacking} of task {task}; its "
                "samples were changed: run qtarget eval into another folder"
            )
        groups_of[task] = {id: groups[id] for id in wanted}
    return groups_of


# -- differences ---------------------------------------------------------------------------------------------------


def compare(words: Sequence[str], draws: int = 10_000, seed: int = 0, metric: str | None = None) -> Comparison:
    """All differences to the first arm. ``words``: see ``_named``. ``draws``: of each bootstrap. ``metric``: see
    ``harness_logs.read``, for folders of other programs alone."""
    named = _named(words)
    if any(harness_logs.is_log(folder) for folders in named.values() for folder in folders):
        return _of_logs(named, draws, seed, metric)
    if metric is not None:
        raise ConfigError(f"metric is {metric!r}, which qtarget eval's folders do not have; leave it out")
    arms, manifest = read(named)
    n, tasks = manifest["n"], [*manifest["tasks"]]
    scores_of = {arm.name: {task: _scores(arm, task, n) for task in tasks} for arm in arms}
    measures = ("strict", "lenient", "greedy", f"pass@{n}", "tokens") if n else ("greedy", "tokens")
    differences = []
    for arm, measure in itertools.product(arms[1:], measures):
        differences += _differences(arms[0], arm, measure, manifest, draws, seed)
    notes = scores.too_few({task: about["problems"] for task, about in manifest["tasks"].items()})
    notes += _seed_notes(arms)
    settings = {name: manifest[name] for name in manifest if name not in (*records.UNCOMPARED, "tasks")}
    return Comparison(arms, tasks, n, settings, scores_of, differences, notes)


def _of_logs(named: dict[str, list[Path]], draws: int, seed: int, metric: str | None) -> Comparison:
    """Of folders some of which another program wrote: one score a task."""
    groups, metrics, notes = harness_logs.read(named, metric)
    arms = [Arm(name, tuple(named[name]), own) for name, own in groups.items()]
    manifest = {"n": 0, "tasks": {task: {"suite": None} for task in metrics}}
    differences = [
        replace(one, measure=metrics.get(one.task, next(iter(metrics.values()))))
        for arm in arms[1:]
        for one in _differences(arms[0], arm, "greedy", manifest, draws, seed)
        if one.task in metrics or len({*metrics.values()}) == 1  # no mean of unlike scores
    ]
    values = {
        arm.name: {task: {"value": float(_values(arm, task, "greedy", 0).mean())} for task in metrics} for arm in arms
    }
    return Comparison(arms, [*metrics], 0, {}, values, differences, notes + _seed_notes(arms), metrics)


def _seed_notes(arms: Sequence[Arm]) -> list[str]:
    notes, seeds = [], len(arms[0].folders)
    if seeds == 1:
        notes.append(
            "One training run per arm: the intervals are for these models, and say nothing about training again with "
            "another seed."
        )
    elif seeds < 5:
        notes.append(f"{seeds} training seeds per arm are few: intervals drawn from so few are too narrow.")
    if len(arms) > 2:
        notes.append(f"{len(arms) - 1} arms are compared with one, each at 95 %: one of them may differ by chance.")
    return notes


def _means(manifest: dict[str, Any]) -> dict[str, list[str]]:
    """{what a mean is called: its tasks}: each suite's, and of all tasks where none belongs to a suite.

    So hle beside med10 never enters med10's mean, as it does in a published one.
    """
    suites: dict[str, list[str]] = {}
    for task, about in manifest["tasks"].items():
        if about["suite"] is not None:
            suites.setdefault(f"mean of {about['suite']}", []).append(task)
    if suites:
        return suites
    return {MEAN: [*manifest["tasks"]]} if len(manifest["tasks"]) > 1 else {}


def _differences(
    first: Arm, other: Arm, measure: str, manifest: dict[str, Any], draws: int, seed: int
) -> list[Difference]:
    """In one measure, of every task and of the means."""
    drawn: dict[str, np.ndarray] = {}
    of_task: dict[str, Difference] = {}
    for number, task in enumerate(manifest["tasks"]):
        a, b = (_values(arm, task, measure, manifest["n"]) for arm in (first, other))
        drawn[task] = (scores.two_level if a.ndim == 3 else scores.one_level)(b - a, draws, seed + number)
        if 0 <= min(a.min(), b.min()) <= max(a.max(), b.max()) <= 1:  # not tokens, nor a perplexity
            drawn[task] = scores.with_unseen(drawn[task], a.shape[1], differences=True)
        pair = (float(a.mean()), float(b.mean()))
        of_task[task] = _difference(task, other.name, measure, pair, drawn[task], a.shape[1])
    of_means = []
    for name, members in _means(manifest).items():
        own = [of_task[task] for task in members]
        pair = (scores.macro([one.first for one in own]), scores.macro([one.other for one in own]))
        means, problems = np.mean([drawn[task] for task in members], axis=0), sum(one.problems for one in own)
        of_means.append(_difference(name, other.name, measure, pair, means, problems))
    return [*of_task.values(), *of_means]


def _difference(
    task: str, arm: str, measure: str, pair: tuple[float, float], means: np.ndarray, problems: int
) -> Difference:
    low, high = scores.interval(means)
    value, error = pair[1] - pair[0], float(means.std())
    needed = None
    if low <= 0 <= high and abs(value) > 1e-12:
        needed = max(problems + 1, math.ceil(problems * _NEEDED * (error / value) ** 2))
    return Difference(task, arm, measure, *pair, low, high, problems, needed)


def _values(arm: Arm, task: str, measure: str, n: int) -> np.ndarray:
    """[s, p, n] verdicts of a reading, and [s, p] of a measure that is one number a problem."""
    if measure in ("strict", "lenient"):
        return np.array([running.verdicts(groups[task], measure) for groups in arm.groups], dtype=float)
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
    return np.array([scores.pass_at(n, right_pn.sum(1), k) for right_pn in _values(arm, task, "strict", n)])


def _scores(arm: Arm, task: str, n: int) -> dict[str, Any]:
    summaries = [scores.summary([r for group in groups[task].values() for r in group], n) for groups in arm.groups]

    def mean(name: str, reading: str | None = None) -> float | None:
        values: list[Any] = [(summary[reading] if reading else summary).get(name) for summary in summaries]
        return None if None in values else scores.macro(values)

    curve = [_pass(arm, task, n, k) for k in range(1, n + 1)]
    intervals = [
        scores.interval(scores.with_unseen(scores.one_level(values, 2000), values.shape[1])) for values in curve
    ]
    return {
        "strict": mean("avg", "strict"),
        "lenient": mean("avg", "lenient"),
        **{name: mean(name, "strict") for name in ("majority", "greedy", "no_answer")},
        "tokens": mean("mean_tokens"),
        **{name: mean(name) for name in ("truncated", "entropy")},
        **{name: sum(summary[name] for summary in summaries) for name in ("timeouts", "errors")},
        "pass": [float(values.mean()) for values in curve],
        "pass_low": [low for low, _ in intervals],
        "pass_high": [high for _, high in intervals],
    }
