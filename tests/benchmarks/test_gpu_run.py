"""The acceptance run on a GPU, as far as a machine without one can tell: parts in small, deadlines, crashes, results."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENTRY = ROOT / "benchmarks" / "gpu.py"
ENVIRONMENT = {  # the tests of the engine's kernels set TRITON_INTERPRET for all of pytest's processes
    **{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in ("src", "tests", "benchmarks")),
}
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the package triton")


def run(*words, code=None, more=None, timeout=240):
    """gpu.py with these words, or a program that imports it; (exit status, what it printed)."""
    command = [sys.executable, str(ENTRY)] if code is None else [sys.executable, "-c", code]
    done = subprocess.run(
        [*command, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=ENVIRONMENT | (more or {}),
        cwd=ROOT,
    )
    return done.returncode, done.stdout + done.stderr


def parts_of(path):
    return {part["name"]: part for part in json.loads(path.read_text())["parts"]}


# Parts that hang, crash or fail in place of the real ones.
PLANTED = """
import os, subprocess, sys, time
import gpu
from gpu_run.record import Part

def good(talk):
    talk.row("number", value=1.0)

def hangs(talk):
    talk.row("before", value=2.0)
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", sys.argv[1]])
    time.sleep(600)

def waits(talk):
    time.sleep(600)

def crashes(talk):
    talk.row("before", value=3.0)
    os.abort()

def raises(talk):
    raise ValueError("planted")

def misses(talk):
    talk.limit("R", 1.5, most=1.35)

gpu.PARTS = [Part(name, globals()[name], seconds) for name, seconds in {parts}]
sys.exit(gpu.main(["--smoke", "--out", sys.argv[1], *sys.argv[2:]]))
"""


def planted(**seconds):
    return PLANTED.replace("{parts}", repr(list(seconds.items())))


def test_parts_run_in_small(tmp_path):
    quick = ["environment", "correctness", "host reads", "kernels", "sweep", "profile"]
    status, said = run("--smoke", "--only", *quick, "--out", tmp_path / "gpu.json")
    assert status == 0, said
    parts = parts_of(tmp_path / "gpu.json")
    assert list(parts) == quick
    for name, part in parts.items():
        assert part["state"] == "done" and part["rows"], (name, part["error"])
    judged = [row for row in parts["correctness"]["rows"] if "done" in row]
    assert judged and all(row["done"] == row["of"] for row in judged)


@pytest.mark.full
def test_every_part_runs_in_small(tmp_path):
    status, said = run("--smoke", "--out", tmp_path / "gpu.json")
    assert status == 0, said
    assert "nothing failed" in said
    parts = parts_of(tmp_path / "gpu.json")
    assert len(parts) == 10
    for name, part in parts.items():
        assert part["state"] == "done", (name, part["error"])
        assert part["rows"] or name in ("compile", "bytes"), name
    trained = [row for row in parts["training"]["rows"] if "losses" in row]
    assert len(trained) == 4


def test_a_wrong_gradient_is_noticed(tmp_path):
    code = """
import sys, gpu
from qtarget.losses.engine.matmuls import WeightGradient
right = WeightGradient.finish
WeightGradient.finish = lambda self: right(self) * 1.001
sys.exit(gpu.main(["--smoke", "--only", "correctness", "--out", sys.argv[1]]))
"""
    status, said = run(tmp_path / "gpu.json", code=code)
    assert status == 1, said
    (failure, *_) = parts_of(tmp_path / "gpu.json")["correctness"]["failures"]
    assert "d_weight is off by 0.001" in failure and "seed" in failure
    assert f"FAIL correctness: {failure}" in said


def test_a_deadline_ends_a_part_with_all_it_started_and_the_next_one_runs(tmp_path):
    status, said = run(tmp_path / "gpu.json", code=planted(hangs=1.0, good=600.0))
    assert status == 3, said
    parts = parts_of(tmp_path / "gpu.json")
    assert parts["hangs"]["state"] == "cut by its deadline"
    assert parts["hangs"]["rows"] == [{"what": "before", "value": 2.0}]
    assert parts["good"]["state"] == "done"
    assert "UNFINISHED hangs: cut by its deadline" in said
    assert "nothing failed, but the run is not whole" in said
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if readable(path)]
    assert not [command for command in commands if bytes(tmp_path / "gpu.json") in command.split(b"\0")]


def readable(path):
    try:
        path.read_bytes()
    except OSError:
        return False
    return True


def test_a_crash_and_a_missed_limit_are_failures_and_lose_no_rows(tmp_path):
    status, said = run(tmp_path / "gpu.json", code=planted(crashes=600.0, raises=600.0, misses=600.0, good=600.0))
    assert status == 1, said
    parts = parts_of(tmp_path / "gpu.json")
    assert parts["crashes"]["rows"] == [{"what": "before", "value": 3.0}]
    assert json.loads((tmp_path / "gpu.json").read_text())["failures"] == [
        "crashes: crashed: its process ended with signal SIGABRT",
        f"raises: crashed: ValueError: planted (<string>:{line_of('raise ValueError')})",
        "misses: R is 1.5; at most 1.35 is allowed",
    ]
    assert parts["good"]["state"] == "done"


def line_of(text):
    return [text in line for line in PLANTED.splitlines()].index(True) + 1


def test_parts_that_time_does_not_reach_are_named(tmp_path):
    code = planted(hangs=3.0, good=600.0)
    status, said = run(tmp_path / "gpu.json", "--seconds", "3.5", code=code)
    assert status == 3, said
    assert "UNFINISHED good: not reached" in said


def test_a_killed_run_leaves_what_it_had(tmp_path):
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-c", planted(good=600.0, waits=300.0), str(out)]
    process = subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        while not (out.exists() and parts_of(out)["good"]["state"] == "done"):
            assert process.poll() is None
            time.sleep(0.1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    parts = parts_of(out)
    assert parts["good"]["rows"] == [{"what": "number", "value": 1.0}]
    assert parts["waits"]["state"] == "not reached"


@needs_triton
def test_without_a_device_it_says_so_and_checks_what_it_can(tmp_path):
    status, said = run("--check", "--only", "interpreter", "--out", tmp_path / "gpu.json")
    assert status == 0, said
    assert said.startswith("No CUDA device is here")
    rows = parts_of(tmp_path / "gpu.json")["interpreter"]["rows"]
    assert len(rows) == 7 and all(row["error"] < 1e-10 for row in rows)


@needs_triton
@pytest.mark.full
def test_the_kernels_run_in_small_in_the_interpreter(tmp_path):
    """The parts as on a GPU, with the kernels judged: recorded launches, other tiles, passes on odd shapes."""
    status, said = run("--smoke", "--out", tmp_path / "gpu.json", more={"TRITON_INTERPRET": "1"})
    assert status == 0, said
    parts = parts_of(tmp_path / "gpu.json")
    assert {part["state"] for part in parts.values()} == {"done"}
    assert len([row for row in parts["kernels"]["rows"] if "of_copy" in row]) == 14
    assert any("qtarget triton" in row["what"] for row in parts["time"]["rows"])


@needs_triton
@pytest.mark.full
def test_without_a_device_every_kernel_is_compiled(tmp_path):
    status, said = run("--out", tmp_path / "gpu.json")
    assert status == 0, said
    rows = parts_of(tmp_path / "gpu.json")["compile"]["rows"]
    assert len(rows) >= 80 and not [row for row in rows if row["stack"]]


def test_without_triton_it_says_what_to_install(tmp_path):
    code = """
import importlib.util, sys
there = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else there(name, *rest)
import gpu
sys.exit(gpu.main(["--check", "--out", sys.argv[1]]))
"""
    status, said = run(tmp_path / "gpu.json", code=code)
    assert status == 0, said
    assert "pip install triton" in said


@needs_triton
def test_too_many_registers_or_narrow_loads_are_noticed():
    code = """
from dataclasses import replace
from gpu_run import ahead
(good,) = ahead.compile_all(90, only="gradient student, softcap")
print(good.faults, replace(good, most_registers=10).faults, replace(good, stack=8).faults)
(odd,) = ahead.compile_all(90, only="gradient student, odd")
print(odd.faults, replace(odd, loads_16_bytes=False).faults)
"""
    status, said = run(code=code)
    assert status == 0, said
    first, second = said.strip().splitlines()[-2:]
    assert first.startswith("[] [") and "at most 10 are allowed" in first and "8 bytes of stack" in first
    assert second.startswith("[] [") and "16 bytes at a time" in second


def test_bytes_are_read_from_the_profilers_table():
    from gpu_run.profiled import parse

    table = "\n".join(
        [
            "==PROF== Connected to process 1",
            '"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"',
            '"0","1","_sums","dram__bytes_read.sum","byte","1,000"',
            '"0","1","_sums","dram__bytes_write.sum","byte","24"',
            '"1","1","_gradient","dram__bytes_read.sum","byte","500"',
        ]
    )
    assert parse(table) == {"0": 1024.0, "1": 500.0}
