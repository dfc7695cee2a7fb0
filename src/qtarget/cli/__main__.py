"""``qtarget VERB``: finds the verb, and prints a user's mistake as one sentence (exit 2)."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from qtarget import own_code
from qtarget.cli import terminal
from qtarget.errors import MissingPackage, QTargetError, importing, unknown

# verb → (what it does, an example)
VERBS = {
    "train": ("fine-tune a model toward a target", "qtarget train --config recipes/quickstart.yaml"),
    "plan": ("memory, steps and operations of a run", "qtarget plan --config FILE --gpus 8 --gpu_memory 80"),
    "targets": ("the targets and their formulas", "qtarget targets    |  qtarget targets show|compare NAME"),
    "cache": ("a teacher's answers, kept on disk", "qtarget cache build --config FILE -o DIR"),
    "teacher": ("check a teacher for rows and student", "qtarget teacher check --config FILE"),
    "data": ("columns that some targets need", "qtarget data weights|oldlogps|critical --config FILE -o DIR"),
    "lens": ("what a target teaches, token by token", "qtarget lens capture --config FILE -o DIR"),
    "chat": ("chat with a model or an adapter", "qtarget chat PATH    |  qtarget chat PATH --prompt TEXT"),
    "eval": ("sample answers to tasks and score them", "qtarget eval --model PATH --tasks gsm_symbolic -o DIR"),
    "compare": ("compare results, problem by problem", "qtarget compare DIR_A DIR_B"),
    "merge": ("merge an adapter into its base", "qtarget merge ADAPTER -o DIR"),
    "verify": ("check qtarget on your model and data", "qtarget verify --config FILE"),
    "env": ("versions and devices, for bug reports", "qtarget env"),
}


HELP = f"""\
qtarget: choose what each token is taught, see it, and train toward it.

usage: qtarget VERB [options]

{"".join(f"  {verb:<10} {f'{about}:':<40} {example}" + chr(10) for verb, (about, example) in VERBS.items())}
qtarget VERB --help shows its options; --debug shows the traceback of an error; --version prints the version.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb.

    Returns:
        The exit status: 0 done, 1 a check failed or a file beside the weights is missing, 2 a fault in what was asked
        for, 130 interrupted.
    """
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
    own_code.FOLDERS.set((os.getcwd(),))
    if not terminal.has_bars():  # read when these libraries are imported; in a file a bar would be a thousand lines
        for library in ("HF_HUB", "HF_DATASETS"):  # Transformers asks the hub's
            os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")
    try:
        if verb not in VERBS:
            raise unknown("verb", verb, VERBS)
        with importing(f"qtarget {verb}"):
            return importlib.import_module(f"qtarget.cli.verbs.{verb}").VERB(rest)
    except QTargetError as error:
        if debug:
            raise
        if terminal.is_main():
            subject = "" if isinstance(error, MissingPackage) else f"qtarget {verb}: "
            for fault in error.faults:
                print(f"{subject}{fault}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of a pipe has seen enough
        sys.stderr.close()
        return 0
    except KeyboardInterrupt as interrupt:
        if terminal.is_main():
            print(f"\nqtarget {verb}: {interrupt if interrupt.args else 'interrupted'}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
