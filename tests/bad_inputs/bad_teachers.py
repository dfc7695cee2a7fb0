"""Teachers, references and what they read."""

from __future__ import annotations

from typing import Any

from bad_models import change, cut, nan_weights, pickled, without, write
from bench import Bench, Case, setting

KD: dict[str, Any] = {"target": "kd"}


def case_of_teacher(id: str, wrong: str, damage: Any, *says: str, reads: bool = False, **settings: Any) -> Case:
    """The world's teacher, damaged."""

    def do(bench: Bench) -> list[object]:
        folder = bench.copy("teacher")
        damage(folder)
        return bench.train(teacher_model_name_or_path=folder, **KD, **settings)

    return Case(id, wrong, do, says, reads)


def named(id: str, wrong: str, says: str | tuple[str, ...], world: str = "teacher", **settings: Any) -> Case:
    """One of the world's models for a teacher, with these settings."""

    def do(bench: Bench) -> list[object]:
        return bench.train(**{**KD, "teacher_model_name_or_path": bench.world / world, **settings})

    return Case(id, wrong, do, (says,) if isinstance(says, str) else says)


def context(id: str, wrong: str, template: Any, *says: str) -> Case:
    return named(id, wrong, says, teacher_context=template)


def pool(id: str, wrong: str, teachers: Any, *says: str) -> Case:
    return Case(id, wrong, lambda bench: bench.train(**KD, teachers=teachers), says)


SERVER = ["--server", "http://127.0.0.1:9", "--server_model", "m"]


def served(id: str, wrong: str, words: list[str], *says: str) -> Case:
    """A cache asked of a server."""

    def do(bench: Bench) -> list[object]:
        config = bench.config(**KD, teacher_model_name_or_path=bench.world / "teacher")
        return ["cache", "build", "--config", config, "-o", bench.folder / "cache", "--k", "2", *words]

    return Case(id, wrong, do, says)


CASES = [
    setting(
        "a-misspelt-folder",
        "a folder that is not there",
        "teacher_model_name_or_path is '../models/teacher', which cannot be loaded: no such folder exists here",
        **{**KD, "teacher_model_name_or_path": "../models/teacher"},
    ),
    setting(
        "a-misspelt-reference",
        "a folder that is not there",
        "reference_model_name_or_path is './referense', which cannot be loaded: no such folder exists here",
        target="asft",
        reference_model_name_or_path="./referense",
    ),
    setting(
        "none",
        "a target that needs one",
        "target kd(temperature=1.0) needs a teacher and got none; set teacher_model_name_or_path",
        **KD,
    ),
    setting(
        "no-folder",
        "no such teacher",
        ("teacher_model_name_or_path is 'nowhere/at/all'", "cannot be loaded"),
        teacher_model_name_or_path="nowhere/at/all",
        **KD,
    ),
    named(
        "another-tokenizer",
        "other tokens",
        ("teacher_model_name_or_path is", "has another tokenizer: id", "use a teacher of the same family"),
        world="stranger",
    ),
    case_of_teacher(
        "half-the-weights",
        "a file cut in half",
        cut("model.safetensors"),
        "teacher_model_name_or_path is",
        "cannot be loaded",
    ),
    case_of_teacher(
        "no-weights", "no weights", without("model.safetensors"), "teacher_model_name_or_path is", "cannot be loaded"
    ),
    case_of_teacher(
        "a-pickle",
        "weights that would run code: not run",
        pickled,
        "teacher_model_name_or_path is",
        "it is a pickle that asks for more than tensors; use weights in safetensors",
    ),
    case_of_teacher(
        "a-broken-config", "half a config.json", cut("config.json"), "teacher_model_name_or_path is", "cannot be loaded"
    ),
    case_of_teacher(
        "an-unknown-architecture",
        "a type nobody knows",
        change("config.json", model_type="lama"),
        "teacher_model_name_or_path is",
        "cannot be loaded",
    ),
    case_of_teacher(
        "no-tokenizer",
        "no tokenizer",
        without("tokenizer.json", "tokenizer_config.json"),
        "teacher_model_name_or_path is",
        "tokenizer cannot be loaded",
    ),
    case_of_teacher(
        "half-a-tokenizer",
        "a tokenizer cut in half",
        cut("tokenizer.json"),
        "teacher_model_name_or_path is",
        "tokenizer cannot be loaded",
    ),
    case_of_teacher(
        "a-smaller-head",
        "fewer rows than tokens",
        change("config.json", vocab_size=100),
        "teacher_model_name_or_path is",
        "cannot be loaded",
    ),
    case_of_teacher(
        "nan-weights", "NaN in the teacher", nan_weights, "the teacher gives NaN for one of the rows used", reads=True
    ),
    case_of_teacher(
        "code-of-its-own",
        "code that came with it: not run",
        lambda folder: (
            change("config.json", auto_map={"AutoConfig": "code.C"}, model_type="mine")(folder),
            write("code.py", "open(__file__ + '.ran', 'w')\n")(folder),
        ),
        "teacher_model_name_or_path is",
        "trust_remote_code",
    ),
    named(
        "a-dtype-in-words",
        "no such precision",
        ("teacher_model_name_or_path is", "float31"),
        teacher_model_init_kwargs={"dtype": "float31"},
    ),
    named(
        "an-unknown-keyword",
        "a keyword nobody takes",
        ("teacher_model_name_or_path is", "sped"),
        teacher_model_init_kwargs={"sped": 3},
    ),
    named(
        "rows-to-check-below-zero",
        "-1 rows",
        "teacher_check_rows is -1; use a whole number from 0",
        teacher_check_rows=-1,
    ),
    named("an-unknown-end", "no such way", "teacher_end_token is 'drop'", teacher_end_token="drop"),
    named("an-unknown-tail", "no such shape", "teacher_tail is 'flat'", teacher_tail="flat"),
    named(
        "two-teachers",
        "a model and an average",
        ("teacher_model_name_or_path and teacher_ema_decay are set", "keep one of them"),
        teacher_ema_decay=0.9,
    ),
    setting(
        "a-decay-of-one",
        "an average that never moves",
        "teacher_ema_decay is 1.0; use a number from 0 below 1",
        teacher_ema_decay=1.0,
        **KD,
    ),
    setting(
        "a-negative-decay", "below 0", "teacher_ema_decay is -0.5; use a number from 0", teacher_ema_decay=-0.5, **KD
    ),
    setting("a-nan-decay", "NaN", "teacher_ema_decay is nan; use a number", teacher_ema_decay=float("nan"), **KD),
    pool("a-pool-in-words", "text", "large and small", "teachers is 'large and small'; write a weight for each"),
    pool("an-empty-pool", "no teacher", [], "teachers is []; write a weight for each"),
    pool(
        "weights-that-sum-to-two",
        "twice everything",
        {"a/b": 1.0, "c/d": 1.0},
        "teachers: the weights sum to 2; let them sum to 1",
    ),
    pool("a-weight-of-nothing", "0", {"a/b": 0, "c/d": 1.0}, "teachers: the weight of a/b is 0; use a number above 0"),
    pool(
        "a-nan-in-a-pool",
        "NaN",
        {"a/b": float("nan"), "c/d": 1.0},
        "teachers: the weight of a/b is nan; use a number above 0",
    ),
    pool(
        "a-pool-with-a-typo",
        "an unknown key",
        [{"model": "a/b", "weight": 1}],
        "teachers holds {'model': 'a/b', 'weight': 1}; write model_name_or_path and weight",
    ),
    pool(
        "kwargs-of-a-pool-in-words",
        "text for a mapping",
        [{"model_name_or_path": "a/b", "weight": 1, "init_kwargs": "fp16"}],
        "teachers: init_kwargs of a/b is 'fp16'; write a mapping",
    ),
    context(
        "a-context-that-does-not-parse",
        "a template that is not closed",
        "{{ prompt }",
        "teacher_context.prompt is not a template",
    ),
    context("an-empty-context", "nothing to read", {}, "teacher_context is {}; write text"),
    context("an-unknown-place", "no such place", {"user": "{{ prompt }}"}, "teacher_context's key is 'user'"),
    context("a-context-of-numbers", "a number", {"prompt": 3}, "teacher_context.prompt is 3; write a template"),
    context(
        "a-column-that-is-not-there",
        "a column the rows have not",
        "{{ prompt }} {{ solution }}",
        "teacher_context.prompt: 'solution' is undefined; the rows have",
    ),
    context(
        "a-context-that-climbs",
        "a template that looks for Python's own objects",
        "{{ ''.__class__.__mro__ }}",
        "teacher_context.prompt",
        "unsafe",
    ),
    context(
        "a-context-without-an-end",
        "a loop of a billion",
        "{% for i in range(10 ** 9) %}{{ i }}{% endfor %}",
        "teacher_context.prompt cannot be filled in",
        "Range too big",
    ),
    context(
        "a-context-that-divides-by-zero",
        "an error in the template",
        "{{ 1 // 0 }}",
        "teacher_context.prompt cannot be filled in",
    ),
    context(
        "a-context-of-a-billion-letters",
        "a text that grows without end",
        "{{ 'x' * 10 ** 10 }}",
        "teacher_context.prompt cannot be filled in",
    ),
    setting(
        "no-reference",
        "no such reference",
        ("reference_model_name_or_path is 'no/where/here'", "cannot be loaded"),
        target="asft",
        reference_model_name_or_path="no/where/here",
    ),
    served("a-server-without-an-answer", "nobody listens", SERVER, "127.0.0.1:9"),
    served(
        "a-server-that-is-a-file",
        "a file for a server",
        ["--server", "file:///etc/passwd", "--server_model", "m"],
        "server is 'file:///etc/passwd'",
        "http",
    ),
    served(
        "a-server-that-is-no-address",
        "a word",
        ["--server", "there", "--server_model", "m"],
        "server is 'there'",
        "http",
    ),
    served(
        "coverage-of-a-server",
        "coverage needs a teacher that is loaded",
        [*SERVER, "--coverage", "0.9"],
        "keep one of them",
    ),
]
