"""Verifiers: what they call right, and a child process that may hang, raise or end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qtarget.errors import ConfigError
from qtarget.evaluation import verifiers
from qtarget.evaluation.extraction import final_answer
from qtarget.evaluation.verifiers import Judge

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
    with Judge(MOODY, timeout=1.0) as judge:
        assert judge("right", {}) is True
        assert judge("left", {}) is False
        assert (judge.timeouts, judge.errors) == (0, 0)
        began = time.monotonic()
        assert judge("hang", {}) is False
        assert time.monotonic() - began < 30
        assert (judge.timeouts, judge.errors) == (1, 0)
        assert judge("right", {}) is True  # in a new process
        assert judge("raise", {}) is False
        assert judge.last_error == "KeyError: 'no such thing'"
        assert judge("exit", {}) is False
        assert judge("die", {}) is False
        assert (judge.timeouts, judge.errors) == (1, 3)
        assert judge("right", {}) is True
        process = judge._process
    assert not process.is_alive()


def test_a_call_that_hangs_ends_with_a_parent_that_was_killed():
    script = (
        f"from qtarget.evaluation.verifiers import Judge\njudge = Judge({MOODY!r}, timeout=600)\njudge('right', {{}})\n"
        "print(judge._process.pid, flush=True)\njudge('hang', {})"
    )
    path = os.pathsep.join([str(Path(__file__).parents[1] / "helpers"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path}
    with subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True) as parent:
        verifier = int(parent.stdout.readline())
        time.sleep(0.2)
        assert is_alive(verifier)
        parent.kill()
        parent.wait()
    until = time.monotonic() + 20
    while is_alive(verifier) and time.monotonic() < until:
        time.sleep(0.05)
    assert not is_alive(verifier)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()


def test_a_verifier_that_cannot_be_loaded_is_no_time_out():
    with (
        Judge("signal_verifiers:gone", timeout=1.0) as judge,
        pytest.raises(ConfigError, match="has no attribute 'gone'"),
    ):
        judge("right", {})


# -- the two that are named --------------------------------------------------------------------------------------


def test_math_verify_takes_gold_from_the_answer():
    with Judge("math_verify", timeout=60.0) as judge:
        assert judge(r"It is \boxed{0.5}.", {"answer": r"\frac{1}{2}"})
        assert judge("18 / 2 = 9 #### 9", {"answer": "Half of it. #### 9"})
        assert not judge(r"It is \boxed{0.25}.", {"answer": r"\frac{1}{2}"})
        assert not judge("", {"answer": "9"})
        assert judge.errors == 0
        assert not judge("9", {"answer": ""})
        assert judge.errors == 1 and "cannot be read" in judge.last_error


def test_reasoning_gym_scores_the_final_answer():
    row = {"question": "?", "answer": "7", "metadata": {"difficulty": {}}}
    with Judge("reasoning_gym:gsm_symbolic", timeout=60.0) as judge:
        assert judge("Tom has 3 and buys 4. <answer>7</answer>", row)
        assert not judge("Tom has 7 and buys 4. <answer>11</answer>", row)
        assert judge("7", {**row, "metadata": '{"difficulty": {}}'})
        assert judge.errors == 0, judge.last_error


@pytest.mark.parametrize(
    ("name", "columns", "sentence"),
    [
        ("math_verfy", None, "verifier is 'math_verfy'; did you mean 'math_verify'?"),
        ("reasoning_gym:gsm_symbolc", None, "verifier reasoning_gym is 'gsm_symbolc'; did you mean 'gsm_symbolic'?"),
        ("nowhere:verify", None, "importing nowhere failed"),
        ("signal_verifiers:gone", None, "signal_verifiers has no 'gone'"),
        ("signal_verifiers:not_a_function", None, "which is no function"),
        ("math_verify", ["prompt", "gold"], "reads the column 'answer', but the rows have prompt, gold"),
    ],
)
def test_refusals(name, columns, sentence):
    with pytest.raises(ConfigError) as refused:
        verifiers.check(name, columns)
    assert sentence in str(refused.value)


@pytest.mark.parametrize("name", ["math_verify", "reasoning_gym:gsm_symbolic", "signal_verifiers:last_number"])
def test_valid_names_are_let_through(name):
    verifiers.check(name, ["prompt", "answer"])
