"""Held-out rows are read before training, and two processes still train one model: `qtarget train` under torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import teacher_caches

pytestmark = pytest.mark.distributed
WORDS = "--target sft --teacher_model_name_or_path none --optim sgd --learning_rate 0.1 --max_steps 2 --logging_steps 1"
WORDS += " --lr_scheduler_type constant --save_strategy no --gradient_checkpointing false"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return teacher_caches.write_world(tmp_path_factory.mktemp("held_out"))


def train(world: Path, folder: Path, processes: int, *more: str) -> tuple[dict, list[dict]]:
    """Figures before training, and the lines of the log."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    words = ["--config", str(world / "config.yaml"), "--output_dir", str(folder), *WORDS.split(), *more]
    words += ["--per_device_train_batch_size", str(4 // processes)]
    done = subprocess.run(
        [*launch, "-m", "qtarget", "train", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    before = json.loads((folder / "before_after.json").read_text())["before"]
    return before, [line for line in history if "grad_norm" in line]


@pytest.mark.parametrize("bf16, allowed", [("false", 1e-5), ("true", 1e-2)], ids=["float32", "bf16"])
def test_the_gradient_is_that_of_one_process(bf16, allowed, world, tmp_path):
    alone = train(world, tmp_path / "one", 1, "--bf16", bf16)
    both = train(world, tmp_path / "two", 2, "--bf16", bf16)
    assert both[0]["nll"] == pytest.approx(alone[0]["nll"], rel=allowed)
    for name in ("grad_norm", "nll", "supervised_tokens"):
        values = [[line[name] for line in lines] for _, lines in (alone, both)]
        assert values[1] == pytest.approx(values[0], rel=allowed), name
