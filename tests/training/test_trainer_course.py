"""A resumed run says where it goes on, and what of other settings it cannot take over."""

import json
import logging

import pytest

import tiny_models
from qtarget import ConfigError
from qtarget.training.saving import course
from quick_runs import logged_values, quick_trainer

SETTINGS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.01, "optim": "adamw_torch"}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The checkpoint of a run of four steps after two."""
    folder = tmp_path_factory.mktemp("stopped")
    made(folder).train()
    return folder / "checkpoint-2"


def made(folder, rows=8, **settings):
    data = tiny_models.conversation_dataset(rows)
    return quick_trainer(tiny_models.llama(), folder, data, **(SETTINGS | {"lr_scheduler_type": "linear"} | settings))


def test_the_same_run_goes_on_and_says_where(stopped, tmp_path, capsys, caplog):
    with caplog.at_level(logging.WARNING):
        resumed = made(tmp_path)
        resumed.train(resume_from_checkpoint=str(stopped))
    assert f"resumed at step 2 from {stopped}" in capsys.readouterr().out
    assert not any("missing keys" in record.message or "schedule" in record.message for record in caplog.records)
    assert logged_values(resumed, "learning_rate") == pytest.approx([0.01, 0.0075, 0.005, 0.0025])


@pytest.mark.parametrize(
    "settings, says",
    [
        (
            {"learning_rate": 0.02},
            r"^learning_rate is 0\.02, but .* was trained with 0\.01, which its optimiser's state",
        ),
        ({"adam_beta1": 0.5}, r"^adam_beta1 is 0\.5"),
        ({"weight_decay": 0.1}, r"^weight_decay is 0\.1"),
        ({"optim": "sgd"}, r"^optim is sgd"),
        ({"gradient_accumulation_steps": 1}, r"^per_device_train_batch_size × .* is 2, but .* was trained with 4"),
        ({"seed": 1}, r"^seed is 1"),
        ({"rows": 12}, r"^the train dataset has 12 rows \(digest \w+\), but .* was trained with 8 rows"),
    ],
    ids=str,
)
def test_what_a_checkpoint_overrides_is_refused(settings, says, stopped, tmp_path):
    with pytest.raises(ConfigError, match=says):
        made(tmp_path, **settings).train(resume_from_checkpoint=str(stopped))


def test_another_schedule_is_followed_and_said(stopped, tmp_path, caplog):
    resumed = made(tmp_path, max_steps=8)
    with caplog.at_level(logging.WARNING):
        resumed.train(resume_from_checkpoint=str(stopped))
    assert any(record.message.startswith("max_steps is 8, and the checkpoint") for record in caplog.records)
    rates = logged_values(resumed, "learning_rate")
    assert rates[3:] == pytest.approx([0.01 * (8 - step) / 8 for step in range(3, 8)])


def test_other_rows_are_trained_from_their_beginning_where_that_is_asked_for(stopped, tmp_path):
    resumed = made(tmp_path, rows=12, ignore_data_skip=True)
    resumed.train(resume_from_checkpoint=str(stopped))
    assert resumed.state.global_step == 4


def test_the_same_rows_in_other_micro_batches_are_the_same_course(stopped, tmp_path):
    resumed = made(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=1)
    resumed.train(resume_from_checkpoint=str(stopped))
    assert resumed.state.global_step == 4


def test_a_checkpoint_of_another_program_has_no_course(stopped, tmp_path):
    held = json.loads((stopped / course.FILE).read_text())
    assert held["rows of a step"] == 4 and held["learning_rate"] == 0.01
    course.check(tmp_path, made(tmp_path, learning_rate=1.0))
