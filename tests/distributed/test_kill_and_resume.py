"""A run that is killed at any moment and started again by the same command ends as one that was never killed.

``qtarget train`` in real processes, SIGKILL from outside at seeded random moments: between steps, in the middle of a
checkpoint, in an evaluation, while the model at the end is written. The same batches; on a CPU the same bits.
"""

import json
import os
import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

import killable_runs
from qtarget.training import history as lens_history
from qtarget.training.saving import checkpoints

KINDS = ["checkpoint"] * 7 + ["step"] * 5 + ["evaluation"] * 4 + ["end"] * 2 + ["any"] * 2
SEED = 8


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return killable_runs.write_world(tmp_path_factory.mktemp("killed"))


@pytest.fixture(scope="module")
def uninterrupted(world):
    """The folder of a run that nobody killed, and its trace."""
    kept = {}

    def made(name):
        if name not in kept:
            folder = world / f"whole-{len(kept)}"
            kept[name] = folder, finished(world, name, folder, world / f"whole-{len(kept)}.trace")
        return kept[name]

    return made


def finished(world: Path, name: str, folder: Path, trace: Path) -> list[str]:
    """Run to the end; the lines of its trace."""
    process = killable_runs.start_training(killable_runs.words_of(world, name, folder), folder, trace)
    process.join()
    assert process.exitcode == 0, (trace.parent / f"{trace.name}.log").read_text()[-3000:]
    return trace.read_text().splitlines()


def batches(trace: list[str]) -> list[str]:
    return [line for line in trace if line.startswith("batch")]


def tensors(value, name="") -> dict[str, torch.Tensor]:
    """Every tensor and number of an optimizer's state, by its place."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    if isinstance(value, dict):
        return {k: v for key, one in value.items() for k, v in tensors(one, f"{name}.{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for key, one in enumerate(value) for k, v in tensors(one, f"{name}.{key}").items()}
    return {name: torch.tensor(float(value))} if isinstance(value, int | float) else {}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys() and len(a) > 0
    assert all(torch.equal(a[name], b[name]) for name in a), [n for n in a if not torch.equal(a[n], b[n])]


def ends_as(folder: Path, whole: Path) -> None:
    """Weights, optimizer, figures and maps to the last bit."""
    for pattern in ("*.safetensors", "checkpoint-*/*.safetensors"):
        names = sorted(str(file.relative_to(whole)) for file in whole.glob(pattern))
        assert names and names == sorted(str(file.relative_to(folder)) for file in folder.glob(pattern))
        for name in names:
            same(load_file(folder / name), load_file(whole / name))
    for file in whole.glob("checkpoint-*/*.pt"):
        ours, theirs = (torch.load(f, weights_only=True) for f in (folder / file.relative_to(whole), file))
        same(tensors(ours), tensors(theirs))
    assert figures(folder) == figures(whole)
    if (whole / lens_history.FILE).exists():
        assert pq.read_table(folder / lens_history.FILE).equals(pq.read_table(whole / lens_history.FILE))


def figures(folder: Path) -> list[dict]:
    """The log of the whole run without times."""
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    timed = ("runtime", "_time", "per_second", "total_flos", "train_loss")
    return [{name: value for name, value in line.items() if not name.endswith(timed)} for line in log]


def killed_and_resumed(world, uninterrupted, name: str, kind: str, seed: int, folder: Path) -> dict:
    """Kill, look at what is there, run the same command again, compare. What happened, for the record."""
    whole, wanted = uninterrupted(name)
    moment = killable_runs.moments(kind, random.Random(seed))
    trace = folder.with_suffix(".trace")
    process = killable_runs.start_training(killable_runs.words_of(world, name, folder), folder, trace, moment)
    killable_runs.kill_at(process, moment, folder, trace)
    killed = process.exitcode == -9
    found = checkpoints.all_of(folder)
    assert all(checkpoints.fault(one) is None for one in found), "whatever has a checkpoint's name is whole"
    unfinished = sorted(str(file.relative_to(folder)) for file in folder.glob(f"{checkpoints.UNFINISHED}/*/*"))
    before = batches(trace.read_text().splitlines() if trace.exists() else [])
    assert before == batches(wanted)[: len(before)]
    start = int(found[0].name.split("-")[1]) if found else 0
    after = finished(world, name, folder, folder.with_suffix(".again"))
    assert batches(after) == batches(wanted)[2 * start :], "the same batches from the last whole checkpoint on"
    ends_as(folder, whole)
    assert not (folder / checkpoints.UNFINISHED).exists()
    return {
        "run": name,
        "moment": str(moment),
        "kind": kind,
        "killed": killed,
        "batches_before": len(before),
        "unfinished_files": len(unfinished),
        "resumed_from": start,
    }


@pytest.mark.parametrize("name, kind", [("psft, packed, lens", "checkpoint"), ("streamed, cache", "evaluation")])
def test_killed_and_resumed(name, kind, world, uninterrupted, tmp_path):
    done = killed_and_resumed(world, uninterrupted, name, kind, 12, tmp_path / "run")  # late enough for a checkpoint
    assert done["killed"] and done["resumed_from"] > 0, done


@pytest.mark.parametrize(
    "event, nth, file",
    [("save", 2, "model.safetensors"), pytest.param("last", 1, None, marks=pytest.mark.full)],
    ids=["checkpoint", "end"],
)
def test_a_broken_side_file_costs_no_weights(event, nth, file, world, uninterrupted, tmp_path):
    """A tokenizer that cannot be saved: killed during a save and run again, the weights are those of a whole run."""
    name, folder, trace = "psft, packed, lens", tmp_path / "run", tmp_path / "trace"
    words, moment = killable_runs.words_of(world, name, folder), killable_runs.Moment(event, nth, file, 0.0)
    process = killable_runs.start_training(words, folder, trace, moment, broken=True)
    killable_runs.kill_at(process, moment, folder, trace)
    assert process.exitcode == -9
    found = checkpoints.all_of(folder)
    assert found and all(checkpoints.fault(one) is None for one in found)
    assert all((one / "model.safetensors").is_file() and not (one / "tokenizer.json").exists() for one in found)
    process = killable_runs.start_training(words, folder, tmp_path / "again", broken=True)
    process.join()
    assert process.exitcode == 1, "the weights are there, a file beside them is not"
    said = (tmp_path / "again.log").read_text()
    assert f"the weights are in {folder}, without the tokenizer" in said and "resumed at step" in said
    whole, _ = uninterrupted(name)
    same(load_file(folder / "model.safetensors"), load_file(whole / "model.safetensors"))


@pytest.mark.full
def test_killed_twenty_times(world, uninterrupted, tmp_path):
    """Every configuration in turn; QTARGET_TEST_RESULTS names a file for what happened."""
    names, done = list(killable_runs.RUNS), []
    for number, kind in enumerate(KINDS):
        name = names[number % len(names)]
        done.append(
            killed_and_resumed(world, uninterrupted, name, kind, 1000 * SEED + number, tmp_path / f"run-{number}")
        )
    if out := os.environ.get("QTARGET_TEST_RESULTS"):
        Path(out).write_text(json.dumps(done, indent=1) + "\n")
    assert all(one["killed"] for one in done), done
    cut = [one for one in done if one["kind"] == "checkpoint" and one["unfinished_files"]]
    assert cut, "some were killed with part of a checkpoint on the disk: how many is up to how busy the machine is"
