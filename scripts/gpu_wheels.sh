#!/bin/sh
# Wheels for a rented GPU machine that has torch, triton, transformers and accelerate of its own and no package index.
#
#   sh scripts/gpu_wheels.sh [folder]              default build/gpu_wheels
#   PYTHON_VERSION=3.12 sh scripts/gpu_wheels.sh   of the machine there, when it is not 3.12
#   EXTRA="pyarrow==26.0.1" sh scripts/gpu_wheels.sh   what that machine lacks besides
#
# Nothing is resolved: --no-deps, with the versions of constraints.txt where it pins one. Prints the folder's size and the
# line that installs it there.
set -eu
cd "$(dirname "$0")/.."

folder=${1:-build/gpu_wheels}
PYTHON=${PYTHON:-.venv/bin/python}
[ -x "$PYTHON" ] || command -v "$PYTHON" >/dev/null || PYTHON=python3
PYTHON_VERSION=${PYTHON_VERSION:-3.12}
pinned() { sed -n "s/^$1==\([^ ;]*\).*/\1/p" constraints.txt; }
stop() { printf 'gpu_wheels: %s\n' "$*" >&2; exit 1; }

# The trainers of the run: TRL, the transformers it is tested with, datasets and what it imports. The peers: Liger's and
# Apple's kernels.
names="trl transformers datasets dill multiprocess xxhash rich requests jinja2 liger-kernel cut-cross-entropy"

rm -rf "$folder"
mkdir -p "$folder"
wanted=
for name in $names; do
    version=$(pinned "$name")
    wanted="$wanted $name${version:+==$version}"
done
# pip takes a wheel's manylinux number exactly
platforms=
for number in 39 35 34 31 28 27 24; do platforms="$platforms --platform manylinux_2_${number}_x86_64"; done
platforms="$platforms --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64"

# shellcheck disable=SC2086  # lists of words
for one in $wanted ${EXTRA:-}; do
    "$PYTHON" -m pip --disable-pip-version-check download -qq --no-deps --only-binary=:all: \
        --implementation cp --python-version "$PYTHON_VERSION" $platforms -d "$folder" "$one" 2>"$folder/.said" ||
        stop "$one: $(tail -n 1 "$folder/.said")"
done
rm -f "$folder/.said"

ls -1sh "$folder"
printf '\n%s: %s wheels, %s\n' "$folder" "$(ls "$folder" | wc -l)" "$(du -sh "$folder" | cut -f1)"
printf 'asked of what is installed there:\n'
"$PYTHON" - "$folder" <<'END'
import re, sys, zipfile
from pathlib import Path

found, needs = set(), {}
for wheel in Path(sys.argv[1]).glob("*.whl"):
    found.add(wheel.name.split("-")[0].lower().replace("_", "-"))
    inside = zipfile.ZipFile(wheel)
    (metadata,) = [name for name in inside.namelist() if name.endswith(".dist-info/METADATA")]
    for line in inside.read(metadata).decode().splitlines():
        match = re.match(r"Requires-Dist: ([A-Za-z0-9._-]+) *\(?([^;)]*)", line)
        if match and ";" not in line:
            needs.setdefault(match[1].lower().replace("_", "-"), set()).add(match[2].strip())
for name in sorted(set(needs) - found):
    print("  " + name, *sorted(filter(None, needs[name])))
END
printf '\nthere, beside it:\n\n'
printf '  python3 -m pip install -q --no-index --no-deps --find-links %s --target /tmp/gpu_site %s/*.whl\n' "$folder" "$folder"
printf '  PYTHONPATH=/tmp/gpu_site:src python3 benchmarks/gpu.py --out gpu.json\n'
