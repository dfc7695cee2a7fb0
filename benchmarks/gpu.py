"""The engine on a GPU: is it right, does it wait for the device, and how long does it take beside the matmuls it needs.

    make gpu-bench                               # everything, ten minutes at most; writes benchmarks/results/gpu.json
    make gpu-check                               # correctness alone: versions, compiled kernels, every published case,
                                                 # host reads, NVIDIA's memory and race checkers
    python benchmarks/gpu.py --only time --out build/gpu.json

On a card of your own: NVIDIA, compute capability 8.0 or newer, with `make env` done; `make gpu-bench`. Peers that are
not installed are named and left out: pip install liger-kernel cut-cross-entropy. Shapes that do not fit the card are
named, too.

On a rented machine without a package index, from a source tree and with a torch of its own: here

    sh scripts/gpu_wheels.sh                     # gathers build/gpu_wheels and prints the line that installs them there

then there, in the tree, with PYTHONPATH=src:

    python benchmarks/gpu.py --out gpu.json

The file carries the device's name and every version. From a card that no results name yet it is welcome: open an issue
in the repository with the file attached, or a pull request that adds it as benchmarks/results/gpu_<card>.json. A failure
tells more than a pass.

Each part runs in a process of its own with a deadline, and results are written as they come. Exit status: 0 nothing
failed; 1 a wrong number, a crash, or a limit missed; 3 nothing failed, but parts were cut or not reached.

Without a CUDA device the kernels run in Triton's interpreter against the oracle, and are compiled for compute capability
8.0 and 9.0.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
for folder in ("tests/helpers", "benchmarks", "src"):
    if str(ROOT / folder) not in sys.path:
        sys.path.insert(0, str(ROOT / folder))
# This process asks the driver for a device without opening it, so that its forks can.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import torch  # noqa: E402
from gpu_run import (  # noqa: E402
    compiling,
    correctness,
    environment,
    host_reads,
    interpreter,
    kernels_alone,
    profiled,
    sweep,
    timing,
    training,
)
from gpu_run.driver import run_parts  # noqa: E402
from gpu_run.record import Found, Part, Record, Settings  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "gpu.json"
TOTAL_SECONDS = 600.0
PARTS = (
    Part("environment", environment.run, 15),
    Part("compile", compiling.run, 60),
    Part("correctness", correctness.run, 75, background=host_reads.start_checkers),
    Part("host reads", host_reads.run, 20),
    Part("kernels", kernels_alone.run, 40),
    Part("sweep", sweep.run, 30),
    Part("time", timing.run, 150),
    Part("training", training.run, 90),
    Part("profile", profiled.run, 25),
    Part("bytes", profiled.count_bytes, 45),
)
CHECKED = ("environment", "compile", "correctness", "host reads")
# Where nothing else waits for its turn, a slower card has time for every case.
CHECK_TIMES = 3.0
WITHOUT_DEVICE = (Part("interpreter", interpreter.run, 60), Part("compile", compiling.run, 180))
NO_DEVICE = "No CUDA device is here: the kernels run in Triton's interpreter and are compiled ahead; nothing is timed."
NO_TRITON = "triton is not installed, so the kernels can be neither run nor compiled: pip install triton"


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="correctness alone, without times")
    parser.add_argument("--only", nargs="+", metavar="PART", help=f"some of: {', '.join(part.name for part in PARTS)}")
    parser.add_argument("--out", type=Path, default=None, help=f"where results go (default {RESULTS})")
    # every part on the CPU with tiny shapes, but what needs CUDA: for tests of the parts themselves
    parser.add_argument("--smoke", action="store_true", help=argparse.SUPPRESS)
    # seconds instead of a part's own: correctness=2.5
    parser.add_argument("--deadline", nargs="+", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=None, help=argparse.SUPPRESS)
    # what other programs look at
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--counted", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--warm", metavar="METHOD", help=argparse.SUPPRESS)
    return parser.parse_args(given)


def has_device() -> bool:
    """Whether CUDA can be used, asked in a process of its own."""
    probe = "import torch; raise SystemExit(not torch.cuda.is_available())"
    return torch.version.cuda is not None and subprocess.run([sys.executable, "-c", probe]).returncode == 0


def chosen_parts(args: argparse.Namespace, device: bool) -> list[Part]:
    if args.smoke or device:
        parts = [part for part in PARTS if not args.check or part.name in CHECKED]
    else:
        parts = list(WITHOUT_DEVICE)
    if args.only:
        unknown = [name for name in args.only if name not in [part.name for part in parts]]
        if unknown:
            raise SystemExit(f"--only {unknown[0]!r}: use some of {', '.join(part.name for part in parts)}")
        parts = [part for part in parts if part.name in args.only]
    seconds = {name: float(number) for name, number in (given.split("=") for given in args.deadline)}
    longer = CHECK_TIMES if args.check and device else 1.0
    waited_for = any(part.name == "host reads" for part in parts)
    return [
        replace(
            part,
            seconds=seconds.get(part.name, part.seconds * longer),
            background=part.background if waited_for else None,
        )
        for part in parts
    ]


def beside(args: argparse.Namespace, device: torch.device) -> None:
    """What other programs look at while it runs, or what runs ahead."""
    if args.tiny:
        host_reads.tiny(device)
    elif args.counted:
        profiled.counted(device)
    else:
        compiling.warm(args.warm)


def main(given: list[str] | None = None) -> int:
    args = arguments(given)
    if args.tiny or args.counted or args.warm:
        beside(args, torch.device("cuda"))
        return 0
    device = not args.smoke and has_device()
    if not args.smoke and not device:
        print(NO_DEVICE)
    if not args.smoke and importlib.util.find_spec("triton") is None:
        print(NO_TRITON)
        return 0 if not device else 1
    parts = chosen_parts(args, device)
    out = args.out or (RESULTS if device else ROOT / "build" / "gpu.json")
    about = {"what": "qtarget on a GPU", "check": args.check, **environment.about(device)}
    record = Record(out, about, [Found(part.name, part.seconds) for part in parts])
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(torch.device("cuda" if device else "cpu"), args.smoke, Path(folder), args.check)
        total = TOTAL_SECONDS if not args.check else sum(part.seconds for part in parts)
        run_parts(parts, settings, record, args.seconds or total)
    record.print_table()
    if record.failures:
        return 1
    return 3 if record.unfinished else 0


if __name__ == "__main__":
    sys.exit(main())
