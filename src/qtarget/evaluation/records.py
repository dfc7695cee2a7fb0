"""A folder of results: what was asked, the problems, the samples, the scores.

    eval.json               settings, tasks with the digests of their problems, and whether it is finished
    problems/TASK.jsonl     id, prompt, row: what re-scoring needs
    samples/TASK.jsonl      a sample a line, in a fixed order; while it grows, one file a process: TASK.0.part
    scores.json             see ``scores.summary``

A batch is the same whatever was done before it: a resumed run makes a half-done batch again and writes what is missing.
So the finished file has the same bytes however often the run was killed.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qtarget import __version__, json_text
from qtarget.errors import ConfigError
from qtarget.evaluation.tasks import Problem, Task

FILE = "eval.json"
# What runs that are compared, or one that goes on, may differ in.
UNCOMPARED = ("model", "ends", "batch_size", "program", "finished")
_UNRESUMED = ("program", "finished", "prompt_style")


def line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def write(file: Path, text: str) -> None:
    """All or nothing, also when the machine stops."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")
    with partial.open("w", encoding="utf-8", errors="surrogatepass") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.rename(file)


# -- manifest ------------------------------------------------------------------------------------------------------


def describe(settings: dict[str, Any], tasks: list[Task]) -> dict[str, Any]:
    """The manifest of a run."""
    return {
        **settings,
        "tasks": {
            task.name: {
                "problems": len(task.problems),
                "digest": task.digest,
                "instruction": task.instruction,
                "verifier": task.grader,
                "verifier_version": task.version,
                "suite": task.suite,
            }
            for task in tasks
        },
        "program": f"qtarget {__version__}",
    }


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """None where there is none. Raises ConfigError where it cannot be read."""
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        manifest = json_text.loads(file.read_bytes())
        _check_manifest(manifest)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); delete the folder and run qtarget eval again") from error
    return manifest


def _check_manifest(manifest: Any) -> None:
    """Raise ValueError where it is not as ``describe`` makes it: a folder may be somebody else's."""
    if not isinstance(manifest, dict) or not isinstance(manifest.get("tasks"), dict):
        raise ValueError("it names no tasks")
    if not isinstance(manifest.get("finished"), bool):
        raise ValueError(f"finished is {manifest.get('finished')!r}")
    if type(manifest.get("n")) is not int or manifest["n"] < 0:
        raise ValueError(f"n is {manifest.get('n')!r}")
    for name, about in manifest["tasks"].items():
        if not is_plain(name):
            raise ValueError(f"the task {name!r} has a name that is no file's")
        for part in ("digest", "verifier", "verifier_version"):
            if not isinstance(about, dict) or not isinstance(about.get(part), str):
                raise ValueError(f"task {name} has no {part}")
        if type(about.get("problems")) is not int or not isinstance(about.get("suite"), (str, type(None))):
            raise ValueError(f"task {name} has problems {about.get('problems')!r}, suite {about.get('suite')!r}")


def is_plain(name: str) -> bool:
    """Whether a name is that of a file in a folder, and leads nowhere else."""
    return name not in ("", ".", "..") and not set("/\\\0") & set(name)


def difference(there: dict[str, Any], wanted: dict[str, Any], ignored: Iterable[str], prefix: str = ""):
    """(setting, its value there, the value wanted) of the first that differs, or None; in the order of ``there``."""
    for name in [*there, *(name for name in wanted if name not in there)]:
        was, now = there.get(name), wanted.get(name)
        if not prefix and name in ignored:
            continue
        if isinstance(was, dict) and isinstance(now, dict):
            if was.get("weights") and was["weights"] == now.get("weights"):  # one model by two names
                continue
            if (found := difference(was, now, (), f"{prefix}{name}.")) is not None:
                return found
        elif was != now:
            return prefix + name, was, now
    return None


def begin(folder: Path, manifest: dict[str, Any], tasks: list[Task], writes: bool) -> bool:
    """Take a folder, or go on in one. Returns whether it is finished already.

    Args:
        writes: whether this is the process that writes the manifest.

    Raises:
        ConfigError: it holds something else; names the first setting that differs.
    """
    while (there := read_manifest(folder)) is None and not writes:
        time.sleep(0.1)  # the first process checks the folder; where it refuses, the launcher ends all
    if there is not None:
        found = difference(there, json.loads(json.dumps(manifest)), _UNRESUMED)
        if found is not None:
            name, was, now = found
            raise ConfigError(
                f"output is {str(folder)!r}, which holds a run with {name} {was!r}, and this one has {now!r}; go on with "
                "the settings it was started with, or name another folder"
            )
        return bool(there["finished"])
    own = {f"{FILE}.partial", "problems", "samples"}  # killed as it began
    if folder.exists() and (not folder.is_dir() or any(file.name not in own for file in folder.iterdir())):
        raise ConfigError(f"output is {str(folder)!r}, which is not an empty folder; name another one")
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    if any((folder / "samples").iterdir()):
        raise ConfigError(f"output is {str(folder)!r}, which holds samples without {FILE}; name another folder")
    for task in tasks:
        text = "".join(line({"id": p.id, "prompt": p.prompt, "row": p.row}) for p in task.problems)
        write(folder / "problems" / f"{task.name}.jsonl", text)
    write_manifest(folder, {**manifest, "finished": False})
    return False


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    write(folder / FILE, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def finish(folder: Path, scores: dict[str, Any]) -> None:
    """Write the scores, and that the folder is finished."""
    manifest = read_manifest(folder)
    assert manifest is not None
    write(folder / "scores.json", json.dumps(scores, indent=2, ensure_ascii=False) + "\n")
    write_manifest(folder, {**manifest, "finished": True})


def problems(folder: Path, task: str) -> list[Problem]:
    """Those of a finished or begun folder."""
    file = folder / "problems" / f"{task}.jsonl"
    kinds: dict[str, tuple[type, ...]] = {"id": (str,), "prompt": (str, list), "row": (dict,)}
    made = []
    for number, record in enumerate(_lines(file), start=1):
        if fault := _kind_fault(record, kinds):
            raise _damaged(file, number, fault)
        made.append(Problem(record["id"], record["prompt"], record["row"]))
    return made


# -- samples -------------------------------------------------------------------------------------------------------


def samples(folder: Path, task: str) -> list[dict[str, Any]]:
    """The finished samples of a task."""
    file = folder / "samples" / f"{task}.jsonl"
    return _checked_samples(file, _lines(file))


_SAMPLE: dict[str, tuple[type, ...]] = {
    "problem": (str,),
    "sample": (int, str),
    "text": (str,),
    "finish": (str,),
    "tokens": (int,),
    "entropy": (int, float, type(None)),
    "strict": (bool,),
    "lenient": (bool,),
    "parsed": (str, type(None)),
    "lenient_parsed": (str, type(None)),
    "fault": (str, type(None)),
    "verifier_version": (str,),
}


def _checked_samples(file: Path, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for number, record in enumerate(records, start=1):
        fault = _kind_fault(record, _SAMPLE)
        if fault is None and record["entropy"] is not None and not math.isfinite(record["entropy"]):
            fault = f"entropy is {record['entropy']!r}"
        if fault is None and isinstance(record["sample"], str) and record["sample"] != "greedy":
            fault = f"sample is {record['sample']!r}"
        if fault is not None:
            raise _damaged(file, number, fault)
    return records


def _kind_fault(record: dict[str, Any], kinds: dict[str, tuple[type, ...]]) -> str | None:
    for name, kind in kinds.items():
        if name not in record:
            return f"it has no {name}"
        value = record[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and bool not in kind):
            return f"{name} is {value!r}"
    return None


def _damaged(file: Path, number: int, what: str) -> ConfigError:
    return ConfigError(f"{file} is damaged in line {number}; delete that line and run qtarget eval again ({what})")


def _lines(file: Path, half_allowed: bool = False) -> list[dict[str, Any]]:
    """Records of a file of JSON lines; ``half_allowed``: a last line without its end is left out."""
    try:
        held = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror}); run qtarget eval again") from error
    whole, newline, half = held.rpartition(b"\n")
    records = []
    lines = whole.split(b"\n") if newline else []
    if half and not half_allowed:
        lines.append(half)
    for number, text in enumerate(lines, start=1):
        try:
            record = json_text.loads(text)
            if not isinstance(record, dict):
                raise ValueError("it is no object")
        except ValueError as error:
            raise _damaged(file, number, str(error)) from None
        records.append(record)
    return records


def key(record: dict[str, Any]) -> tuple[str, int | str]:
    return record["problem"], record["sample"]


class Samples:
    """The samples of one task as they come, each on disk before the next batch is begun.

    Attributes:
        done: (problem, sample) → record, of all processes that have written so far.
    """

    def __init__(self, folder: Path, task: str, rank: int = 0):
        self._folder, self._task = folder / "samples", task
        self._file = self._folder / f"{task}.{rank}.part"
        self.final = self._folder / f"{task}.jsonl"
        self.done: dict[tuple[str, int | str], dict[str, Any]] = {}
        if self._file.is_file():
            held = self._file.read_bytes()
            half = len(held.rpartition(b"\n")[2])
            if half:  # its writer was killed; only its own process may cut it off
                with self._file.open("r+b") as stream:
                    stream.truncate(len(held) - half)
                    os.fsync(stream.fileno())
        self.look()

    def look(self) -> None:
        """Read what is there, also of other processes, whose last line may still be half."""
        parts = sorted(self._folder.glob(f"{self._glob()}.*.part"))
        for file in [self.final, *parts] if self.final.is_file() else parts:
            for record in _checked_samples(file, _lines(file, half_allowed=True)):
                self.done.setdefault(key(record), record)

    def _glob(self) -> str:
        return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in self._task)

    def add(self, records: Iterable[dict[str, Any]]) -> None:
        new = [record for record in records if key(record) not in self.done]
        with self._file.open("ab") as stream:
            for record in new:
                self.done[key(record)] = record
                stream.write(line(record).encode("utf-8", "surrogatepass"))
            stream.flush()
            os.fsync(stream.fileno())

    def merge(self, order: list[tuple[str, int | str]]) -> None:
        """One file in the order of the plan; the parts go."""
        write(self.final, "".join(line(self.done[one]) for one in order))
        for part in self._folder.glob(f"{self._glob()}.*.part"):
            part.unlink()
