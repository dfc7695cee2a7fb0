"""DeepSpeed's ZeRO-2 and ZeRO-3 train as one process does, where DeepSpeed is installed (it is not in the lock)."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]
HERE = Path(__file__).parent


@pytest.mark.parametrize("stage", [2, 3])
def test_ten_steps(stage, tmp_path):
    """‖difference of ten steps‖ / ‖ten steps‖ in float32; the head gathered inside ZeRO-3's own context."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(HERE / "zero.py"), str(stage), str(tmp_path / "found.json")],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),  # ninja
            "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]),
        },
        timeout=3600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    error, weight = json.loads((tmp_path / "found.json").read_text())
    assert error <= 2e-4, weight
