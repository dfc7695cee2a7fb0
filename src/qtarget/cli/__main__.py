"""``qtarget VERB``: finds the verb, and prints a user's mistake as one sentence (exit 2)."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from qtarget.errors import QTargetError

HELP = """\
qtarget: choose what each token is taught, see it, and train toward it.

usage: qtarget VERB [options]

  train      fine-tune a model toward a target:      qtarget train --config recipes/quickstart.yaml
  plan       memory, steps, operations beforehand:   qtarget plan --config FILE --gpus 8 --gpu_memory 80
  targets    the objectives, their formulas:         qtarget targets    |  qtarget targets show target-sft
  cache      a teacher asked once, kept on disk:     qtarget cache build --config FILE -o DIR
  teacher    does a teacher suit rows and student:   qtarget teacher check --config FILE
  data       the signals some targets train on:      qtarget data weights|oldlogps|critical --config FILE -o DIR
  lens       what a target teaches, token by token:  qtarget lens capture --config FILE -o DIR
  eval       sample answers to tasks and score them:  qtarget eval --model PATH --tasks gsm_symbolic -o DIR
  compare    paired differences between results:      qtarget compare DIR_A DIR_B
  verify     is it right on your model and data:     qtarget verify --config FILE
  env        versions and devices, for bug reports:  qtarget env

qtarget VERB --help tells more; --debug shows the traceback of an error; --version prints the version.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb. Returns the exit status: 0 done, 1 a check failed, 2 a fault in what was asked for, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if arguments[0] in ("--version", "version"):
        from qtarget import __version__

        print(f"qtarget {__version__}")
        return 0
    verb, rest = arguments[0], arguments[1:]
    # ``--debug`` alone asks for tracebacks; with a value it is TRL's field of that name.
    debug = any(
        word == "--debug" and (i + 1 == len(rest) or rest[i + 1].startswith("--")) for i, word in enumerate(rest)
    )
    if debug:
        rest.remove("--debug")
    try:
        return _verb(verb)(rest)
    except QTargetError as error:
        if debug:
            raise
        if int(os.environ.get("RANK", "0")) == 0:
            for fault in error.faults:
                print(f"qtarget {verb}: {fault}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of a pipe has seen enough
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        print(f"\nqtarget {verb}: interrupted", file=sys.stderr)
        return 130


def _verb(name: str):
    if name == "train":
        from qtarget.cli.train import run
    elif name == "plan":
        from qtarget.cli.plan import run
    elif name == "targets":
        from qtarget.cli.targets import run
    elif name == "lens":
        from qtarget.cli.lens import run
    elif name == "cache":
        from qtarget.cli.cache import run
    elif name == "teacher":
        from qtarget.cli.teacher import run
    elif name == "data":
        from qtarget.cli.data import run
    elif name == "eval":
        from qtarget.cli.eval import run
    elif name == "compare":
        from qtarget.cli.compare import run
    elif name == "verify":
        from qtarget.cli.verify import run
    elif name == "env":
        from qtarget.cli.env import run
    else:
        from qtarget.errors import unknown

        verbs = ("train", "plan", "targets", "cache", "teacher", "data", "lens", "eval", "compare", "verify", "env")
        raise unknown("verb", name, verbs)
    return run


if __name__ == "__main__":
    sys.exit(main())
