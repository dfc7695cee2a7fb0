"""The plugin for axolotl: which settings it takes, and what it refuses. test_hosts.py has the runs in axolotl itself."""

from __future__ import annotations

import pytest
import torch
import yaml
from hosts.axolotl import EXAMPLE, PLUGIN, REFUSED
from test_hosts import HOSTS, ROOT
from transformers import Trainer, TrainingArguments

import tiny_models
from qtarget.errors import ConfigError
from qtarget.integrations.axolotl import QTargetArgs, QTargetPlugin, refuse_another_loss


def read(**settings):
    return QTargetArgs.model_validate({"plugins": [PLUGIN], "qtarget_target": "dft", **settings})


def test_axolotl_finds_the_settings_by_the_name_that_the_plugin_gives():
    module, _, name = QTargetPlugin().get_input_args().rpartition(".")
    assert (module, name) == (QTargetArgs.__module__, "QTargetArgs")
    assert f"{module}.{QTargetPlugin.__name__}" == PLUGIN


def test_the_example_is_on_the_page_and_has_settings_that_pass(tmp_path):
    text = EXAMPLE.read_text(encoding="utf-8")
    assert f"```yaml\n{text}```" in (ROOT / "docs/trainers/axolotl.md").read_text(encoding="utf-8")
    found = QTargetArgs.model_validate(yaml.safe_load(text) | {"qtarget_teacher": str(tmp_path)})
    assert (found.qtarget_target, found.qtarget_backend) == ({"preset": "target-sft", "eta": 0.5}, "auto")


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"qtarget_target": None}, "is among the plugins without a target; set qtarget_target"),
        ({"qtarget_target": "dtf"}, "qtarget_target: .*'dtf'; did you mean 'dft'"),
        ({"qtarget_target": "kd"}, r"target kd\(.*\) needs a teacher; name one in qtarget_teacher"),
        ({"qtarget_target": "iw-sft"}, "reads the column 'weight', which axolotl does not bring to its batches"),
        ({"qtarget_reference": "./no-folder"}, "qtarget_reference is './no-folder', which cannot be loaded"),
        ({"qtarget_vocab_size": "many"}, "qtarget_vocab_size"),
        ({"rl": "dpo"}, "rl is 'dpo', a loss of axolotl's own beside qtarget_target; keep one"),
        ({"liger_fused_linear_cross_entropy": True}, "liger_fused_linear_cross_entropy is True, a loss of axolotl's"),
        ({"sequence_parallel_degree": 4}, "sequence_parallel_degree is 4, which cuts each sequence into pieces"),
    ],
)
def test_what_cannot_be_trained_is_said(settings, says):
    with pytest.raises(ValueError, match=says):
        read(**settings)


def test_every_fault_is_in_one_message():
    with pytest.raises(ValueError, match=r"(?s)qtarget_techer.*needs a teacher.*use_eaft"):
        read(qtarget_target="kd", qtarget_techer="org/name", use_eaft=True)


def test_what_axolotl_would_not_train_is_let_pass():
    read(use_eaft=False, rl=None, context_parallel_size=1, cut_cross_entropy=False)
    read(plugins=[PLUGIN, *REFUSED["CutCrossEntropyPlugin"]["plugins"]], cut_cross_entropy=False)


def test_a_later_run_without_the_plugin_is_left_alone():
    assert QTargetArgs.model_validate({"plugins": None, "use_eaft": True}).qtarget_target is None


@pytest.mark.parametrize("name", [name for name in REFUSED if name not in ("trainer_cls", "another tokenizer")])
def test_the_sentences_on_record_are_those_of_today(name):
    with pytest.raises(ValueError) as error:
        read(**REFUSED[name])
    assert HOSTS["axolotl"]["refused"][name] in str(error.value)


# -- the trainer that axolotl made ---------------------------------------------------------------------------------


class WithItsOwnLoss(Trainer):
    """Asks the model, and adds to what it returns: no callback notices that."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        return super().compute_loss(model, inputs, *args, **kwargs) + 1


def trainer(folder, kind=Trainer, label_smoothing_factor=0.0, **more):
    args = TrainingArguments(str(folder), report_to=[], use_cpu=True, label_smoothing_factor=label_smoothing_factor)
    return kind(tiny_models.llama(), args, **more)


def test_a_trainer_that_takes_the_loss_of_the_model_passes(tmp_path):
    refuse_another_loss(trainer(tmp_path))


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"kind": WithItsOwnLoss}, r"the trainer class .*WithItsOwnLoss computes a loss of its own"),
        ({"compute_loss_func": lambda *_: torch.zeros(())}, "the trainer has a compute_loss_func, which computes"),
        ({"label_smoothing_factor": 0.1}, "the trainer has a label_smoother"),
    ],
)
def test_a_trainer_that_computes_a_loss_itself_is_refused(tmp_path, settings, says):
    with pytest.raises(ConfigError, match=says):
        refuse_another_loss(trainer(tmp_path, **settings))
