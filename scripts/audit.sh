#!/bin/sh
# Known vulnerabilities of what constraints.txt pins. Run by make audit.
#
# pip-audit is installed into a folder that is deleted at the end. Nothing of the project is installed or run: the names
# and versions go to an advisory service. Exit status: 0 none known, 1 some (they are listed), 3 nothing could be asked.
set -eu
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT INT TERM
offline() { printf 'audit: %s; nothing was checked. With a network: make audit\n' "$*" >&2; exit 3; }

"$PYTHON" -m venv "$folder/venv" || offline "no environment could be made with $PYTHON"
"$folder/venv/bin/python" -m pip install -qq --disable-pip-version-check pip-audit ||
    offline "pip-audit could not be installed from the package index"
grep -v '^#' constraints.txt > "$folder/pinned.txt"

# --no-deps and --disable-pip: the lock is whole, so nothing is resolved, downloaded or built.
set +e
"$folder/venv/bin/pip-audit" --requirement "$folder/pinned.txt" --no-deps --disable-pip --progress-spinner off \
    > "$folder/report" 2>&1
status=$?
set -e
asked=$(grep -c '==' "$folder/pinned.txt")
unknown=$(grep -c 'could not be audited' "$folder/report" || true)
[ "$unknown" -lt "$asked" ] || offline "the advisory service knows none of the $asked packages"
cat "$folder/report"
[ "$unknown" -eq 0 ] || printf 'audit: %s of %s packages could not be looked up\n' "$unknown" "$asked" >&2
[ "$status" -eq 0 ] && exit 0
grep -q '^Name .*Version' "$folder/report" && exit 1
offline "the advisory service did not answer"
