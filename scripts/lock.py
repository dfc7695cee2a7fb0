"""Writes locks/lowest.txt and locks/latest.txt: the ends of what pyproject.toml allows, as pip resolves them here.

    python scripts/lock.py [lowest | latest]

Lowest: each package that pyproject.toml names stands at its lower bound, what these bring at the newest that fits.
Latest: all at the newest within the bounds. torch is the one of constraints.txt in both, the only one to be had in a
CPU build, and pytest too. Python 3.11 writes both. Another Python writes the latest only, locks/latest-3.13.txt, as some
packages have no wheel for it at their lower bound.
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
PYTHON = (3, 11)  # of constraints.txt and of the two locks without a Python in their names
TOOLS = ("torch", "pytest", "triton")  # at the version of constraints.txt; TRL 1.15 has losses that need triton


def name(end: str) -> str:
    """The lock of an end under this Python: ``latest``, or ``latest-3.13``."""
    here = sys.version_info[:2]
    return end if here == PYTHON else f"{end}-{here[0]}.{here[1]}"


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
    """``name==version`` of all that pip would install, CUDA libraries left out: they come with torch where it needs them.

    Raises CalledProcessError where nothing fits.
    """
    words = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-"]
    done = subprocess.run([*words, *asked], stdout=subprocess.PIPE, check=True, text=True)
    found = (entry["metadata"] for entry in json.loads(done.stdout)["install"])
    lines = (f"{one['name']}=={one['version'].partition('+')[0]}" for one in found)
    return sorted((line for line in lines if not re.match("(nvidia|cuda)-", line)), key=str.casefold)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("end", nargs="?", choices=("lowest", "latest"), help="one of them only")
    asked = parser.parse_args().end
    ends = ["lowest", "latest"] if sys.version_info[:2] == PYTHON else ["latest"]
    LOCKS.mkdir(exist_ok=True)
    for end in [asked] if asked else ends:
        python = ".".join(map(str, sys.version_info[:2]))
        lines = [
            f"# The {end} versions that pyproject.toml allows on Python {python}, written by scripts/lock.py.",
            *resolved(wanted(end)),
        ]
        (LOCKS / f"{name(end)}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"locks/{name(end)}.txt: {len(lines) - 1} packages")


if __name__ == "__main__":
    main()
