"""Folders that ``qtarget data`` wrote: damaged, foreign, in the way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bad_models import cut, write
from bench import Bench, Case


def manifest(**values: Any) -> Callable[[Path], None]:
    """Parts of signal.json changed; ``...`` takes a part out."""

    def damage(folder: Path) -> None:
        held = json.loads((folder / "signal.json").read_text()) | values
        (folder / "signal.json").write_text(json.dumps({k: v for k, v in held.items() if v is not ...}))

    return damage


def case_of_training(id: str, wrong: str, damage: Any, *says: str, **settings: Any) -> Case:
    """The world's folder of weights, damaged, trained on."""

    def do(bench: Bench) -> list[object]:
        folder = bench.copy("signal")
        damage(folder)
        own = {n: bench.world / v if n == "model_name_or_path" else v for n, v in settings.items()}
        return bench.train(**{"dataset_name": folder, "target": "iw-sft", "max_length": 120, **own})

    return Case(id, wrong, do, says)


def made(id: str, wrong: str, words: list[object], *says: str, before: Any = lambda bench: None) -> Case:
    def do(bench: Bench) -> list[object]:
        before(bench)
        config = bench.config(reference_model_name_or_path=bench.world / "other", max_length=120)
        return ["data", *words, "--config", config, "-o", bench.folder / "s"]

    return Case(id, wrong, do, says)


CASES = [
    case_of_training(
        "half-a-manifest",
        "half of signal.json",
        cut("signal.json"),
        "signal.json cannot be read",
        "make the folder again",
    ),
    case_of_training("a-manifest-that-is-a-list", "a list", write("signal.json", "[]"), "signal.json cannot be read"),
    case_of_training(
        "a-deep-manifest",
        "a hundred thousand brackets",
        write("signal.json", "[" * 100_000),
        "signal.json cannot be read",
    ),
    case_of_training("an-unknown-kind", "a kind nobody makes", manifest(kind="magic"), "signal.json cannot be read"),
    case_of_training(
        "a-part-nobody-knows", "a field of somebody else's", manifest(colour=3), "cannot be read", "colour is 3"
    ),
    case_of_training("no-files", "no list of files", manifest(files=...), "signal.json cannot be read", "files"),
    case_of_training(
        "no-preprocessing", "no settings", manifest(preprocessing=...), "signal.json cannot be read", "preprocessing"
    ),
    case_of_training(
        "a-file-that-climbs",
        "a path out of the folder",
        manifest(files={"../../etc/passwd": "0"}),
        "signal.json cannot be read",
        "'../../etc/passwd'",
    ),
    case_of_training(
        "unfinished", "a run that was stopped", manifest(finished=False), "has not finished; run the same command again"
    ),
    case_of_training(
        "changed-rows",
        "rows that were edited",
        lambda folder: (folder / "train.parquet").write_bytes(b"PAR1"),
        "whose file train.parquet was changed since it was written",
    ),
    case_of_training(
        "rows-missing",
        "a file is missing",
        lambda folder: (folder / "train.parquet").unlink(),
        "whose file train.parquet is missing",
    ),
    case_of_training(
        "another-length",
        "rows cut elsewhere",
        lambda folder: None,
        "max_length is 64, but column weight",
        max_length=64,
    ),
    case_of_training(
        "another-model", "another tokenizer", lambda folder: None, "another tokenizer", model_name_or_path="stranger"
    ),
    made("an-unknown-signal", "no such signal", ["wieghts"], "word after data is 'wieghts'; did you mean 'weights'?"),
    made(
        "a-folder-of-something-else",
        "other files are there",
        ["weights", "--fixed"],
        "output is",
        "not an empty folder",
        before=lambda b: b.file("s/thesis.tex", "years of work"),
    ),
    made("no-verifier", "no verifier", ["critical"], "verifier is not set; use reasoning_gym:TASK"),
    made(
        "a-verifier-that-is-not-there",
        "no such module",
        ["critical", "--verifier", "nowhere:mine"],
        "verifier is 'nowhere:mine', but importing nowhere failed",
    ),
    made(
        "no-alternative",
        "0 alternatives",
        ["critical", "--verifier", "math_verify", "--alternatives", "0"],
        "alternatives is 0; use a whole number from 1",
    ),
    made(
        "an-infinite-wait",
        "an infinite time",
        ["critical", "--verifier", "math_verify", "--verifier_timeout", "inf"],
        "verifier_timeout is inf; use a finite number",
    ),
]
