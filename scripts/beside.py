"""Can qtarget be installed beside other trainers? Asks pip, installs nothing: benchmarks/results/beside.json.

    python scripts/beside.py [--seconds N] [PEER ...]

Each layer of pyproject.toml is resolved together with all that a peer requires, and the torch of constraints.txt. Where
pip finds no answer or takes longer than N seconds, only the peer's pins of SHARED are asked for, and the record says so.
Packages come as wheels; one that exists as source only is built for its metadata, and named. What pip was asked and what
it said is in benchmarks/results/beside/PEER-LAYER.txt.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from lock import ROOT, bounds, pinned

RESULTS = ROOT / "benchmarks" / "results" / "beside.json"
SAID = RESULTS.with_suffix("")
PEERS = {"axolotl": "0.19.0", "llamafactory": "0.9.5", "ms-swift": "4.6.0"}
SHARED = ("accelerate", "datasets", "huggingface-hub", "numpy", "peft", "pydantic", "torch", "transformers", "trl")
LAYERS = {"core": ["torch>=2.11"], "train": [f"{name}{bound}" for name, bound in bounds(("train",)).items()]}


@dataclass
class Answer:
    """What pip would install, or why it would not.

    Attributes:
        from_source: packages that are no wheels. said: the command, and pip's own last words.
    """

    found: list[dict[str, Any]]
    why: str
    from_source: list[str]
    said: str


def pip(*words: str, seconds: float) -> Answer:
    """Ask pip, within so many seconds in all."""
    ends, from_source = time.monotonic() + seconds, list[str]()
    while True:
        asked = ["install", "--dry-run", "--ignore-installed", "--only-binary=:all:"]
        asked += [*([f"--no-binary={','.join(from_source)}"] if from_source else []), *words]
        shown = f"$ pip {shlex.join(asked)}\n"
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.json"
            command = [sys.executable, "-m", "pip", *asked, "--progress-bar=off", f"--report={report}"]
            try:
                left = max(1.0, ends - time.monotonic())
                done = subprocess.run(command, capture_output=True, text=True, timeout=left)
            except subprocess.TimeoutExpired:
                why = f"pip found no answer in {seconds:g} seconds"
                return Answer([], why, from_source, shown + why)
            if done.returncode == 0:
                last = done.stdout.strip().splitlines()[-1]  # Would install ...
                return Answer(json.loads(report.read_text())["install"], "", from_source, shown + last)
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        unseen = re.search(r"the requirement ([\w.-]+).*\(from versions: none\)", done.stderr)
        if unseen is None or unseen[1] in from_source:
            conflict = re.search(r"^The conflict is caused by:\n(?: .*\n)+", done.stdout + done.stderr, re.M)
            why = said[0].removeprefix("ERROR: ") if said else f"pip stopped with {done.returncode}"
            return Answer([], why, from_source, shown + "\n".join([*said, conflict[0].strip() if conflict else ""]))
        from_source.append(unseen[1])


def required(peer: str) -> list[Requirement]:
    """What a peer's metadata requires here, extras left out."""
    answer = pip(f"{peer}=={PEERS[peer]}", "--no-deps", seconds=300)
    if answer.why:
        raise SystemExit(f"{peer} {PEERS[peer]}: {answer.why}")
    here = {"extra": ""}
    lines = map(Requirement, answer.found[0]["metadata"].get("requires_dist", []))
    return [one for one in lines if one.marker is None or one.marker.evaluate(here)]


def beside(peer: str, name: str, asked: list[Requirement], seconds: float) -> dict[str, Any]:
    """The record of one layer beside one peer."""
    shared = [one for one in asked if one.name.replace("_", "-") in SHARED]
    record: dict[str, Any] = {}
    said = []
    for against, lines in (("all that it requires", asked), ("its pins of what qtarget uses too", shared)):
        answer = pip(pinned("torch"), *LAYERS[name], *map(str, lines), seconds=seconds)
        said.append(answer.said.strip())
        if answer.found:
            pairs = (one["metadata"] for one in answer.found)
            versions = {one["name"].lower().replace("_", "-"): one["version"].partition("+")[0] for one in pairs}
            chosen = {package: versions[package] for package in SHARED if package in versions}
            record = {"resolved": True, "against": against, "from source": answer.from_source} | record
            record["versions"] = chosen
            break
        record[f"why not against {against}"] = answer.why
    else:
        record = {"resolved": None if "no answer" in answer.why else False} | record  # None: pip was not given the time
    SAID.mkdir(exist_ok=True)
    (SAID / f"{peer}-{name}.txt").write_text("\n\n".join(said) + "\n", encoding="utf-8")
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("peers", nargs="*", help=f"of {', '.join(PEERS)}; all, where none is named")
    options = parser.parse_args()
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for peer in options.peers or PEERS:
        asked = required(peer)
        pins = [str(one) for one in asked if one.name.replace("_", "-") in SHARED]
        layers = {name: beside(peer, name, asked, options.seconds) for name in LAYERS}
        print(peer, PEERS[peer], {name: one["resolved"] for name, one in layers.items()}, flush=True)
        found[peer] = {"version": PEERS[peer], "pins": sorted(pins), "layers": layers}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
