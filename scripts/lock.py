"""Writes locks/lowest.txt and locks/latest.txt: the ends of what pyproject.toml allows, as pip resolves them here.

    python scripts/lock.py [lowest] [latest]

Lowest: each package that pyproject.toml names stands at its lower bound, what these bring at the newest that fits.
Latest: all at the newest within the bounds. torch is the one of constraints.txt in both, the only one to be had in a
CPU build, and pytest too.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "locks"
EXTRAS = ("train", "peft", "plots", "server")  # what the trainer's tests run with
TOOLS = ("torch", "pytest", "triton")  # at the version of constraints.txt; TRL 1.15 has losses that need triton


def bounds(extras: tuple[str, ...] = EXTRAS) -> dict[str, str]:
    """Package → what pyproject.toml says of its versions, of these extras; torch's left out."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = [line for extra in extras for line in project["optional-dependencies"][extra]]
    pairs = (re.fullmatch(r"([\w-]+)(.*)", line) for line in named if not line.startswith("qtarget["))
    return {pair[1]: pair[2] for pair in pairs if pair}


def pinned(name: str) -> str:
    """``name==version`` as constraints.txt has it."""
    (line,) = re.findall(rf"^{name}==\S+", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)
    return line


def wanted(end: str) -> list[str]:
    """What pip is asked for."""
    asked = bounds()
    if end == "lowest":
        asked = {name: re.sub(r">=([^,]+).*", r"==\1", bound) for name, bound in asked.items()}
    return [*(f"{name}{bound}" for name, bound in asked.items()), *map(pinned, TOOLS)]


def resolved(asked: list[str]) -> list[str]:
    """``name==version`` of all that pip would install. Raises CalledProcessError where nothing fits."""
    words = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-"]
    done = subprocess.run([*words, *asked], stdout=subprocess.PIPE, check=True, text=True)
    found = (entry["metadata"] for entry in json.loads(done.stdout)["install"])
    return sorted((f"{one['name']}=={one['version'].partition('+')[0]}" for one in found), key=str.casefold)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ends", nargs="*", default=["lowest", "latest"], choices=("lowest", "latest"))
    LOCKS.mkdir(exist_ok=True)
    for end in parser.parse_args().ends:
        lines = [
            f"# The {end} versions that pyproject.toml allows, written by scripts/lock.py.",
            *resolved(wanted(end)),
        ]
        (LOCKS / f"{end}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"locks/{end}.txt: {len(lines) - 1} packages")


if __name__ == "__main__":
    main()
