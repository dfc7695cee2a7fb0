"""What training refuses before its first step, the dry run refuses, by the same sentences."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench import Bench, Case, digest, run_words
from test_corpus import CORPUS

KINDS = ("columns", "masks", "rows", "targets")
# A folder that is not there is looked for before anything is read, and said in other words.
REFUSED = [
    (kind, case) for kind in KINDS for case in CORPUS[kind] if case.says and not case.reads and case.id != "no-folder"
]


@pytest.mark.parametrize(("kind", "case"), REFUSED, ids=[f"{kind}-{case.id}" for kind, case in REFUSED])
def test_the_dry_run_says_it_too(kind: str, case: Case, world: Path, tmp_path: Path):
    bench = Bench(world, tmp_path / "bench")
    words = case.do(bench)
    assert words
    if words[0] != "train":
        pytest.skip("another verb's")
    before = digest(world, bench.folder)
    answer = run_words([*words, "--dry_run", "--gpus", "1"])
    assert answer.status == 2, answer.out
    assert digest(world, bench.folder) == before
    for part in case.says:
        assert part in "\n".join(answer.sentences)
