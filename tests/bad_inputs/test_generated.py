"""Ten thousand generated inputs: whatever they say, one ConfigError or a value; never another exception, never a hang."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trl import SFTConfig

import qtarget as qt
import tiny_models
from hangs import within
from qtarget.cli import arguments, recipe, yaml_text
from qtarget.data.columns import TokenColumns
from qtarget.data.messages import RowReader
from qtarget.data.tokenising import Tokeniser
from qtarget.data.validation import checked_tokens, readable
from qtarget.errors import ConfigError
from qtarget.evaluation import records, tasks
from qtarget.lens import record
from qtarget.targets.schedule import ScheduledTarget
from qtarget.teachers.cache import manifest as manifests
from qtarget.teachers.cache import shards
from qtarget.teachers.cache.reader import CachedTeacher
from qtarget.teachers.context import read_template
from qtarget.teachers.pool import read_pool
from qtarget.training import ranges
from qtarget.training.saving import checkpoints

# How many of each; together 10,000.
EXAMPLES = {
    "yaml": 1500,
    "targets": 2500,
    "settings": 800,
    "recipes": 800,
    "words": 700,
    "rows": 900,
    "columns": 900,
    "tasks": 500,
    "numbers": 600,
    "cache": 300,
    "capture": 150,
    "results": 250,
    "checkpoint": 100,
}
CHECKS = [
    HealthCheck.function_scoped_fixture,
    HealthCheck.too_slow,
    HealthCheck.data_too_large,
    HealthCheck.filter_too_much,
]


def many(kind: str) -> Any:
    """So many examples of a kind, none of which may take half a minute."""
    asked = settings(
        max_examples=EXAMPLES[kind], deadline=None, derandomize=True, database=None, suppress_health_check=CHECKS
    )

    def on(test: Any) -> Any:
        inner = test.hypothesis.inner_test

        @functools.wraps(inner)
        def timed(*args: Any, **kwargs: Any) -> None:
            with within(30):
                inner(*args, **kwargs)

        test.hypothesis.inner_test = timed
        return asked(test)

    return on


def test_there_are_ten_thousand():
    assert sum(EXAMPLES.values()) == 10_000


def refused_or(make: Any) -> Any:
    """The value, or None where it was refused in sentences that say something."""
    try:
        return make()
    except ConfigError as error:
        assert error.faults and all(isinstance(fault, str) and fault.strip() for fault in error.faults)
        return None


NUMBERS = st.one_of(
    st.integers(-3, 30),
    st.integers(),
    st.floats(),
    st.sampled_from([0, 1, -1, 0.5, 1e308, -1e308, 5e-324, 2**31, 2**63, math.nan, math.inf, -math.inf]),
)
TEXTS = st.one_of(
    st.text(max_size=12), st.sampled_from(["", "dft", "target-sft", "a:b", "../x", "1e5", "nan", "{}", "\0", "…"])
)
PLAIN = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
ANYTHING = st.recursive(
    PLAIN, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)), max_leaves=8
)


# -- what is asked ---------------------------------------------------------------------------------------------------

FRAGMENTS = st.sampled_from(
    [
        *("a: 1\n", "- x\n", "&a ", "*a ", "{", "}", "[", "]", ": ", "? ", "!!int ", "!!python/object:os.x ", "<<: "),
        *("|\n  t\n", "'", '"', "\t", "\n", "---\n", "...\n", "%YAML 9\n", "2026-13-45", "9" * 5000, "0x", "1_0", "~"),
        *("\ufeff", "# c\n"),
    ]
)


@many("yaml")
@given(st.lists(st.one_of(FRAGMENTS, st.text(max_size=6)), max_size=12).map("".join))
def test_any_text_is_yaml_or_refused(text):
    made = refused_or(lambda: yaml_text.load(text, "config is 'x'"))
    assert len(repr(made)) < 10_000_000
    if made:
        assert all(origin.startswith(recipe.ORIGINS) for origin in recipe.provenance(text).values())


PRESETS = st.sampled_from([*qt.presets.names(), "nll", "dftt", "", "target_sft"])
PARAMETERS = st.sampled_from(
    [name for preset in qt.presets.names() for name in qt.presets.describe(preset).parameters]
    + ["share", "x", "schedule"]
)
RULES = st.sampled_from(["probability", "entropy", "constant", "threshold", "power", "ones", "x"])
POOLS = st.sampled_from(["student", "teacher", "uniform", "reference", "guided", "tempered", "pool", "x"])
SCHEDULES = st.fixed_dictionaries(
    {"schedule": st.sampled_from(["linear", "cosine", "constant", "x"]), "from": NUMBERS, "to": NUMBERS},
    optional={"steps": NUMBERS},
)
VALUES = st.one_of(ANYTHING, SCHEDULES)
PART = st.one_of(
    VALUES,
    RULES,
    POOLS,
    st.dictionaries(st.one_of(RULES, POOLS), st.dictionaries(PARAMETERS, VALUES, max_size=2), max_size=2),
)
TARGETS = st.one_of(
    ANYTHING.filter(lambda value: not isinstance(value, str)),
    PRESETS,
    st.builds(lambda name, more: {"preset": name, **more}, PRESETS, st.dictionaries(PARAMETERS, VALUES, max_size=3)),
    st.fixed_dictionaries(
        {},
        optional={
            "trust": PART,
            "residual": st.one_of(PART, st.lists(PART, max_size=2)),
            "scale": PART,
            "value": TEXTS,
            "share": VALUES,
        },
    ),
)


@many("targets")
@given(TARGETS)
def test_any_target_is_made_or_refused(config):
    made = refused_or(lambda: ScheduledTarget.read(config))
    if made is None:
        return
    target = made.final
    assert refused_or(lambda: qt.Target.from_config(target.to_config())) == target
    str(made), target.formula, target.requires


@many("settings")
@given(
    st.dictionaries(
        st.sampled_from(
            [
                *(*ranges._WHOLE, *ranges._NUMBERS, *ranges._NAMES),
                *("num_train_epochs", "run_name", "report_to", "max_steps", "pad_to_multiple_of"),
                *("dataloader_multiprocessing_context", "gradient_checkpointing_kwargs"),
            ]
        ),
        ANYTHING,
        max_size=4,
    )
)
def test_any_setting_is_taken_or_refused(asked):
    fields = dataclasses.fields(SFTConfig)
    config = {one.name: None if one.default is dataclasses.MISSING else one.default for one in fields}
    config |= {"output_dir": "x", "report_to": "none"}
    faults = ranges.faults(SimpleNamespace(**(config | asked)))
    assert all(isinstance(fault, str) and fault for fault in faults)
    rate = asked.get("learning_rate")
    if isinstance(rate, float) and not math.isfinite(rate):
        assert any("learning_rate" in fault for fault in faults)


@many("recipes")
@given(st.dictionaries(st.sampled_from([*recipe.NOTES]), ANYTHING, max_size=5))
def test_any_notes_of_a_recipe_are_read_or_refused(notes):
    assert all(isinstance(fault, str) and fault for fault in recipe.faults(notes))


VERB = arguments.Verb("verb", "a verb of its own")
VERB.command(
    arguments.Option("rows", "a number", arguments.whole(1), 1),
    arguments.Option("output", "a folder", arguments.FOLDER),
    arguments.Option("all", "a flag"),
    settings=True,
)(lambda options: 0)


@many("words")
@given(st.lists(TEXTS.map(str), max_size=5), NUMBERS, ANYTHING)
def test_any_words_are_options_or_refused(words, number, value):
    refused_or(lambda: VERB.commands[""].read("verb", words))
    refused_or(lambda: arguments.whole(1).read("rows", value))
    refused_or(lambda: arguments.number().read("rows", number))
    refused_or(lambda: read_pool(value))
    refused_or(lambda: read_template(value))


# -- rows ------------------------------------------------------------------------------------------------------------


def dataset(rows: list[dict[str, Any]]) -> Any:
    """A Dataset where Arrow can hold the rows, else None: no file could have held them either."""
    from datasets import Dataset

    try:
        return Dataset.from_list(rows)
    except (pa.ArrowException, TypeError, ValueError, OverflowError, UnicodeEncodeError):
        return None


SHAPES = st.sampled_from(
    ["text", "messages", "prompt", "completion", "input_ids", "labels", "completion_mask", "seq_lengths"]
)
MESSAGES = st.lists(st.fixed_dictionaries({}, optional={"role": PLAIN, "content": PLAIN}), max_size=2)
CELLS = st.one_of(ANYTHING, MESSAGES, st.lists(st.integers(-101, 330), max_size=4))


@many("rows")
@given(st.lists(st.dictionaries(SHAPES, CELLS, max_size=3), min_size=1, max_size=2))
def test_any_rows_are_taken_or_refused(rows):
    data = dataset(rows)
    if data is None:
        return
    tokenizer = tiny_models.tokenizer()
    tokenise = Tokeniser(tokenizer, RowReader.of(tokenizer, None, features=data.features), None, False, "train")

    def tokenise_all() -> None:
        with readable("train"):
            for number, row in enumerate(data):
                tokenise(row, number)

    refused_or(tokenise_all)
    if refused_or(lambda: checked_tokens(data, "train", 320)) is not None and "input_ids" in data.column_names:
        assert all(0 <= i < 320 for row in data for i in row["input_ids"])


@many("columns")
@given(
    st.sampled_from(["weight", "critical", "old_logps", "reference_logp", "uid"]),
    CELLS,
    st.lists(st.sampled_from([-100, 5]), max_size=4),
)
def test_any_column_is_spread_or_refused(name, value, labels):
    columns = TokenColumns((name,))
    row = {"input_ids": [1] * len(labels), "labels": labels, name: value}
    per_token = refused_or(lambda: columns.per_token(row, 0, "train"))
    if per_token is not None:
        assert len(per_token[name]) == len(labels) and all(math.isfinite(number) for number in per_token[name])


@many("tasks")
@given(
    st.lists(
        st.one_of(
            ANYTHING,
            st.fixed_dictionaries(
                {"prompt": ANYTHING, "answer": ANYTHING}, optional={"options": ANYTHING, "id": ANYTHING}
            ),
        ).map(json.dumps),
        max_size=3,
    ),
    st.sampled_from(["math", "choice"]),
)
def test_any_task_file_is_read_or_refused(tmp_path, lines, verifier):
    file = tmp_path / "t.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
    rows = refused_or(lambda: tasks._file_rows(file, verifier))
    if rows:
        refused_or(lambda: tasks._problems(rows))


# -- numbers ---------------------------------------------------------------------------------------------------------


@many("numbers")
@given(st.data())
def test_any_logits_give_finite_gradients_or_are_refused(data):
    vocab, n = data.draw(st.integers(2, 4)), data.draw(st.integers(1, 2))
    numbers = st.one_of(st.floats(-90, 90, width=32), st.floats(width=32))
    z = torch.tensor(data.draw(st.lists(st.lists(numbers, min_size=vocab, max_size=vocab), min_size=n, max_size=n)))
    t = torch.tensor(data.draw(st.lists(st.lists(numbers, min_size=vocab, max_size=vocab), min_size=n, max_size=n)))
    y = torch.tensor(data.draw(st.lists(st.sampled_from([*range(vocab), -100]), min_size=n, max_size=n)))
    leaf = z.clone().requires_grad_()
    target = qt.preset(data.draw(st.sampled_from(["sft", "dft", "kd", "target-sft", "label-smoothing", "asft", "gem"])))
    more = {f"{need}_logits": t for need in target.requires}
    out = refused_or(lambda: qt.target_loss(leaf, y, target, **more))
    if out is not None and bool((z.abs() < 1e30).all()) and bool((t.abs() < 1e30).all()):
        out.loss.backward()
        assert torch.isfinite(leaf.grad).all()


# -- files with changed bytes ----------------------------------------------------------------------------------------


@st.composite
def damage(draw: Any) -> Any:
    """What is done to the bytes of a file: some changed, taken out, put in, or all of them replaced."""
    kind = draw(st.sampled_from(["change", "cut", "insert", "replace", "swap"]))
    place, more = draw(st.floats(0, 1)), draw(st.binary(min_size=1, max_size=6))

    def apply(data: bytes) -> bytes:
        at = int(place * max(0, len(data) - 1))
        if kind == "cut":
            return data[:at]
        if kind == "insert":
            return data[:at] + more + data[at:]
        if kind == "replace":
            return more
        if kind == "swap":  # a digit or a word of JSON for another of the same length
            return data[:at] + data[at : at + 8][::-1] + data[at + 8 :]
        return data[:at] + more + data[at + len(more) :]

    return apply


def damaged(folder: Path, name: str, change: Any) -> Any:
    """The folder with a file changed, put back afterwards."""
    import contextlib

    @contextlib.contextmanager
    def within() -> Any:
        file = folder / name
        before = file.read_bytes()
        file.write_bytes(change(before))
        try:
            yield
        finally:
            file.write_bytes(before)

    return within()


@pytest.fixture(scope="module")
def copies(world, tmp_path_factory) -> Path:
    import shutil

    root = tmp_path_factory.mktemp("copies")
    for name in ("cache", "capture", "results", "stopped"):
        shutil.copytree(world / name, root / name)
    return root


@many("cache")
@given(st.sampled_from(["manifest.json", "index.safetensors", "shard-00000.safetensors"]), damage())
def test_any_bytes_of_a_cache_are_read_or_refused(copies, name, change):
    def read() -> None:
        cache = CachedTeacher(copies / "cache")
        cache.check_files(checksums=True)
        cache.gather(torch.arange(len(cache)))
        shards.map_arrays(copies / "cache" / name) if name != "manifest.json" else manifests.read(copies / "cache")

    with damaged(copies / "cache", name, change):
        refused_or(read)


@many("capture")
@given(st.sampled_from(["manifest.json", "tokens.parquet", "rows.parquet", "vocab.parquet"]), damage())
def test_any_bytes_of_a_capture_are_read_or_refused(copies, name, change):
    from qtarget.lens.replay import Replay

    def read() -> None:
        Replay(record.read(copies / "capture")).figures(qt.preset("sft"))

    with damaged(copies / "capture", name, change):
        refused_or(read)


@many("results")
@given(st.sampled_from(["eval.json", "samples/sums.jsonl", "problems/sums.jsonl"]), damage())
def test_any_bytes_of_results_are_read_or_refused(copies, name, change):
    from qtarget.evaluation import compare

    with damaged(copies / "results", name, change):
        refused_or(lambda: records.read_manifest(copies / "results"))
        refused_or(lambda: compare._groups(copies / "results"))


@many("checkpoint")
@given(
    st.sampled_from(["trainer_state.json", "qtarget.json", "optimizer.pt", "scheduler.pt", "model.safetensors"]),
    damage(),
)
def test_any_bytes_of_a_checkpoint_are_read_or_named(copies, name, change):
    from qtarget.training.saving import run_identity

    folder = copies / "stopped" / "checkpoint-1"
    with damaged(folder, name, change):
        assert all(isinstance(fault, str) and fault for fault in checkpoints.unreadable_files(folder))
        assert all(isinstance(fault, str) and fault for fault in run_identity.differences(folder, {}))


def test_the_world_s_own_files_are_right(world):
    """Undamaged, all of them are read: what is refused above is refused for its damage."""
    cache = CachedTeacher(world / "cache")
    cache.check_files(checksums=True)
    assert len(record.read(world / "capture")) and records.read_manifest(world / "results")
    assert checkpoints.unreadable_files(world / "stopped" / "checkpoint-1") == []
    assert yaml.safe_load((world / "config.yaml").read_text())["target"] == "target-sft"
    assert tiny_models.tokenizer()
