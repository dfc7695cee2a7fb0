"""What a terminal shows of what was written to it, and programs that write to a real one."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios

# What rich and tqdm write beside text: line feed, carriage return, cursor up, erase the line, and colours.
_PARTS = re.compile(r"\x1b\[(\??[0-9;]*)([A-Za-z])|(\n)|(\r)|([^\x1b\n\r]+)")


def lines(written: str) -> list[str]:
    """The lines that stand there at the end, on a screen that is as high as they are many."""
    rows, row, column = [""], 0, 0
    for argument, command, feed, start, text in _PARTS.findall(written):
        if feed:
            row += 1
            rows += [""] * (row == len(rows))
        elif start:
            column = 0
        elif text:
            rows[row] = rows[row][:column].ljust(column) + text + rows[row][column + len(text) :]
            column += len(text)
        elif command == "A":
            row -= int(argument or 1)
        elif command == "K":
            rows[row] = ""
        else:
            assert command in "mhl", f"an unknown command {command!r}"
    return [line.rstrip() for line in rows]


def run(command: list[str], columns: int = 80, **environment: str) -> tuple[int, str]:
    """(exit status, all that was written) of a program whose output is a terminal of that width."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    # What runs in this process sets the first two, as its own output is no terminal.
    unset = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "COLUMNS", "NO_COLOR", "FORCE_COLOR")
    inherited = {name: value for name, value in os.environ.items() if name not in unset}
    child = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env={**inherited, "TERM": "xterm-256color", **environment}
    )
    os.close(theirs)
    parts = []
    try:
        while part := os.read(ours, 65536):
            parts.append(part)
    except OSError:  # the other end is closed
        pass
    finally:
        os.close(ours)
    return child.wait(timeout=60), b"".join(parts).decode()
