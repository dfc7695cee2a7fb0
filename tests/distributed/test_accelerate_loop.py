"""``examples/trainers/accelerate_loop.py`` in two processes: the weights of ``QTargetTrainer`` in one."""

import ast
import os
import subprocess
import sys

import pytest

from quick_runs import assert_same_change
from trainer_scripts import by_our_trainer, change_by_script, prepare_script, rows_in_order, write_inputs

pytestmark = pytest.mark.distributed
ROWS = 24  # three steps of two processes' two micro-batches of two


def test_two_processes_train_as_one(tmp_path):
    write_inputs(tmp_path, ROWS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, *prepare_script("accelerate_loop.py", tmp_path)],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    printed = [ast.literal_eval(line) for line in done.stdout.splitlines() if line.startswith("{'step'")]
    trainer, ours = by_our_trainer(
        tmp_path,
        rows_in_order(ROWS),
        target="dft",
        gradient_accumulation_steps=4,
        train_sampling_strategy="sequential",
    )
    assert_same_change(change_by_script(tmp_path), ours)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert [line["loss"] for line in printed] == pytest.approx(losses, rel=1e-5)
