"""Teacher caches: damaged, foreign, hostile, of other rows."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from bad_models import cut, without, write
from bench import Bench, Case

from qtarget.teachers.cache import shards

SHARD = "shard-00000.safetensors"


def manifest(**values: Any) -> Callable[[Path], None]:
    """Parts of the manifest changed; ``...`` takes a part out."""

    def damage(folder: Path) -> None:
        file = folder / "manifest.json"
        held = json.loads(file.read_text()) | values
        file.write_text(json.dumps({name: value for name, value in held.items() if value is not ...}))

    return damage


def arrays(name: str, number: int | None = 0, **made: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    """Arrays of a file replaced, size and checksum of the manifest put right: somebody meant it."""

    def damage(folder: Path) -> None:
        held = {key: np.array(value) for key, value in shards.map_arrays(folder / name).items()}
        line = shards.write_arrays(folder / name, held | {key: make(held[key]) for key, make in made.items()})
        file = folder / "manifest.json"
        told = json.loads(file.read_text())
        (told["index"] if number is None else told["shards"][number]).update(line)
        file.write_text(json.dumps(told))

    return damage


def line(**values: Any) -> Callable[[Path], None]:
    """The manifest's line of the first shard changed."""

    def damage(folder: Path) -> None:
        file = folder / "manifest.json"
        told = json.loads(file.read_text())
        told["shards"][0].update(values)
        file.write_text(json.dumps(told))

    return damage


def flipped(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[-3] ^= 0x40
        (folder / name).write_bytes(bytes(data))

    return damage


def header(text: bytes, length: int | None = None) -> Callable[[Path], None]:
    """A shard with this header, its line of the manifest put right."""

    def damage(folder: Path) -> None:
        import xxhash

        data = struct.pack("<Q", len(text) if length is None else length) + text
        (folder / SHARD).write_bytes(data)
        line(bytes=len(data), checksum=xxhash.xxh3_128_hexdigest(data))(folder)

    return damage


def case_of_training(id: str, wrong: str, damage: Any, *says: str, reads: bool = False, **settings: Any) -> Case:
    """The world's cache, damaged, trained from."""

    def do(bench: Bench) -> list[object]:
        folder = bench.copy("cache")
        damage(folder)
        own = {
            name: bench.world / value if name in ("dataset_name", "teacher_model_name_or_path") else value
            for name, value in {"dataset_name": "few", **settings}.items()
        }
        return bench.train(**{"target": "kd", "teacher_cache": folder, "max_length": 120, **own})

    return Case(id, wrong, do, says, reads)


def inspected(id: str, wrong: str, damage: Any, *says: str) -> Case:
    def do(bench: Bench) -> list[object]:
        folder = bench.copy("cache")
        damage(folder)
        return ["cache", "inspect", folder, "--verify"]

    return Case(id, wrong, do, says)


def built(id: str, wrong: str, words: list[object], *says: str, before: Any = lambda bench: None) -> Case:
    def do(bench: Bench) -> list[object]:
        before(bench)
        config = bench.config(target="kd", teacher_model_name_or_path=bench.world / "teacher", max_length=120)
        return ["cache", "build", "--config", config, "-o", bench.folder / "cache", *words]

    return Case(id, wrong, do, says)


def nothing(folder: Path) -> None:
    return None


NAN = float("nan")
SIZE = '"dtype":"I32","shape":[1,8],"data_offsets":[0,32]'

CASES = [
    Case(
        "no-folder",
        "no such cache",
        lambda b: b.train(target="kd", teacher_cache=b.folder / "no"),
        ("teacher_cache is", "holds no manifest.json; name a folder that qtarget cache build made"),
    ),
    case_of_training(
        "no-manifest", "no manifest", without("manifest.json"), "teacher_cache is", "holds no manifest.json"
    ),
    case_of_training(
        "half-a-manifest", "half a manifest", cut("manifest.json"), "manifest.json cannot be read", "rebuild it"
    ),
    case_of_training(
        "a-manifest-that-is-a-list", "a list", write("manifest.json", "[]"), "manifest.json", "rebuild it"
    ),
    case_of_training(
        "a-manifest-of-bytes", "not UTF-8", write("manifest.json", b"\xff\xfe{}"), "manifest.json cannot be read"
    ),
    case_of_training(
        "a-deep-manifest",
        "a hundred thousand brackets",
        write("manifest.json", "[" * 100_000),
        "manifest.json cannot be read",
    ),
    case_of_training(
        "another-format", "a format to come", manifest(format=2), "manifest.json has format 2, and this version reads 1"
    ),
    case_of_training("a-part-missing", "no k", manifest(k=...), "manifest.json cannot be read"),
    case_of_training("another-part-missing", "no teacher", manifest(teacher=...), "manifest.json cannot be read"),
    case_of_training(
        "a-part-nobody-knows",
        "a field of somebody else's",
        manifest(colour="red"),
        "manifest.json cannot be read",
        "colour is 'red', and no such file has a field of that name",
    ),
    case_of_training(
        "a-shard-without-tokens",
        "words for a count, inside a list",
        line(tokens="many"),
        "manifest.json cannot be read",
        "shards[0].tokens is 'many', which should be a valid integer",
    ),
    case_of_training(
        "unfinished",
        "a build that was stopped",
        manifest(state="building"),
        "is not finished",
        "run the same qtarget cache build again",
    ),
    case_of_training("k-in-words", "a word for k", manifest(k="many"), "manifest.json cannot be read", "k"),
    case_of_training(
        "another-k",
        "more than the files hold",
        manifest(k=9),
        "is not a file of this teacher cache: ids is int32 of shape",
        "the manifest says",
    ),
    case_of_training(
        "shards-that-are-a-mapping",
        "a mapping for a list",
        manifest(shards={"a": 1}),
        "manifest.json cannot be read",
        "shards",
    ),
    case_of_training("no-shard", "a file is missing", without(SHARD), f"{SHARD} is missing; copy the cache again"),
    case_of_training("half-a-shard", "a file cut in half", cut(SHARD), "it was cut short or changed"),
    case_of_training("a-changed-bit", "one bit", flipped(SHARD), "is not what was written: its checksum differs"),
    case_of_training(
        "a-changed-index",
        "one bit of the index",
        flipped("index.safetensors"),
        "is not what was written: its checksum differs",
    ),
    case_of_training(
        "a-shard-elsewhere",
        "a path out of the folder",
        line(file="../../../etc/passwd"),
        "shard",
        "'../../../etc/passwd'",
        "a name without folders",
    ),
    case_of_training(
        "an-absolute-shard",
        "an absolute path",
        line(file="/etc/passwd"),
        "shard",
        "'/etc/passwd'",
        "a name without folders",
    ),
    case_of_training("a-shard-without-a-name", "a number for a name", line(file=5), "manifest.json cannot be read"),
    case_of_training(
        "a-header-longer-than-the-file",
        "2^60 bytes of header",
        header(b"{}", 2**60),
        "is not a file of a teacher cache",
    ),
    case_of_training("a-header-that-is-no-json", "words", header(b"no json here"), "is not a file of a teacher cache"),
    case_of_training(
        "an-array-of-another-kind",
        "a type nobody wrote",
        header(b'{"ids":{' + SIZE.replace("I32", "BF16").encode() + b"}}"),
        "is not a file of a teacher cache",
    ),
    case_of_training(
        "offsets-before-the-file",
        "a negative offset",
        header(b'{"ids":{"dtype":"I32","shape":[2],"data_offsets":[-8,0]}}'),
        "is not a file of a teacher cache",
    ),
    case_of_training(
        "offsets-behind-the-file",
        "an offset behind the end",
        header(b'{"ids":{"dtype":"I32","shape":[2],"data_offsets":[0,8]}}'),
        "is not a file of a teacher cache",
    ),
    case_of_training(
        "an-array-missing", "no ids", header(b"{}"), "is not a file of this teacher cache: it has no array ids"
    ),
    case_of_training(
        "a-shape-that-overflows",
        "2^62 entries",
        header(b'{"ids":{"dtype":"I32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}'),
        "is not a file of a teacher cache",
    ),
    case_of_training(
        "ids-out-of-range",
        "tokens of another vocabulary",
        arrays(SHARD, ids=lambda a: a + 100_000),
        "is not a file of this teacher cache: its ids run from",
        "outside the vocabulary of 320",
    ),
    case_of_training("negative-ids", "tokens below 0", arrays(SHARD, ids=lambda a: a - 1000), "its ids run from"),
    case_of_training(
        "nan-log-probabilities",
        "NaN",
        arrays(SHARD, logprobs=lambda a: a * np.float16(NAN)),
        "its log-probabilities are NaN or infinite",
    ),
    case_of_training(
        "probabilities-above-one",
        "a log-probability of 3",
        arrays(SHARD, logprobs=lambda a: a * 0 + np.float16(3)),
        "its probabilities sum to 161 for one token",
    ),
    case_of_training(
        "a-tail-above-one",
        "a rest of e^5",
        arrays(SHARD, tail=lambda a: a * 0 + np.float32(5)),
        "its probabilities sum to 149",
        "tail",
    ),
    case_of_training(
        "a-nan-tail",
        "NaN for the rest",
        arrays(SHARD, tail=lambda a: a * np.float32(NAN)),
        "its log-probabilities are NaN or infinite",
    ),
    case_of_training(
        "fewer-tokens-than-said",
        "a shard of half its rows",
        arrays(SHARD, ids=lambda a: a[:3], logprobs=lambda a: a[:3], tail=lambda a: a[:3]),
        "of shape [3, 8], and the manifest says",
    ),
    case_of_training(
        "starts-out-of-range",
        "rows that lie elsewhere",
        arrays("index.safetensors", None, starts=lambda a: a + 10**9),
        "the index leads outside the 114 tokens",
    ),
    case_of_training(
        "counts-below-zero",
        "rows of -5 tokens",
        arrays("index.safetensors", None, counts=lambda a: a * 0 - 5),
        "the index leads outside the 114 tokens",
    ),
    case_of_training(
        "keys-of-another-width",
        "keys of 8 bytes",
        arrays("index.safetensors", None, keys=lambda a: a[:, :8]),
        "keys is uint8 of shape [6, 8], and the manifest says uint8 of shape [6, 16]",
    ),
    case_of_training(
        "another-tokenizer",
        "built for other tokens",
        manifest(tokenizer="0" * 16),
        "the cache was built with tokenizer",
        "train with the tokenizer the cache was built for",
    ),
    case_of_training(
        "another-length",
        "rows cut elsewhere",
        nothing,
        "the cache was built with max_length 120, and this run has 64",
        max_length=64,
    ),
    case_of_training("other-rows", "rows that were never asked about", nothing, "cache", "row", dataset_name="data"),
    case_of_training(
        "another-teacher",
        "the cache is of another model",
        nothing,
        "teacher_cache is",
        "and this run has",
        teacher_model_name_or_path="other",
    ),
    case_of_training("even-tail-of-a-whole-cache", "a good cache: it is trained from", nothing, teacher_tail="even"),
    inspected("inspect-a-changed-bit", "one bit", flipped(SHARD), "is not what was written: its checksum differs"),
    inspected("inspect-a-part-missing", "no preparation", manifest(preparation=...), "manifest.json cannot be read"),
    inspected(
        "inspect-a-shard-elsewhere",
        "a path out of the folder",
        line(file="../model/config.json"),
        "'../model/config.json'",
        "a name without folders",
    ),
    Case(
        "inspect-nothing",
        "no folder named",
        lambda b: ["cache", "inspect"],
        ("nothing was given; name the folder of one cache",),
    ),
    built("no-k", "the 0 likeliest", ["--k", "0"], "k is 0; use a whole number from 1"),
    built(
        "k-beyond-the-vocabulary",
        "more tokens than there are",
        ["--k", "9999"],
        "k is 9999, more than the vocabulary's 320 tokens; use a smaller k",
    ),
    built(
        "k-and-coverage",
        "both",
        ["--k", "4", "--coverage", "0.9"],
        "--k and --coverage are both given; keep one of them",
    ),
    built("coverage-of-two", "more than all", ["--coverage", "2"], "coverage is 2; use a share"),
    built("a-nan-coverage", "NaN", ["--coverage", "nan"], "coverage is nan; use a share"),
    Case(
        "coverage-of-nan",
        "NaN in the teacher's weights",
        lambda b: [
            *("cache", "build", "--config", b.config(target="kd", teacher_model_name_or_path=b.world / "broken")),
            *("-o", b.folder / "c", "--coverage", "0.9"),
        ],
        ("the teacher gives NaN for row 0 of the train dataset (it is ", "broken (revision default, weights "),
        reads=True,
    ),
    Case(
        "examined-with-a-student-of-nan",
        "NaN in the student's weights",
        lambda b: [
            *("cache", "doctor", "--config", b.config(dataset_name=b.world / "few", max_length=120), "--rows", 2),
            *("--cache", b.world / "cache", "--model_name_or_path", b.world / "broken"),
        ],
        ("the logits of student ", "broken are NaN or infinite at row 0, position "),
        reads=True,
    ),
    built("an-unknown-precision", "no such precision", ["--cache_dtype", "int8"], "cache_dtype is 'int8'"),
    built("no-batch", "0 rows at once", ["--batch_size", "0"], "batch_size is 0; use a whole number from 1"),
    built(
        "no-tokens-in-a-file",
        "0 tokens a file",
        ["--shard_tokens", "0"],
        "shard_tokens is 0; use a whole number from 1",
    ),
    built(
        "a-folder-of-something-else",
        "other files are there",
        ["--k", "2"],
        "output is",
        "holds other files; name a new folder",
        before=lambda b: b.file("cache/thesis.tex", "years of work"),
    ),
    built(
        "a-cache-of-something-else",
        "a cache with another k is there",
        ["--k", "2"],
        "output is",
        "which holds a teacher cache",
        before=lambda b: b.copy("cache"),
    ),
    built("a-file-in-the-way", "a file for a folder", ["--k", "2"], "output is", before=lambda b: b.file("cache", "")),
]
