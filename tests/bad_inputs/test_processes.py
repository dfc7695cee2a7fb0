"""A dozen cases as users meet them: real processes, their exit status, and nothing on stdout or on the disk."""

from __future__ import annotations

import subprocess
import sys

import pytest
from bench import Bench, digest
from test_corpus import CORPUS

from hangs import SECONDS

# Of the corpus; some of each kind whose words a shell could pass.
CHOSEN = {
    "configs": ("laughs", "a-python-object", "latin-1", "an-unknown-verb"),
    "targets": ("a-typo", "a-module-that-is-not-there"),
    "rows": ("a-broken-line",),
    "caches": ("a-shard-elsewhere", "half-a-manifest"),
    "lens": ("a-deep-manifest",),
    "results": ("rescore-code-of-the-folder", "a-task-that-climbs"),
}
CASES = [(kind, case) for kind, ids in CHOSEN.items() for case in CORPUS[kind] if case.id in ids]


def test_there_are_a_dozen():
    assert len(CASES) == sum(map(len, CHOSEN.values())) == 12


@pytest.mark.parametrize(("kind", "case"), CASES, ids=[f"{kind}-{case.id}" for kind, case in CASES])
def test_refused_in_a_process(kind, case, world, tmp_path):
    bench = Bench(world, tmp_path / "case")
    words = case.do(bench)
    assert words is not None
    before = digest(world, bench.folder)
    command = [sys.executable, "-m", "qtarget", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr + done.stdout
    said = [line for line in done.stderr.splitlines() if line.startswith("qtarget ")]
    assert all(any(part in line for line in said) for part in case.says), said
    assert digest(world, bench.folder) == before
