"""The scripts of ``examples/trainers`` train as ``QTargetTrainer`` does: same rows, order, optimiser; same weights."""

import ast

import pytest

import tiny_models
from quick_runs import assert_same_change
from trainer_scripts import by_our_trainer, change_by_script, rows_in_order, run_script, write_inputs

ROWS = 12  # three steps of four
SCHEDULE = {"preset": "beyond-log", "alpha": {"schedule": "linear", "from": 0.5, "to": 1.5}}


@pytest.mark.parametrize("target", ["dft", SCHEDULE], ids=["dft", "schedule"])
def test_transformers_trainer(tmp_path, target):
    write_inputs(tmp_path, ROWS)
    run_script("transformers_trainer.py", tmp_path, repr(target))
    _, ours = by_our_trainer(tmp_path, tiny_models.conversation_dataset(ROWS), target=target)
    assert_same_change(change_by_script(tmp_path), ours)


@pytest.mark.parametrize("target", ["dft", SCHEDULE], ids=["dft", "schedule"])
@pytest.mark.parametrize("name", ["pytorch_loop.py", "accelerate_loop.py"])
def test_loops(tmp_path, capsys, name, target):
    write_inputs(tmp_path, ROWS)
    run_script(name, tmp_path, repr(target))
    printed = [ast.literal_eval(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{'step'")]
    trainer, ours = by_our_trainer(tmp_path, rows_in_order(ROWS), target=target, train_sampling_strategy="sequential")
    assert_same_change(change_by_script(tmp_path), ours)
    logged = [line for line in trainer.state.log_history if "nll" in line]
    assert len(printed) == len(logged) == 3
    for line, wanted in zip(printed, logged, strict=True):
        found = {name: line[name] for name in ("loss", "nll", "trust", "update", "entropy", "accuracy")}
        assert found == pytest.approx({name: wanted[name] for name in found}, rel=1e-5)
