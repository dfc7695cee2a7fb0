"""Graders: what they call right, and a child process that may hang, raise or end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qtarget.errors import ConfigError
from qtarget.evaluation import graders
from qtarget.evaluation.extraction import final_answer
from qtarget.evaluation.grading import Grader

MOODY = "signal_verifiers:moody"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("  7 ", "7"),
        ("3 + 4 = 7, so #### 7\nThat is all.", "7"),
        ("#### 3 was wrong, #### 7", "7"),
        ("#### ", ""),
        (r"so \boxed{\frac{1}{2}} and not \boxed{3", r"\frac{1}{2}"),
        (r"\boxed{1} or \boxed {2}", "2"),
        (r"#### 1 \boxed{2} <answer> 3 </answer>", "3"),
        ("<answer>1</answer><answer>2\n3</answer>", "2\n3"),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


# -- in a process of its own -------------------------------------------------------------------------------------


def test_a_call_that_hangs_raises_or_ends_the_process_is_wrong_and_counted():
    with Grader(MOODY, timeout=600.0) as grader:
        assert grader("right", {}) is True
        assert grader("left", {}) is False
        assert (grader.timeouts, grader.errors) == (0, 0)
        grader.timeout = 0.1
        assert grader("hang", {}) is False
        assert (grader.timeouts, grader.errors) == (1, 0)
        grader.timeout = 600.0
        assert grader("right", {}) is True  # in a new process
        assert grader("raise", {}) is False
        assert grader.last_error == "KeyError: 'no such thing'"
        assert grader("exit", {}) is False
        assert grader("die", {}) is False
        assert (grader.timeouts, grader.errors) == (1, 3)
        assert grader("right", {}) is True
        process = grader._process
    assert not process.is_alive()


def test_a_call_that_hangs_ends_with_a_parent_that_was_killed():
    script = (
        f"from qtarget.evaluation.grading import Grader\ngrader = Grader({MOODY!r}, timeout=600)\ngrader('right', {{}})\n"
        "print(grader._process.pid, flush=True)\ngrader('hang', {})"
    )
    path = os.pathsep.join([str(Path(__file__).parents[1] / "helpers"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path}
    with subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True) as parent:
        verifier = int(parent.stdout.readline())
        time.sleep(0.2)
        assert is_alive(verifier)
        parent.kill()
        parent.wait()
    while is_alive(verifier):  # it looks every second
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()


def test_a_verifier_that_cannot_be_loaded_is_no_time_out():
    with (
        Grader("signal_verifiers:gone", timeout=1.0) as grader,
        pytest.raises(ConfigError, match="has no attribute 'gone'"),
    ):
        grader("right", {})


def test_a_verdict_of_ones_own_is_right_where_it_is_so_strictly():
    with Grader("signal_verifiers:in_two_readings", timeout=600.0) as grader:
        assert [grader(text, {}) for text in ("strictly", "leniently", "neither")] == [True, False, False]
        assert grader.ask("leniently", {}).verdict == {
            "parsed": "leniently",
            "lenient_parsed": "leniently",
            "strict": False,
            "lenient": True,
        }


# -- the two that are named --------------------------------------------------------------------------------------


def test_math_verify_takes_gold_from_the_answer():
    with Grader("math_verify", timeout=600.0) as grader:
        assert grader(r"It is \boxed{0.5}.", {"answer": r"\frac{1}{2}"})
        assert grader("18 / 2 = 9 #### 9", {"answer": "Half of it. #### 9"})
        assert not grader(r"It is \boxed{0.25}.", {"answer": r"\frac{1}{2}"})
        assert not grader("", {"answer": "9"})
        assert grader.errors == 0
        assert not grader("9", {"answer": ""})
        assert grader.errors == 1 and "cannot be read" in grader.last_error


def test_reasoning_gym_scores_the_final_answer():
    row = {"question": "?", "answer": "7", "metadata": {"difficulty": {}}}
    with Grader("reasoning_gym:gsm_symbolic", timeout=600.0, whole_text=True) as grader:
        assert grader("Tom has 3 and buys 4. <answer>7</answer>", row)
        assert not grader("Tom has 7 and buys 4. <answer>11</answer>", row)
        assert grader("7", {**row, "metadata": '{"difficulty": {}}'})
        assert grader.errors == 0, grader.last_error
    with Grader("reasoning_gym:gsm_symbolic", timeout=600.0) as grader:
        assert not grader("7", row), "nothing is marked"
        assert grader.ask("7", row).verdict["lenient"]


@pytest.mark.parametrize(
    ("name", "columns", "sentence"),
    [
        ("math_verfy", None, "verifier is 'math_verfy'; did you mean 'math_verify'?"),
        ("reasoning_gym:gsm_symbolc", None, "verifier reasoning_gym is 'gsm_symbolc'; did you mean 'gsm_symbolic'?"),
        ("nowhere:verify", None, "importing nowhere failed"),
        ("signal_verifiers:gone", None, "signal_verifiers has no 'gone'"),
        ("signal_verifiers:not_a_function", None, "which is not a function"),
        ("verify", None, "verifier is 'verify'; "),
        ("choice", ["prompt", "answer"], "reads the column 'options', but the rows have prompt, answer"),
        ("math_verify", ["prompt", "gold"], "reads the column 'answer', but the rows have prompt, gold"),
    ],
)
def test_refusals(name, columns, sentence):
    with pytest.raises(ConfigError) as refused:
        graders.check(name, columns)
    assert sentence in str(refused.value)


@pytest.mark.parametrize("name", ["math", "math_verify", "reasoning_gym:gsm_symbolic", "signal_verifiers:last_number"])
def test_valid_names_are_let_through(name):
    graders.check(name, ["prompt", "answer"])


def test_a_script_without_a_guard_is_not_run_again(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("from qtarget.evaluation import grade\nprint('once')\nprint(grade('#### 7', '7')['strict'])\n")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert (done.stdout.split(), done.returncode) == (["once", "True"], 0), done.stderr
