"""Runs the trainer's tests at an end of the versions that qtarget allows: benchmarks/results/versions.json.

    python scripts/versions.py lowest|latest TEST ...

locks/lowest.txt or locks/latest.txt is installed into an environment of its own, build/lowest or build/latest. A Python
other than 3.11 goes on record under a name of its own, and takes a lock of its own where there is one
(locks/latest-3.13.txt). Exits with 1 where a test fails. Fewer tests of a run go on record too: the record names them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from environments import create, install_torch, pip
from lock import EXTRAS, LOCKS, ROOT, bounds, name

RESULTS = ROOT / "benchmarks" / "results" / "versions.json"
PATHS = ("src", "tests/helpers", "benchmarks", "scripts")


def environment(name: str, lock: Path) -> Path:
    """The Python of the environment, made anew where the lock is another."""
    folder = ROOT / "build" / name
    made, python = folder / "lock.txt", folder / "bin" / "python"
    if made.exists() and made.read_text(encoding="utf-8") == lock.read_text(encoding="utf-8"):
        return python
    shutil.rmtree(folder, ignore_errors=True)
    create(folder)
    torch = re.findall(r"^torch==\S+", lock.read_text(encoding="utf-8"), re.M)[0]
    print(f"{torch}: {install_torch(python, torch, lock)}", flush=True)
    subprocess.run(pip(python, "--no-deps", "--requirement", str(lock)), check=True)
    shutil.copy(lock, made)
    return python


def counted(report: Path) -> dict[str, object]:
    """What pytest's XML tells: how many tests passed, failed and were skipped, and which failed."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    return {
        "passed": len(cases) - len(failed) - len(skipped),
        "failed": len(failed),
        "skipped": len(skipped),
        "failures": [f"{case.get('classname')}::{case.get('name')}" for case in failed],
    }


def installed(python: Path) -> dict[str, str]:
    """The versions that the tests ran with, of what pyproject.toml names."""
    names = ["torch", *bounds(EXTRAS)]
    code = f"import json, importlib.metadata as m; print(json.dumps({{n: m.version(n) for n in {names!r}}}))"
    versions = json.loads(subprocess.run([str(python), "-c", code], capture_output=True, check=True, text=True).stdout)
    return {name: version.partition("+")[0] for name, version in versions.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("end", choices=("lowest", "latest"))
    parser.add_argument("tests", nargs="+")
    options = parser.parse_args()
    named = name(options.end)
    lock = next(path for one in (named, options.end) if (path := LOCKS / f"{one}.txt").exists())
    python, report = environment(named, lock), ROOT / "build" / f"{named}.xml"
    report.unlink(missing_ok=True)
    paths = os.pathsep.join(str(ROOT / path) for path in PATHS)
    done = subprocess.run(
        [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *options.tests],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths},
    )
    if not report.exists():
        print(
            f"pytest stopped with {done.returncode} before it wrote {report}; nothing goes on record", file=sys.stderr
        )
        return 1
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    version = ".".join(map(str, sys.version_info[:3]))
    found[named] = {
        "python": version,
        "lock": str(lock.relative_to(ROOT)),
        "versions": installed(python),
        "tests": options.tests,
        **counted(report),
    }
    RESULTS.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"{named}: {RESULTS.relative_to(ROOT)}")
    return int(done.returncode != 0)


if __name__ == "__main__":
    sys.exit(main())
