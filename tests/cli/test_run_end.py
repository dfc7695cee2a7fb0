"""How ``qtarget train`` ends: weights come before whatever else it writes, and Ctrl-C says how to go on."""

import json
import signal
from pathlib import Path

import matplotlib.figure
import pytest
import torch
import transformers
from safetensors.torch import load_file

import teacher_caches
from qtarget.cli.__main__ import main
from qtarget.training import QTargetTrainer
from qtarget.training.saving import checkpoints, model_card

WORDS = "--target sft --teacher_model_name_or_path none --max_steps 2 --logging_steps 1"
WORDS += " --save_strategy steps --save_steps 1"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return teacher_caches.write_world(tmp_path_factory.mktemp("ends"))


def train(world: Path, folder: Path, *more: object) -> int:
    words = ["train", "--config", world / "config.yaml", "--output_dir", folder, *WORDS.split(), *more]
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def whole(world):
    """The folder of a run that nothing disturbed."""
    assert train(world, world / "whole") == 0
    return world / "whole"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def refuse(*_, **__):
    raise ValueError("a library's refusal")


@pytest.mark.parametrize(
    "owner, method, what",
    [
        (transformers.PreTrainedTokenizerBase, "save_pretrained", "the tokenizer"),
        (transformers.GenerationConfig, "save_pretrained", "generation_config.json"),
        (matplotlib.figure.Figure, "savefig", "curves.png"),
        (model_card, "complete", "README.md"),
        (QTargetTrainer, "save_metrics", "train_results.json"),
        (QTargetTrainer, "save_state", "trainer_state.json"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_side_file_that_cannot_be_written_costs_nothing_else(
    owner, method, what, world, whole, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(owner, method, refuse)
    assert train(world, tmp_path / "run") == 1
    said = capsys.readouterr().err
    assert f"qtarget train: the weights are in {tmp_path / 'run'}, without {what}" in said
    assert "Traceback" not in said
    assert same(weights(tmp_path / "run"), weights(whole))
    assert same(weights(tmp_path / "run" / "checkpoint-2"), weights(whole))
    assert checkpoints.fault(tmp_path / "run" / "checkpoint-2") is None


def test_an_evaluation_that_fails_after_training_costs_no_weights(world, whole, tmp_path, monkeypatch):
    evaluate = QTargetTrainer.evaluate

    def fails_at_the_end(self, *args, **kwargs):
        if self.state.global_step:
            raise torch.OutOfMemoryError("of the last evaluation")
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(QTargetTrainer, "evaluate", fails_at_the_end)
    with pytest.raises(torch.OutOfMemoryError):
        train(world, tmp_path / "run")
    assert same(weights(tmp_path / "run"), weights(whole))


def test_a_callback_that_fails_after_the_last_step_costs_no_weights(world, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.DefaultFlowCallback, "on_train_end", refuse, raising=False)
    with pytest.raises(ValueError, match="a library's refusal"):
        train(world, tmp_path / "run")
    assert same(weights(tmp_path / "run"), weights(whole))


def test_generation_settings_that_contradict_are_left_out_and_said(world, tmp_path, caplog):
    model = transformers.AutoModelForCausalLM.from_pretrained(world / "model")
    model.save_pretrained(tmp_path / "model")
    transformers.AutoTokenizer.from_pretrained(world / "model").save_pretrained(tmp_path / "model")
    asked = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "max_new_tokens": 7, "eos_token_id": 2}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(asked))
    assert train(world, tmp_path / "run", "--model_name_or_path", tmp_path / "model") == 0
    saved = json.loads((tmp_path / "run" / "generation_config.json").read_text())
    assert saved["max_new_tokens"] == 7 and not saved.keys() & {"temperature", "top_p"}
    assert "left out of what this run saves: temperature 0.6, top_p 0.9" in caplog.text


# -- Ctrl-C --------------------------------------------------------------------------------------------------------


@pytest.fixture
def ctrl_c():
    """A process in a shell's background ignores Ctrl-C from its start, and so would these tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt_in(monkeypatch, step: int) -> None:
    training_step = QTargetTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == step:
            signal.raise_signal(signal.SIGINT)
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(QTargetTrainer, "training_step", interrupted)


def test_ctrl_c_says_how_to_go_on_and_that_goes_on(world, whole, tmp_path, monkeypatch, capsys, ctrl_c):
    with monkeypatch.context() as patched:
        interrupt_in(patched, 1)
        assert train(world, tmp_path / "run") == 130
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("qtarget train: ")]
    assert said.startswith("qtarget train: interrupted; go on from checkpoint-1 with: qtarget train --config ")
    assert main(said.split("with: qtarget ")[1].split()) == 0
    assert "resumed at step 1 from" in capsys.readouterr().out
    assert same(weights(tmp_path / "run"), weights(whole))


def test_ctrl_c_before_a_checkpoint(world, tmp_path, monkeypatch, capsys, ctrl_c):
    interrupt_in(monkeypatch, 0)
    assert train(world, tmp_path / "run") == 130
    assert "interrupted; there is no checkpoint yet, so the same command starts anew" in capsys.readouterr().err


# -- a folder that is in use ---------------------------------------------------------------------------------------


def test_overwriting_deletes_the_run_and_nothing_else(world, whole, tmp_path):
    folder = tmp_path / "run"
    assert train(world, folder, "--seed", 1) == 0
    (folder / "notes.txt").write_text("years of work")
    (folder / "checkpoint-of-mine").mkdir()
    (folder / "checkpoint-of-mine" / "thesis.tex").write_text("more of it")
    (folder / "model-00002-of-00002.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    assert train(world, folder, "--overwrite_output_dir", "--save_steps", 2) == 0
    assert same(weights(folder), weights(whole))
    assert (folder / "notes.txt").read_text() == "years of work" and (
        folder / "checkpoint-of-mine/thesis.tex"
    ).is_file()
    assert sorted(one.name for one in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-of-mine"]
    assert [one.name for one in folder.glob("*.safetensors")] == ["model.safetensors"]


def test_a_run_that_is_refused_deletes_nothing(world, tmp_path):
    folder = tmp_path / "run"
    assert train(world, folder) == 0
    before = weights(folder)
    assert train(world, folder, "--overwrite_output_dir", "--chat_template_path", tmp_path / "no.jinja") == 2
    assert same(weights(folder), before) and (folder / "checkpoint-2").is_dir()
    assert train(world, folder, "--overwrite_output_dir", "--model_name_or_path", folder / "checkpoint-2") == 2
    assert same(weights(folder), before) and (folder / "checkpoint-2").is_dir()
