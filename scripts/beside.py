"""Can qtarget be installed beside other trainers? Asks pip, installs nothing: benchmarks/results/beside.json.

    python scripts/beside.py [--seconds N]

Each layer of pyproject.toml is resolved together with all that a peer requires of packages with wheels, and the torch of
constraints.txt. Where pip finds none or takes longer than N seconds, only the peer's pins of SHARED are asked for, and
the record says so.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from packaging.requirements import Requirement

from lock import ROOT, bounds, pinned

RESULTS = ROOT / "benchmarks" / "results" / "beside.json"
PEERS = {"axolotl": "0.19.0", "llamafactory": "0.9.5", "ms-swift": "4.6.0"}
SHARED = ("accelerate", "datasets", "huggingface-hub", "numpy", "peft", "pydantic", "torch", "transformers", "trl")
LAYERS = {"core": ["torch>=2.11"], "train": [f"{name}{bound}" for name, bound in bounds(("train",)).items()]}


def pip(*words: str, seconds: float) -> tuple[list[dict[str, Any]], str]:
    """What pip would install, and why it would not."""
    asked = ["install", "--quiet", "--dry-run", "--ignore-installed", "--only-binary=:all:", "--report", "-", *words]
    try:
        done = subprocess.run([sys.executable, "-m", "pip", *asked], capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return [], f"pip found no answer in {seconds:g} seconds"
    if done.returncode == 0:
        return json.loads(done.stdout)["install"], ""
    said = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
    return [], said[0] if said else f"pip stopped with {done.returncode}"


def required(peer: str) -> list[Requirement]:
    """What a peer's metadata requires here, extras left out."""
    found, why = pip(f"{peer}=={PEERS[peer]}", "--no-deps", seconds=300)
    if why:
        raise SystemExit(f"{peer} {PEERS[peer]}: {why}")
    here = {"extra": ""}
    lines = map(Requirement, found[0]["metadata"].get("requires_dist", []))
    return [one for one in lines if one.marker is None or one.marker.evaluate(here)]


def beside(layer: list[str], asked: list[Requirement], seconds: float) -> dict[str, Any]:
    """The record of one layer beside one peer."""
    shared = [one for one in asked if one.name.replace("_", "-") in SHARED]
    record: dict[str, Any] = {}
    for against, lines in (("all that it requires", asked), ("its pins of what qtarget uses too", shared)):
        found, why = pip(pinned("torch"), *layer, *map(str, lines), seconds=seconds)
        if found:
            versions = {one["metadata"]["name"].lower().replace("_", "-"): one["metadata"]["version"] for one in found}
            chosen = {name: versions[name].partition("+")[0] for name in SHARED if name in versions}
            return {"resolved": True, "against": against, "versions": chosen, **record}
        record[f"why not against {against}"] = why
    return {"resolved": None if "no answer" in why else False, **record}  # None: pip was not given the time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0)
    seconds = parser.parse_args().seconds

    def answer(peer: str) -> dict[str, Any]:
        asked = required(peer)
        pins = [str(one) for one in asked if one.name.replace("_", "-") in SHARED]
        layers = {name: beside(layer, asked, seconds) for name, layer in LAYERS.items()}
        print(peer, PEERS[peer], {name: one["resolved"] for name, one in layers.items()}, flush=True)
        return {"version": PEERS[peer], "pins": sorted(pins), "layers": layers}

    with ThreadPoolExecutor() as pool:  # pip waits for the index most of the time
        found = dict(zip(PEERS, pool.map(answer, PEERS), strict=True))
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
