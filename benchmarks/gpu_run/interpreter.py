"""The kernels in Triton's interpreter, on a CPU in float64, against the oracle: their formulas, masks and glue.

Run as a program of its own with TRITON_INTERPRET=1, since Triton reads that when it is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from gpu_run.record import Talk

AGREE = 1e-10
CASES = ("dft", "eaft", "gem:beta=0.7,h=logsigmoid", "label-smoothing", "cft", "kd:temperature=2.0", "target-sft")


def run(talk: Talk) -> None:
    """A handful of presets, gradients included, in a subprocess."""
    entry = Path(__file__).parent.parent
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(entry), *filter(None, sys.path)])
    command = [sys.executable, "-W", "ignore", "-m", "gpu_run.interpreter"]
    child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stderr is not None
    told = 0
    for line in child.stdout:
        found = json.loads(line)
        told += 1
        talk.row(f"interpreter, {found['name']}", error=found["error"])
        if not found["error"] <= AGREE:
            talk.fail(f"interpreter, {found['name']}: off by {found['error']:.3g}; {AGREE:g} is allowed")
    said = child.stderr.read()
    if child.wait() or told != len(CASES):
        talk.fail(f"the interpreter ended with {child.returncode} after {told} of {len(CASES)} cases: {said[-600:]}")


def main() -> None:
    """Print the largest error of each case, gradients and loss, as a line of JSON."""
    import torch

    from engine_and_oracle import case_named, hard_batch, preset_of, relative_error, run_engine, run_oracle

    torch.set_num_threads(1)
    for name in CASES:
        batch, target = hard_batch(), preset_of(case_named(name))
        truth = run_oracle(batch, target, reduction="sum")
        got = run_engine(batch, target, reduction="sum", backend="triton")
        pairs = [(got.gradients[key], right) for key, right in truth.gradients.items() if right is not None]
        errors = [relative_error(mine, right) for mine, right in [*pairs, (got.loss, truth.loss)]]
        print(json.dumps({"name": name, "error": max(errors)}), flush=True)


if __name__ == "__main__":
    main()
