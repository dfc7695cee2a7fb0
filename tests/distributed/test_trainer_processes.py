"""Two processes give the gradient of one: DDP through the trainer, FSDP2 through torch's own ``fully_shard``."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.distributed
HERE = Path(__file__).parents[1] / "helpers"


def errors(kind: str, folder: Path) -> dict[str, tuple[float, str]]:
    """Case → (relative error against autograd, the weight that has it), from one start of two processes."""
    out = folder / "errors.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(HERE / "two_process_training.py"), kind, str(out)],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]),  # this checkout, also where another is installed
            "QTARGET_TEST_CACHE": str(folder / "caches"),
        },
        timeout=3600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


def check(found: dict[str, tuple[float, str]], allowed: float, cases: int) -> None:
    mutants = {case: error for case, error in found.items() if case.startswith("mutant")}
    real = {case: error for case, error in found.items() if case not in mutants}
    assert len(real) == cases
    worse = {case: error for case, error in real.items() if not error[0] <= allowed}
    assert not worse, worse
    unseen = {case: error for case, error in mutants.items() if error[0] <= allowed}
    assert not unseen, unseen


def test_ddp(tmp_path):
    """Eight objectives in five layouts, one, two and four micro-batches a process."""
    found = errors("ddp", tmp_path)
    map_of_both = {"map of both": found.pop("map of both")}
    cached = {case: found.pop(case) for case in [*found] if case.startswith("cached")}
    check(cached, 1e-6, cases=4 * 2)  # a cache keeps float32
    check(found, 1e-10, cases=5 * 8 * 3)
    check(map_of_both, 1e-6, cases=1)  # the map keeps float32


def test_fsdp2(tmp_path):
    """The same, the head in the root group, in its own and in the last norm's; teacher and reference sharded too."""
    check(errors("fsdp2", tmp_path), 1e-10, cases=3 * (5 * 2 * 8 + 7 + 5) + 3 * 4)


def test_fsdp2_under_bf16(tmp_path):
    """Gradients as near as bfloat16 carries them; columns to the last digit, which a dataclass would lose."""
    found = errors("fsdp2_bf16", tmp_path)
    digits = {case: error for case, error in found.items() if case.startswith(("digits", "mutant"))}
    check({case: error for case, error in found.items() if case not in digits}, 0.25, cases=7 * 3)
    check(digits, 1e-6, cases=2)
