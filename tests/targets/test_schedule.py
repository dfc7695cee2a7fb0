"""Numbers on a schedule: their values, what is refused, and what a target needs while they move."""

import pytest

import qtarget as qt
from qtarget.targets.objective import Objective
from qtarget.targets.schedule import ScheduledTarget

LINEAR = {"schedule": "linear", "from": 0.0, "to": 0.5}
HOLD = {"schedule": "constant", "to": 0.25, "steps": 10}
HUMP = [LINEAR | {"steps": 10}, {"schedule": "linear", "from": 0.5, "to": 0.0, "steps": 10}]


def scheduled(eta, **more):
    return ScheduledTarget.read({"preset": "target-sft", "eta": eta, **more})


@pytest.mark.parametrize(
    "eta, values",
    [
        (LINEAR, {0: 0.0, 20: 0.1, 100: 0.5, 120: 0.5}),
        (LINEAR | {"steps": 20}, {0: 0.0, 10: 0.25, 20: 0.5, 100: 0.5}),
        (LINEAR | {"steps": 0.2}, {0: 0.0, 10: 0.25, 20: 0.5, 100: 0.5}),
        (LINEAR | {"start": 20}, {0: 0.0, 20: 0.0, 60: 0.25, 100: 0.5}),
        (LINEAR | {"start": 0.2, "steps": 10}, {0: 0.0, 20: 0.0, 25: 0.25, 30: 0.5, 100: 0.5}),
        (LINEAR | {"schedule": "cosine", "start": 10, "steps": 0.1}, {10: 0.0, 15: 0.25, 20: 0.5}),
        (LINEAR | {"schedule": "constant", "start": 10}, {0: 0.0, 9: 0.0, 10: 0.5, 100: 0.5}),
        ([HOLD, LINEAR], {0: 0.25, 9: 0.25, 10: 0.0, 55: 0.25, 100: 0.5}),
        (HUMP, {0: 0.0, 5: 0.25, 10: 0.5, 15: 0.25, 20: 0.0, 100: 0.0}),
    ],
)
def test_values_at_steps_of_a_hundred(eta, values):
    target = scheduled(eta)
    got = {step: target.values(step, 100)["eta"] for step in values}
    assert got == pytest.approx(values, abs=1e-12)
    assert target.at(min(values), 100).hyperparameters["eta"] == got[min(values)]
    assert ScheduledTarget.read(target.to_config()) == target


@pytest.mark.parametrize(
    "eta, text",
    [
        (LINEAR, "eta 0 → 0.5 (linear, the whole run)"),
        (LINEAR | {"start": 0.2, "steps": 0.1}, "eta 0 for 0.2 of the run, then 0 → 0.5 (linear, 0.1 of the run)"),
        ([HOLD, LINEAR], "eta 0.25 for 10 steps, then 0 → 0.5 (linear, the rest of the run)"),
    ],
)
def test_a_schedule_in_words(eta, text):
    assert str(scheduled(eta)).endswith(f"with {text}")


@pytest.mark.parametrize(
    "eta, told",
    [
        (LINEAR | {"steps": 1.0}, "eta.steps is 1.0; use a whole number of steps from 1, a share of the run below 1"),
        (LINEAR | {"steps": 2.5}, "eta.steps is 2.5; use a whole number of steps"),
        (LINEAR | {"steps": True}, "eta.steps is True; use a whole number of steps"),
        (LINEAR | {"start": 0}, "eta.start is 0; use a whole number of steps"),
        ({"schedule": "constant", "to": 0.5, "start": 3}, "the schedule of eta has a start but no from"),
        ([LINEAR, HOLD], r"eta[1] has no steps; only the last of a list"),
        ([HOLD, LINEAR | {"start": 3}], "eta[2] has a start; in a list write a schedule: constant before it"),
        ([HOLD, 0.5], "eta[2] is 0.5; in a list of schedules each has its own"),
        ([HOLD, LINEAR | {"stps": 3}], "key of the schedule of eta[2] is 'stps'; did you mean 'steps'"),
        ([HOLD, LINEAR | {"to": 2.0}, HOLD], "eta[2] has no steps"),
        ([HOLD, LINEAR | {"to": 2.0, "steps": 3}, HOLD], "eta is 2.0; use a number from 0 to 1"),
    ],
)
def test_what_is_refused(eta, told):
    with pytest.raises(qt.ConfigError) as caught:
        scheduled(eta)
    assert told in str(caught.value)


def test_a_teacher_is_needed_until_the_last_piece_that_asks_it_is_over():
    """It is 0 at both ends: only looks in between tell."""
    objective = Objective.single({"preset": "target-sft", "eta": HUMP})
    assert objective.requires == objective.requires_from(0, 100) == objective.requires_from(19, 100) == {"teacher"}
    assert objective.requires_from(20, 100) == frozenset()
    later = Objective.single({"preset": "target-sft", "eta": [HOLD | {"to": 0.0}, *HUMP]})
    assert later.requires_from(0, 100) == {"teacher"}


def test_two_numbers_that_move_meet_anywhere():
    """The teacher has a part only once the share has left 0 and eta has not come back to it."""
    target = scheduled(HUMP, share={"schedule": "linear", "from": 0.0, "to": 1.0, "start": 15, "steps": 5})
    assert target.at(17, 100).requires == {"teacher"}
    assert target.requires == target.requires_from(17, 100) == {"teacher"}
    assert target.requires_from(20, 100) == frozenset()


@pytest.mark.parametrize("name", [n for n in qt.presets.names() if qt.presets.describe(n).schedule])
def test_a_published_schedule_begins_or_ends_at_the_defaults(name):
    entry = qt.presets.describe(name)
    target = ScheduledTarget.read({"preset": name, **entry.schedule})
    assert qt.preset(name) in (target.at(0, 100), target.at(100, 100))


def test_the_published_schedules():
    idft = ScheduledTarget.read({"preset": "idft", **qt.presets.describe("idft").schedule})
    assert [idft.values(step, 1000)["strength"] for step in (0, 200, 250, 300, 1000)] == [0.0, 0.0, 0.5, 1.0, 1.0]
    taid = ScheduledTarget.read({"preset": "taid", **qt.presets.describe("taid").schedule})
    assert [taid.values(step, 1000)["t"] for step in (0, 500, 1000)] == pytest.approx([0.4, 0.7, 1.0])
