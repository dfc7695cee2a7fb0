"""Runs several qtarget commands in one process, since each process imports torch and TRL again.

Reads a JSON list of argument lists from stdin, writes a JSON list of [status, stdout, stderr].
"""

import contextlib
import io
import json
import sys
import traceback

from qtarget.cli.__main__ import main

answers = []
for arguments in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(arguments)
        except BaseException:
            status = 1
            traceback.print_exc()
    answers.append([status, out.getvalue(), err.getvalue()])
json.dump(answers, sys.stdout)
