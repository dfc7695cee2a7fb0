"""Settings, optimizers and callbacks given to the trainer do what they do with TRL's."""

import copy

import pytest
import torch
from transformers import TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

import tiny_models
from beside_trl import OURS, STEPS, TRL, assert_same_run, make_trainer, side_by_side, train_and_record
from qtarget import QTargetTrainer
from quick_runs import quick_settings


@pytest.mark.parametrize("settings", [{}, {"loss_type": "dft"}, {"packing": True, "max_length": 40}], ids=str)
def test_settings_of_trl(settings, tmp_path):
    """An SFTConfig as it is: two processes of one script differ by the trainer's name only."""
    theirs, ours = (
        train_and_record(
            make_trainer(
                (kind, SFTConfig),
                tiny_models.trained_model(),
                tmp_path,
                tiny_models.conversation_dataset(),
                {},
                **settings,
            )
        )
        for kind in (SFTTrainer, QTargetTrainer)
    )
    assert_same_run(theirs, ours)


def test_settings_of_transformers(tmp_path):
    settings = {"weight_decay": 0.1, "warmup_steps": 1}
    theirs, ours = (
        train_and_record(
            make_trainer(
                (kind, TrainingArguments),
                tiny_models.trained_model(),
                tmp_path,
                tiny_models.message_dataset(),
                {},
                **settings,
            )
        )
        for kind in (SFTTrainer, QTargetTrainer)
    )
    assert_same_run(theirs, ours)


def test_an_optimizer_of_ones_own(tmp_path):
    def made(kind):
        model = tiny_models.trained_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
        trainer, config = kind
        return trainer(
            model,
            config(**quick_settings(tmp_path, **STEPS)),
            train_dataset=tiny_models.conversation_dataset(),
            processing_class=copy.deepcopy(tiny_models.tokenizer()),
            optimizers=(optimizer, scheduler),
        )

    theirs, ours = (train_and_record(made(kind)) for kind in (TRL, OURS))
    assert_same_run(theirs, ours)
    assert [step["learning_rate"] for step in ours.steps] == [0.2, 0.1, 0.05]


def test_a_class_of_optimizers(tmp_path):
    given = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9})}
    assert_same_run(*side_by_side(tmp_path, tiny_models.conversation_dataset, given=given))


class Diary(TrainerCallback):
    """Notes every event with the step it came at."""

    def __init__(self):
        self.events = []

    def __getattribute__(self, name):
        if not name.startswith("on_"):
            return super().__getattribute__(name)
        return lambda args, state, control, **kwargs: self.events.append((name, state.global_step))


class StopsAfterTwo(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


def test_callbacks(tmp_path):
    """Called at the same events in the same order; and what they decide is done."""
    data = tiny_models.conversation_dataset()
    diaries = []
    for kind in (TRL, OURS):
        settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 2}
        made = make_trainer(
            kind,
            tiny_models.trained_model(),
            tmp_path,
            data,
            {"eval_dataset": data, "callbacks": [StopsAfterTwo()]},
            **settings,
        )
        diaries.append(Diary())
        made.add_callback(diaries[-1])
        made.train()
        assert made.state.global_step == 2
    theirs, ours = diaries
    assert {"on_step_end", "on_evaluate", "on_save", "on_log"} <= {name for name, _ in theirs.events}
    assert ours.events == theirs.events
