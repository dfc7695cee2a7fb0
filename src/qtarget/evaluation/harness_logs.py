"""Reads per-sample logs of lm-evaluation-harness and lighteval, for paired comparisons.

lm-evaluation-harness   samples_TASK_TIME.jsonl, of lm_eval --output_path DIR --log_samples
lighteval               details_TASK_TIME.parquet, of lighteval ... --output-dir DIR --save-details

A folder of either, or of qtarget eval, is read into scores a problem. Problems of two folders are the same where their
rows are (of one program), or else their ids, or else their prompts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from qtarget import files
from qtarget.errors import ConfigError, StorageError
from qtarget.evaluation import records, running, scores

_LOG = re.compile(r"(samples|details)_(.+?)_(\d{4}-\d\d-\d\dT[\d.:-]+)\.(?:jsonl|parquet)")
_AGAIN = "run the evaluation again"
_GREEDY = "greedy"

# What tells a problem from others, the surest first.
_NAMES = ("row", "id", "prompt")


class _Line(TypedDict):
    """A line of lm-evaluation-harness; scores stand beside these fields, under their own names."""

    doc_id: int
    doc: Any
    arguments: Any
    filter: NotRequired[str]
    doc_hash: NotRequired[str]


class _Detail(TypedDict):
    """A row of lighteval."""

    doc: dict[str, Any]
    metric: dict[str, Any]


@dataclass
class _Problem:
    """names: see ``_NAMES``; without those that are not known. scores: {score: value}."""

    names: dict[str, str]
    scores: dict[str, float] = field(default_factory=dict)


_Folder = dict[str, list[_Problem]]  # task → problems


def is_log(folder: Path) -> bool:
    """Whether a folder holds another program's logs and no results of qtarget eval."""
    return not (folder / records.FILE).is_file() and any(_logs(folder))


def read(
    named: Mapping[str, Sequence[Path]], metric: str | None = None
) -> tuple[dict[str, tuple[dict[str, Any], ...]], dict[str, str], list[str]]:
    """({arm: {task: {problem: records}} of each folder}, {task: its score}, notes).

    Args:
        named: the folders of each arm. metric: names of scores by commas; each task takes the first that it has.

    Raises:
        ConfigError: other tasks or problems, or several scores and none named, or one that a task lacks.
        StorageError: a log cannot be read.
    """
    folders = {folder: _read(folder) for paths in named.values() for folder in paths}
    first_path, first = next(iter(folders.items()))
    for path, folder in folders.items():
        if folder.keys() != first.keys():
            raise ConfigError(
                f"{str(path)!r} has the tasks {', '.join(sorted(folder))}, and {str(first_path)!r} has "
                f"{', '.join(sorted(first))}; evaluate the same tasks"
            )
    notes, chosen = ["The settings of the runs are not compared: the logs do not hold them."], dict[str, str]()
    groups: dict[Path, dict[str, Any]] = {path: {} for path in folders}
    for task in sorted(first):
        here = {path: folder[task] for path, folder in folders.items()}
        score, by = _score(task, here, metric), _common_name(task, here)
        chosen[task] = " / ".join(dict.fromkeys(score.values()))
        if len({tuple(sorted(p.names.get("prompt", "") for p in folder[task])) for folder in folders.values()}) > 1:
            notes.append(f"Task {task} had different prompts in these folders.")
        for path, folder in folders.items():
            values = {problem.names[by]: problem.scores[score[path]] for problem in folder[task]}
            groups[path][task] = {name: [{"sample": _GREEDY, "strict": values[name]}] for name in sorted(values)}
    notes += scores.too_few({task: len(problems) for task, problems in first.items()})
    return {name: tuple(groups[path] for path in paths) for name, paths in named.items()}, chosen, notes


def _score(task: str, folders: Mapping[Path, list[_Problem]], asked: str | None) -> dict[Path, str]:
    """The score that is read in each folder: one that all its problems have."""
    wanted = [name.strip() for name in (asked or "").split(",") if name.strip()]
    chosen = {}
    for path, problems in folders.items():
        has = [one for one in problems[0].scores if all(one in problem.scores for problem in problems)]
        found = [name for name in wanted if name in has]
        if has == [_GREEDY] or (len(has) == 1 and not wanted):
            found = has
        if not found:
            which = f"metric is {asked!r}" if asked else "metric is not set"
            raise ConfigError(
                f"{which}, and task {task} has {', '.join(has) or 'no number for every problem'} in {str(path)!r}; "
                "name one of them with --metric, for several tasks separated by commas"
            )
        chosen[path] = found[0]
    if not wanted and len({*chosen.values()} - {_GREEDY}) > 1:
        raise ConfigError(
            f"metric is not set, and task {task} has {' and '.join(sorted({*chosen.values()}))}; name both with "
            "--metric, separated by a comma"
        )
    return chosen


def _common_name(task: str, runs: Mapping[Path, list[_Problem]]) -> str:
    """By which name the problems of all folders are the same, each once."""
    (first, problems), *others = runs.items()
    for by in _NAMES:
        names = [problem.names.get(by) for problem in problems]
        if None in names or len({*names}) < len(names):
            continue
        if all(sorted(p.names.get(by, "") for p in other) == sorted(map(str, names)) for _, other in others):
            return by
    path, other = next(((p, o) for p, o in others if len(o) != len(problems)), others[0])
    raise ConfigError(
        f"task {task} has {len(other)} problems in {str(path)!r} and {len(problems)} in {str(first)!r}, which are not "
        "the same by row, id or prompt; compare runs of the same problems"
    )


# -- folders -------------------------------------------------------------------------------------------------------


def _logs(folder: Path) -> Iterator[tuple[re.Match[str], Path]]:
    for file in sorted(folder.rglob("*_*")):
        if found := _LOG.fullmatch(file.name):
            yield found, file


def _read(folder: Path) -> _Folder:
    if (folder / records.FILE).is_file():
        return _own(folder)
    latest: dict[str, Path] = {}
    for found, file in sorted(_logs(folder), key=lambda one: one[0][3]):
        latest[found[2].split("|")[0] if found[1] == "details" else found[2]] = file
    models = {file.parent.parent if file.suffix == ".parquet" else file.parent for file in latest.values()}
    if len(models) > 1:
        names = ", ".join(sorted(str(model.relative_to(folder)) for model in models))
        raise ConfigError(f"{str(folder)!r} holds the results of several models, {names}; name the folder of one")
    if not latest:
        raise StorageError(
            f"{str(folder)!r} holds no results; name a folder of qtarget eval, of lm_eval --log_samples or of lighteval "
            "--save-details"
        )
    return {task: _lighteval(file) if file.suffix == ".parquet" else _lm_eval(file) for task, file in latest.items()}


def _lm_eval(file: Path) -> list[_Problem]:
    problems: dict[int, _Problem] = {}
    for line in files.read_lines(file, _Line, _AGAIN):
        own = line["doc"].get("id") if isinstance(line["doc"], dict) else None
        names = {"row": f"lm_eval {line.get('doc_hash') or line['doc_id']}", "prompt": _first_text(line["arguments"])}
        problem = problems.setdefault(line["doc_id"], _Problem(names if own is None else {**names, "id": str(own)}))
        behind = "" if line.get("filter", "none") == "none" else f":{line['filter']}"
        problem.scores |= {f"{name}{behind}": value for name, value in _numbers(line) if name != "doc_id"}
    return _not_empty(file, [*problems.values()])


def _lighteval(file: Path) -> list[_Problem]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(file, columns=["doc", "metric"]).to_pylist()
        rows = [files.checked(row, _Detail) for row in rows]
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise StorageError(f"{file} cannot be read ({error}); {_AGAIN}") from error
    return _not_empty(
        file,
        [
            _Problem(
                {"row": f"lighteval {row['doc'].get('id')}", "prompt": _first_text(row["doc"].get("query"))},
                dict(_numbers(row["metric"])),
            )
            for row in rows
        ],
    )


def _own(folder: Path) -> _Folder:
    """The greedy answers of qtarget eval."""
    found: _Folder = {}
    for task in running.finished(folder)["tasks"]:
        prompts = {problem.id: _first_text(problem.prompt) for problem in records.problems(folder, task)}
        found[task] = [
            _Problem(
                {"row": f"qtarget {one['problem']}", "id": one["problem"], "prompt": prompts.get(one["problem"], "")},
                {_GREEDY: float(one["strict"])},
            )
            for one in records.samples(folder, task)
            if one["sample"] == _GREEDY
        ]
    return found


def _not_empty(file: Path, problems: list[_Problem]) -> list[_Problem]:
    if not problems:
        raise StorageError(f"{file} holds no answer; {_AGAIN}")
    return problems


def _numbers(fields: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in fields.items():
        if isinstance(value, int | float) and math.isfinite(value):
            yield name, float(value)


def _first_text(value: Any) -> str:
    """The first text in a value: what was asked, in whatever it is wrapped."""
    if isinstance(value, Mapping):
        value = value.get("content", [*value.values()])
    if isinstance(value, list | tuple):
        return next((text for text in map(_first_text, value) if text), "")
    return value if isinstance(value, str) else ""
