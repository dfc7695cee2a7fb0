"""``apply_target`` under DDP and FSDP2: two processes give the gradients of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.distributed
HELPERS = Path(__file__).parents[1] / "helpers"


def test_two_processes_give_the_gradients_of_one(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(HELPERS / "applied_processes.py"), str(tmp_path / "errors.json")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HELPERS), *sys.path])},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((tmp_path / "errors.json").read_text())
    assert len(found) == 9
    assert max(found.values()) < 1e-9, found
