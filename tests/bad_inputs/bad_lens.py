"""Captures of the lens, what is shown of them, and the maps of a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from bad_models import cut, without, write
from bench import Bench, Case

TOKENS, ROWS, VOCAB = "tokens.parquet", "rows.parquet", "vocab.parquet"


def manifest(**values: Any) -> Callable[[Path], None]:
    """Parts of the manifest changed; ``...`` takes a part out."""

    def damage(folder: Path) -> None:
        held = json.loads((folder / "manifest.json").read_text()) | values
        (folder / "manifest.json").write_text(json.dumps({k: v for k, v in held.items() if v is not ...}))

    return damage


def column(file: str, name: str, change: Callable[[list[Any]], list[Any]] | None) -> Callable[[Path], None]:
    """A column of a file replaced, or taken out."""

    def damage(folder: Path) -> None:
        import pyarrow as pa

        held = pq.read_table(folder / file).to_pydict()
        values = held.pop(name)
        if change is not None:
            held[name] = change(values)
        pq.write_table(pa.Table.from_pydict(held), folder / file)

    return damage


def reported(id: str, wrong: str, damage: Any, *says: str, verb: str = "report") -> Case:
    """The world's capture, damaged, and a page made of it."""

    def do(bench: Bench) -> list[object]:
        folder = bench.copy("capture")
        damage(folder)
        return ["lens", verb, folder, *(["-o", bench.folder / "lens.html"] if verb == "report" else [])]

    return Case(id, wrong, do, says)


def shown(id: str, wrong: str, words: list[object], *says: str) -> Case:
    return Case(id, wrong, lambda bench: ["lens", *(bench.world / w if w == "capture" else w for w in words)], says)


def captured(
    id: str, wrong: str, words: list[object], *says: str, before: Any = lambda bench: None, **settings: Any
) -> Case:
    def do(bench: Bench) -> list[object]:
        before(bench)
        return [
            "lens",
            "capture",
            "--config",
            bench.config(max_length=120, **settings),
            "-o",
            bench.folder / "c",
            *words,
        ]

    return Case(id, wrong, do, says)


def run_maps(id: str, wrong: str, damage: Any, *says: str) -> Case:
    """The maps of a run, damaged."""

    def do(bench: Bench) -> list[object]:
        run = bench.copy("stopped")
        damage(run)
        return ["lens", "report", bench.world / "capture", "-o", bench.folder / "lens.html", "--run", run]

    return Case(id, wrong, do, says)


def first(value: Any) -> Callable[[list[Any]], list[Any]]:
    return lambda values: [value, *values[1:]]


NAN = float("nan")
FILE = "lens_history.parquet"
CASES = [
    shown("no-folder", "no such capture", ["report", "nowhere"], "'nowhere' is not a capture: it has no manifest.json"),
    reported(
        "half-a-manifest", "half a manifest", cut("manifest.json"), "manifest.json cannot be read", "capture again"
    ),
    reported("a-manifest-that-is-a-list", "a list", write("manifest.json", "[]"), "has format", "capture again"),
    reported("a-manifest-of-bytes", "not UTF-8", write("manifest.json", b"\xff\xfe"), "manifest.json cannot be read"),
    reported(
        "a-deep-manifest",
        "a hundred thousand brackets",
        write("manifest.json", "[" * 100_000),
        "manifest.json cannot be read",
    ),
    reported("another-format", "a format to come", manifest(format=9), "has format 9, and this version reads 1"),
    reported("no-size", "no vocab_size", manifest(vocab_size=...), "manifest.json", "vocab_size"),
    reported(
        "a-size-in-words",
        "a word for vocab_size",
        manifest(vocab_size="large"),
        "manifest.json",
        "vocab_size is 'large'",
    ),
    reported("a-size-of-nothing", "a vocabulary of 0", manifest(vocab_size=0), "manifest.json", "vocab_size is 0"),
    reported("no-top-k", "no top_k", manifest(top_k=...), "manifest.json", "top_k"),
    reported("counts-missing", "no tokens", manifest(tokens=...), "manifest.json", "tokens"),
    reported("a-part-nobody-knows", "a field of somebody else's", manifest(colour=3), "cannot be read", "colour is 3"),
    reported("other-counts", "a capture cut short", manifest(rows=99), "but its manifest says", "capture again"),
    reported("no-tokens-file", "a file is missing", without(TOKENS), f"{TOKENS} cannot be read", "capture again"),
    reported("half-a-file", "a file cut in half", cut(TOKENS), f"{TOKENS} cannot be read", "capture again"),
    reported("a-picture", "a picture for rows", write(ROWS, b"\x89PNG" * 20), f"{ROWS} cannot be read"),
    reported("a-column-missing", "no entropy", column(TOKENS, "entropy", None), f"{TOKENS} lacks the columns entropy"),
    reported("no-text", "a vocabulary without texts", column(VOCAB, "text", None), f"{VOCAB} lacks the columns text"),
    reported("ids-in-words", "words for ids", column(TOKENS, "label", lambda v: ["a"] * len(v)), f"{TOKENS}", "label"),
    reported(
        "numbers-in-words",
        "words for entropies",
        column(TOKENS, "entropy", lambda v: ["a"] * len(v)),
        f"{TOKENS}",
        "entropy",
    ),
    reported("a-null", "null for a label", column(TOKENS, "label", first(None)), f"{TOKENS}", "label"),
    reported(
        "a-label-not-among-its-ids",
        "a label nobody captured",
        column(TOKENS, "label", first(9999)),
        f"{TOKENS}",
        "label",
    ),
    reported(
        "lists-of-two-lengths",
        "one log-probability too few",
        column(TOKENS, "student", lambda v: [v[0][:-1], *v[1:]]),
        f"{TOKENS}",
        "student",
    ),
    reported(
        "nan-log-probabilities",
        "NaN",
        column(TOKENS, "student", lambda v: [[NAN] * len(v[0]), *v[1:]]),
        f"{TOKENS}",
        "student",
    ),
    reported(
        "log-probabilities-above-zero",
        "a probability of e^9",
        column(TOKENS, "student", lambda v: [[9.0] * len(v[0]), *v[1:]]),
        f"{TOKENS}",
        "student",
    ),
    reported(
        "ids-out-of-range",
        "tokens of another vocabulary",
        column(TOKENS, "ids", lambda v: [[i + 10**6 for i in line] for line in v]),
        f"{TOKENS}",
        "ids",
    ),
    reported("a-row-nobody-has", "tokens of row 77", column(TOKENS, "row", first(77)), f"{TOKENS}", "row"),
    reported(
        "a-position-behind-the-row",
        "position 10,000",
        column(TOKENS, "position", first(10_000)),
        f"{TOKENS}",
        "position",
    ),
    reported("row-ids-of-null", "null for a row's ids", column(ROWS, "input_ids", first(None)), f"{ROWS}", "input_ids"),
    reported("a-text-of-null", "null for a text", column(VOCAB, "text", first(None)), f"{VOCAB}", "text"),
    reported(
        "show-a-damaged-one",
        "the same in the terminal",
        column(TOKENS, "student", lambda v: [v[0][:-1], *v[1:]]),
        f"{TOKENS}",
        "student",
        verb="show",
    ),
    reported("advise-on-a-damaged-one", "the same for advice", cut(TOKENS), f"{TOKENS} cannot be read", verb="advise"),
    reported(
        "a-target-that-is-code",
        "an import path in the capture: not imported, sft is shown",
        manifest(target="this:mine"),
        verb="show",
    ),
    reported("a-target-that-is-nonsense", "a number for a target: sft is shown", manifest(target=17), verb="show"),
    reported(
        "a-run's-parts-that-are-code",
        "an import path among the parts of the run's target: not imported, named on the page",
        manifest(run_targets={"mine": {"trust": "this:mine", "residual": "student"}}),
    ),
    reported(
        "a-run's-parts-that-are-nonsense",
        "parts that make no target: named on the page",
        manifest(run_targets={"mine": {"trust": [1, 2]}, "yours": None, "ours": {"preset": "dft", "eta": {}}}),
    ),
    reported(
        "a-run's-targets-that-are-a-list",
        "a list for the run's targets",
        manifest(run_targets=[1, 2]),
        "manifest.json",
        "run_targets is [1, 2]",
    ),
    shown(
        "no-such-row",
        "row 99",
        ["show", "capture", "--row", "99"],
        "row is 99, for which this capture has no supervised token; it has 0",
    ),
    shown(
        "a-row-in-words", "a word", ["show", "capture", "--row", "first"], "row is 'first'; use a whole number from 0"
    ),
    shown(
        "an-unknown-target", "a typo", ["show", "capture", "--target", "dftt"], "target is 'dftt'; did you mean 'dft'?"
    ),
    shown(
        "a-target-that-is-no-yaml",
        "brackets that do not close",
        ["show", "capture", "--target", "{a: "],
        "target is '{a: ', which is not YAML",
    ),
    shown(
        "an-unknown-option",
        "a typo",
        ["show", "capture", "--rows"],
        "option of lens is '--rows'; did you mean '--row'?",
    ),
    shown("no-rows", "0 rows", ["report", "capture", "--rows", "0"], "rows is 0; use a whole number from 1"),
    shown("two-folders", "two captures", ["show", "capture", "capture"], "name one folder of a capture"),
    Case(
        "a-page-in-a-folder",
        "a folder for a page",
        lambda b: ["lens", "report", b.world / "capture", "-o", b.folder],
        ("output is", "cannot be written"),
    ),
    Case(
        "a-page-under-a-file",
        "a file in the way",
        lambda b: ["lens", "report", b.world / "capture", "-o", b.file("f", "") / "lens.html"],
        ("output is", "cannot be written"),
    ),
    shown(
        "no-loss", "no such module", ["--loss", "nowhere:loss"], "loss is 'nowhere:loss', but importing nowhere failed"
    ),
    shown("a-loss-that-is-no-function", "a number", ["--loss", "math:pi"], "loss is 'math:pi', which cannot be called"),
    shown("a-loss-of-something-else", "a function of something else", ["--loss", "math:sqrt"], "math:sqrt"),
    Case(
        "a-capture-of-nan",
        "NaN in the student's weights",
        lambda b: [
            "lens",
            "capture",
            "--config",
            b.config(model_name_or_path=b.world / "broken"),
            "-o",
            b.folder / "c",
        ],
        ("the logits of student ", "are NaN or infinite at row 0, position ", "check its weights and that row"),
        reads=True,
    ),
    Case(
        "a-capture-of-a-teacher-of-nan",
        "NaN in the teacher's weights",
        lambda b: [
            *("lens", "capture", "--config", b.config(target="kd", teacher_model_name_or_path=b.world / "broken")),
            *("-o", b.folder / "c"),
        ],
        ("the logits of teacher ", "broken (revision default) are NaN or infinite at row 0, position "),
        reads=True,
    ),
    captured("no-captured-rows", "0 rows", ["--rows", "0"], "rows is 0; use a whole number from 1"),
    captured("no-captured-top-k", "the 0 likeliest", ["--top_k", "0"], "top_k is 0; use a whole number from 1"),
    captured(
        "top-k-beyond",
        "more tokens than there are",
        ["--top_k", "9999"],
        "top_k is 9999; use a number from 1 to the vocabulary's 320",
    ),
    captured(
        "a-capture-is-there",
        "a capture is there",
        [],
        "output is",
        "which holds a capture",
        before=lambda b: b.copy("capture").rename(b.folder / "c"),
    ),
    captured(
        "something-else-is-there",
        "other files are there",
        [],
        "output is",
        "not an empty folder",
        before=lambda b: b.file("c/thesis.tex", "years of work"),
    ),
    captured(
        "something-else-is-half-there",
        "other files under the name it works in",
        [],
        "output is",
        "c.partial",
        before=lambda b: b.file("c.partial/thesis.tex", "years of work"),
    ),
    run_maps("no-maps", "a run without maps", without(FILE), "run is", f"has no {FILE}"),
    run_maps("half-a-map", "a file cut in half", cut(FILE), f"{FILE} cannot be read"),
    run_maps(
        "a-bin-out-of-range", "a bin that is not on the map", column(FILE, "p_bin", first(77)), f"{FILE}", "p_bin"
    ),
    run_maps("a-map-without-counts", "a column is missing", column(FILE, "count", None), f"{FILE}", "count"),
]
