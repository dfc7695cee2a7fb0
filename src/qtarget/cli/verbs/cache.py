"""``qtarget cache``: asks a teacher once, stores its answers on disk, and checks them.

The teacher is asked about every supervised token of a dataset once; any number of runs can train from the cache.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

from qtarget.cli import setup, terminal
from qtarget.cli.arguments import ABOVE_ZERO, FLAG, FOLDER, NAME, NEW_FILE, Kind, Option, Verb, one_of, only, whole
from qtarget.errors import ConfigError

VERB = Verb("cache", __doc__)
_K = 64
_ALL = 0.99995  # of the mass: no teacher of its own is so sure at every token


def _share(name: str, text: Any) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < 1:
            return float(text)
    raise ConfigError(f"{name} is {text}; use a share of the teacher's probability above 0 and below 1")


_SHARE = Kind("X", _share)


@VERB.command(
    Option("output", "folder of the cache; unset: teacher_cache of the config", FOLDER),
    Option("k", f"how many of the likeliest tokens to keep at each label; unset: {_K}", whole(1)),
    Option(
        "coverage", "instead of k: use the k that keeps this mean share of the probability on a sample of rows", _SHARE
    ),
    Option("cache_dtype", "precision of the log-probs", one_of("float16", "float32"), "float16"),
    Option("batch_size", "rows per forward pass", whole(1), 8),
    Option("shard_tokens", "supervised tokens per file", whole(1)),
    Option("server", "URL of a vLLM server, used instead of loading the teacher", NAME),
    Option("server_model", "what the server calls the teacher", NAME),
    Option("server_timeout", "seconds to wait for an answer from the server", ABOVE_ZERO, 120.0),
    word="build",
    settings=True,
)
def build(options: Any) -> int:
    """The teacher's k likeliest tokens and the mass of the rest, for the rows as `qtarget train` would prepare them;
    run again after an interruption, it resumes where it stopped.
    """
    if options.coverage is not None and options.k is not None:
        raise ConfigError("--k and --coverage are both given; keep one of them")
    if options.coverage is not None and options.server is not None:
        raise ConfigError("--coverage needs a teacher that is loaded; with --server give --k")
    k = options.k if options.k or options.coverage else _K
    from rich.progress import Progress

    from qtarget.cli import settings
    from qtarget.teachers import settings as teacher_settings
    from qtarget.teachers.cache import build as cache_build
    from qtarget.teachers.cache import scorers as cache_scorers
    from qtarget.teachers.cache.reader import CachedTeacher
    from qtarget.training.preparing import RowsTrainer

    server, dtype = options.server is not None, options.cache_dtype
    fixed = setup.row_by_row(options.words, target="sft" if server else "kd")
    run = setup.read(options.words, fixed, trains=False)
    named = settings.read(options.words).values["training"].get("teacher_cache")
    folder = options.output or Path(named or "")
    if folder == Path(""):
        raise ConfigError("output is not set; name the cache's folder as -o DIR, or as teacher_cache in the config")
    if run.config.teacher_ema_decay is not None:
        raise ConfigError(
            "teacher_ema_decay is set: the average of a student in training changes at every step and cannot be "
            "cached; name a teacher_model_name_or_path"
        )
    if server and run.config.teacher_model_name_or_path is None:
        raise ConfigError("--server needs teacher_model_name_or_path too: the served model's name, for its tokenizer")
    trainer = setup.build(run, RowsTrainer, weights=False)
    plan = cache_build.plan(trainer, options.shard_tokens)
    scorer, about = None, cache_build.about(trainer)
    if server:
        longest = 0 if run.config.teacher_context else max(row.length for row in plan.rows)
        scorer, served = cache_scorers.server_scorer(
            trainer, options.server, options.server_model, k, longest, options.server_timeout
        )
        about["teacher"] |= {"weights": None, "served_as": served}
    cache_build.check_folder(folder, plan, k, dtype, about)
    if options.coverage is not None:
        k, about["coverage"] = cache_build.needed_for(trainer, plan, options.coverage)
        _show_coverage(k, about["coverage"])
    if k > trainer.vocab_size:
        raise ConfigError(f"k is {k}, more than the vocabulary's {trainer.vocab_size} tokens; use a smaller k")
    megabytes = plan.megabytes(k, dtype)
    cache_build.check_room(folder, megabytes)
    repeated = f" ({plan.repeated} duplicates not counted)" if plan.repeated else ""
    print(f"rows       {len(plan.rows)}{repeated}, {plan.tokens} supervised tokens, as {len(plan.shards)} files")
    print(f"teacher    {teacher_settings.describe(about['teacher'])}")
    time = "" if server else f", about {terminal.duration(cache_build.seconds_for(trainer, plan, options.batch_size))}"
    print(f"size       {megabytes:.1f} MB for k = {k}, {dtype}, in {folder}{time}", flush=True)
    with Progress(disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("asking the teacher", total=plan.tokens)
        cache_build.build(
            trainer,
            folder,
            plan,
            k,
            dtype=dtype,
            about=about,
            scorer=scorer,
            batch_size=options.batch_size,
            progress=lambda tokens: bar.advance(task, tokens),
        )
    mean, least = CachedTeacher(folder).kept_mass()
    print(f"kept       {_kept(mean, least)}")
    if server and least > _ALL and k < trainer.vocab_size:
        print(
            "note: the kept tokens have all the probability at every position: the server may give log-probabilities "
            "after a temperature, top-k or top-p; start vLLM with --logprobs-mode raw_logprobs"
        )
    print(f"cache      {folder}")
    print(
        f"next       qtarget cache doctor --config FILE --cache {folder}  |  qtarget train ... --teacher_cache {folder}"
    )
    return 0


def _kept(mean: float, least: float) -> str:
    return f"{mean:.3%} of the teacher's probability on average, {least:.3%} at least"


def _show_coverage(k: int, found: dict[str, Any]) -> None:
    needed = ", ".join(f"{percent} % of tokens need {n} or fewer" for percent, n in found["needed_k"].items())
    kept = ", ".join(f"{n}: {mass:.4f}" for n, mass in found["kept_mass"].items())
    print(f"coverage   k = {k} keeps a mean mass of {found['coverage']:g} ({found['sampled_tokens']} tokens sampled)")
    print(f"           to keep that much at each token, {needed}")
    print(f"           mean kept mass by k: {kept}")


@VERB.command(Option("verify", "read every file and compare checksums", FLAG), word="inspect", takes="DIR")
def inspect(options: Any) -> int:
    """Shows what a cache was built from and for."""
    folder = only(options.words, "the folder of one cache, as in: qtarget cache inspect my_cache")
    from qtarget.teachers import settings as teacher_settings
    from qtarget.teachers.cache import manifest as manifests
    from qtarget.teachers.cache.reader import CachedTeacher

    manifest = manifests.read(folder)
    size = sum(line["bytes"] for line in manifest["shards"]) / 2**20
    done, planned = len(manifest["shards"]), manifest["planned_shards"]
    lines = {
        "state": manifest["state"] + ("" if done == planned else f": {done} of {planned} files"),
        "teacher": teacher_settings.describe(manifest["teacher"]),
        "context": manifest["teacher_context"] or "none: it reads what the student reads",
        "rows": f"{manifest['rows']}, {manifest['tokens']} supervised tokens",
        "kept": f"{manifest['k']} tokens each, {manifest['dtype']}, {size:.1f} MB in {done} files",
        "tokenizer": f"{manifest['tokenizer']}, {manifest['vocab_size']} tokens; template {manifest['chat_template']}",
        "preparation": ", ".join(f"{name} {value}" for name, value in manifest["preparation"].items()),
        "program": manifest["program"],
    }
    for name, value in lines.items():
        print(f"{name:<12} {value}")
    cache = CachedTeacher(folder)
    cache.check_files(checksums=options.verify)
    print(f"{'mass':<12} {_kept(*cache.kept_mass())}")
    print(f"{'files':<12} " + ("all unchanged" if options.verify else "all present; --verify checks their contents"))
    return 0


@VERB.command(
    Option("cache", "folder of the cache; unset: teacher_cache of the config", FOLDER),
    Option("rows", "how many rows to ask about, evenly spread", whole(1), 50),
    Option("json", "also write every figure to a file", NEW_FILE),
    word="doctor",
    settings=True,
)
def doctor(options: Any) -> int:
    """Asks the live teacher again about some rows: how much probability the cache leaves out, and the error that causes
    in the target and the gradient.
    """
    from qtarget.cli import settings
    from qtarget.teachers.cache.reader import CachedTeacher

    rest = options.words
    given = settings.read(rest).values["training"]
    folder = options.cache or given.get("teacher_cache")
    if folder is None:
        raise ConfigError("teacher_cache is not set; name the folder as --cache DIR, or as teacher_cache in the config")
    cache = CachedTeacher(folder)
    cache.check_files(checksums=True)
    from qtarget.teachers.cache import doctor as cache_doctor

    named = given.get("teacher_model_name_or_path") or given.get("teachers")
    had = cache.manifest["teacher"]
    if named is None and "pool" not in had:  # the cache says which teacher it is of
        rest = [*rest, "--teacher_model_name_or_path", had["name"]]
    fixed = setup.row_by_row(rest, target="kd", teacher_context=cache.manifest["teacher_context"])
    run = setup.read(rest, fixed, trains=False)
    run.datasets.pop("test", None)
    report = cache_doctor.examine(setup.build(run), cache, options.rows, given.get("target"))
    console = terminal.console(120)
    for part in report.shown():
        console.print(part, markup=False)
    if options.json is not None:
        options.json.write_text(terminal.as_json(report.to_dict()), encoding="utf-8")
    return 0
