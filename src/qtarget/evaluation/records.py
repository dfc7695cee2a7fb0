"""A folder of results: settings, problems, samples and scores.

    eval.json               settings, tasks with the digests of their problems, and whether it is finished
    problems/TASK.jsonl     id, prompt, row: what re-scoring needs
    samples/TASK.jsonl      a sample a line, in a fixed order; while it grows, one file a process: TASK.0.part
    scores.json             see ``scores.summary``

A batch is the same whatever was done before it: a resumed run makes a half-done batch again and writes what is missing.
So the finished file has the same bytes however often the run was killed.
"""

from __future__ import annotations

import glob
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, BeforeValidator, Field, with_config
from typing_extensions import TypedDict

from qtarget import __version__, files
from qtarget.errors import ConfigError, StorageError
from qtarget.evaluation.tasks import Problem, Task
from qtarget.teachers.fingerprints import Model

FILE = "eval.json"
# What runs that are compared, or one that goes on, may differ in.
UNCOMPARED = ("model", "server", "ends", "batch_size", "backend", "program", "finished")
_UNRESUMED = ("batch_size", "backend", "program", "finished", "prompt_style")
_AGAIN = "run qtarget eval again"
Count = Annotated[int, Field(ge=0)]


# -- manifest ------------------------------------------------------------------------------------------------------


def _task_name(name: str) -> str:
    if not files.is_plain(name):
        raise ValueError(f"the task {name!r} has a name that cannot be a file name")
    return name


def _with_tasks(value: Any) -> Any:
    if not isinstance(value, dict) or not isinstance(value.get("tasks"), dict):
        raise ValueError("it names no tasks")
    return value


@with_config(**files.CLOSED)
class Asked(TypedDict):
    """A task: how many problems, what tells them from others, and how answers are judged."""

    problems: Count
    digest: str
    instruction: str | None
    verifier: str
    verifier_version: str
    suite: str | None


@with_config(**files.CLOSED)
class Server(TypedDict):
    """What answered in the place of a loaded model. Its address may change: the next start has another port."""

    model: str
    root: str | None
    version: str | None


@with_config(**files.CLOSED)
class Manifest(TypedDict):
    """``eval.json``, in the order in which a difference is named."""

    model: Model
    n: Count
    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int
    prompt: str
    server: NotRequired[Server]  # none: sampled in the process
    backend: NotRequired[Literal["transformers"]]  # written while there was to be another
    dtype: NotRequired[str | None]
    batch_size: int
    prompt_style: NotRequired[str]
    tasks: dict[Annotated[str, AfterValidator(_task_name)], Asked]
    program: str
    finished: bool


class Asking(TypedDict):
    """A line of ``problems/TASK.jsonl``."""

    id: str
    prompt: str | list
    row: dict[str, Any]


class Sample(TypedDict):
    """A line of ``samples/TASK.jsonl``: an answer and what was made of it."""

    problem: str
    sample: int | Literal["greedy"]
    text: str
    finish: str
    tokens: int
    entropy: Annotated[float, Field(allow_inf_nan=False)] | None
    strict: bool
    lenient: bool
    parsed: str | None
    lenient_parsed: str | None
    fault: str | None
    verifier_version: str


def manifest_of(settings: dict[str, Any], tasks: list[Task]) -> dict[str, Any]:
    """The manifest of a run."""
    asked = {
        task.name: Asked(
            problems=len(task.problems),
            digest=task.digest,
            instruction=task.instruction,
            verifier=task.grader,
            verifier_version=task.version,
            suite=task.suite,
        )
        for task in tasks
    }
    return {**settings, "tasks": asked, "program": f"qtarget {__version__}"}


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """None where there is none. Raises StorageError where it cannot be read."""
    file = folder / FILE
    form = Annotated[Manifest, BeforeValidator(_with_tasks)]
    return files.load(file, form, f"delete the folder and {_AGAIN}") if file.is_file() else None


def begin(folder: Path, manifest: dict[str, Any], tasks: list[Task], writes: bool) -> bool:
    """Take a folder, or go on in one. Returns whether it is finished already. A larger ``n`` goes on with more samples.

    Args:
        writes: whether this is the process that writes the manifest.

    Raises:
        StorageError: it holds something else. ConfigError: another run; names the first setting that differs.
    """
    while (existing := read_manifest(folder)) is None and not writes:
        time.sleep(0.1)  # the first process checks the folder; where it refuses, the launcher ends all
    if existing is not None:
        wanted = json.loads(json.dumps(manifest))
        more = wanted["n"] > existing["n"]
        for name, now, was in files.differences(wanted, existing, ignored=(*_UNRESUMED, "n") if more else _UNRESUMED):
            raise ConfigError(
                f"output is {str(folder)!r}, which holds a run with {name} {was!r}, and this one has {now!r}; resume "
                "with the settings it was started with, or name another folder"
            )
        if more and writes:
            write_manifest(folder, {**existing, "n": wanted["n"], "finished": False})
        return bool(existing["finished"]) and not more
    expected = {files.partial_of(Path(FILE)).name, "problems", "samples"}  # killed as it began
    if folder.exists() and (not folder.is_dir() or any(file.name not in expected for file in folder.iterdir())):
        raise StorageError(f"output is {str(folder)!r}, which is not an empty folder; name another folder")
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    if any((folder / "samples").iterdir()):
        raise StorageError(f"output is {str(folder)!r}, which holds samples without {FILE}; name another folder")
    for task in tasks:
        text = "".join(files.line({"id": p.id, "prompt": p.prompt, "row": p.row}) for p in task.problems)
        files.write(folder / "problems" / f"{task.name}.jsonl", text)
    write_manifest(folder, {**manifest, "finished": False})
    return False


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    files.write_json(folder / FILE, manifest)


def finish(folder: Path, scores: dict[str, Any]) -> None:
    """Write the scores, and that the folder is finished."""
    manifest = read_manifest(folder)
    assert manifest is not None
    files.write_json(folder / "scores.json", scores)
    write_manifest(folder, {**manifest, "finished": True})


def problems(folder: Path, task: str) -> list[Problem]:
    """Those of a finished or begun folder."""
    asked = files.read_lines(folder / "problems" / f"{task}.jsonl", Asking, _AGAIN)
    return [Problem(record["id"], record["prompt"], record["row"]) for record in asked]


# -- samples -------------------------------------------------------------------------------------------------------


def samples(folder: Path, task: str) -> list[dict[str, Any]]:
    """The finished samples of a task."""
    return files.read_lines(folder / "samples" / f"{task}.jsonl", Sample, _AGAIN)


def key(record: dict[str, Any]) -> tuple[str, int | str]:
    return record["problem"], record["sample"]


class Samples:
    """The samples of one task as they come, each on disk before the next batch is begun.

    Attributes:
        done: (problem, sample) → record, of all processes that have written so far.
        settled: those of a run that was finished with fewer samples.
    """

    def __init__(self, folder: Path, task: str, rank: int = 0):
        self._folder, self._task = folder / "samples", task
        self._journal = files.Journal(self._folder / f"{task}.{rank}.part")
        self.final = self._folder / f"{task}.jsonl"
        self.done: dict[tuple[str, int | str], dict[str, Any]] = {}
        self.look()
        self.settled = {key(record) for record in samples(folder, task)} if self.final.is_file() else set()

    def look(self) -> None:
        """Read what is there, also of other processes, whose last line may still be half."""
        for file in [self.final, *self._parts()] if self.final.is_file() else self._parts():
            for record in files.read_lines(file, Sample, _AGAIN, half_allowed=True):
                self.done.setdefault(key(record), record)

    def _parts(self) -> list[Path]:
        return sorted(self._folder.glob(f"{glob.escape(self._task)}.*.part"))

    def add(self, records: Iterable[dict[str, Any]]) -> None:
        new = [record for record in records if key(record) not in self.done]
        self.done.update((key(record), record) for record in new)
        self._journal.add(new)

    def merge(self, order: list[tuple[str, int | str]]) -> None:
        """One file in the order of the plan; the parts go."""
        files.write(self.final, "".join(files.line(self.done[one]) for one in order))
        for part in self._parts():
            part.unlink()
