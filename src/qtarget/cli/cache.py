"""``qtarget cache``: asks a teacher once, keeps its answers on disk, and checks them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qtarget.cli import options
from qtarget.errors import ConfigError, unknown

_HELP = """\
usage: qtarget cache build --config FILE [-o DIR] [--k 64 | --coverage 0.995] [--cache_dtype float16|float32]
                           [--batch_size 8] [--shard_tokens N] [--server URL [--server_model NAME]]
                           [--any_field value ...]
       qtarget cache inspect DIR [--verify]
       qtarget cache doctor --config FILE [--cache DIR] [--rows 50] [--json FILE] [--any_field value ...]

Ask a teacher once about every supervised token of a dataset, and train from its answers as often as you like.

  build     the teacher's k likeliest tokens and the mass of the rest, for the rows as `qtarget train` would prepare them;
            run again after an interruption, it goes on where it stopped
  inspect   what a cache was built for and of; --verify reads every file and compares checksums
  doctor    asks the live teacher again about some rows: the mass that was left out, and the error of the target and
            of the gradient that comes of it

--k keeps so many tokens; --coverage takes the k whose mean kept mass reaches that share on a sample of rows. The folder
is -o, or the config's teacher_cache. --server asks a vLLM server instead of loading the teacher.
"""
# What a build decides, whatever the config says; packing and shuffling change no row.
_FIXED: dict[str, Any] = {
    "target": "kd",
    "targets": None,
    "eval_target": None,
    "loss_type": None,
    "label_smoothing_factor": 0.0,
    "teacher_cache": None,
    "teacher_end_token": "label",
    "packing": False,
    "padding_free": False,
    "shuffle_dataset": False,
    "gradient_checkpointing": False,
    "denominator": "all_labels",  # others ask for a target with columns
    "push_to_hub": False,
}


def run(arguments: Sequence[str]) -> int:
    words = list(arguments)
    if not words or "-h" in words or "--help" in words:
        print(_HELP, end="")
        return 0
    verbs = {"build": _build, "inspect": _inspect, "doctor": _doctor}
    if words[0] not in verbs:
        raise unknown("word after cache", words[0], verbs)
    return verbs[words[0]](words[1:])


def fixed_settings(rest: Sequence[str], **more: Any) -> dict[str, Any]:
    """Settings under which rows come one by one and as the config's own packing would cut them."""
    from qtarget.cli import settings

    asked = settings.read(rest).values["training"]
    fixed = {**_FIXED, **more}
    if asked.get("packing"):
        fixed["truncation_mode"] = "keep_start"
        if asked.get("packing_strategy", "bfd") != "bfd":  # rows go on in the next sequence: nothing is cut
            fixed["max_length"] = None
    return fixed


def _build(words: list[str]) -> int:
    own: dict[str, Any] = {"output": None, "k": None, "coverage": None, "cache_dtype": "float16", "batch_size": 8}
    own |= {"shard_tokens": None, "server": None, "server_model": None}
    given, rest = options.take(words, own)
    settings = _checked(given)
    from rich.progress import Progress

    from qtarget.cli import setup
    from qtarget.teachers import settings as teacher_settings
    from qtarget.teachers.cache import build as cache_build
    from qtarget.teachers.cache import scorers as cache_scorers

    server = given["server"] is not None
    run = setup.read(rest, fixed_settings(rest, **({"target": "sft"} if server else {})), trains=False)
    folder = Path(given["output"] or _config_value(rest, "teacher_cache") or "")
    if folder == Path(""):
        raise ConfigError("output is not set; name the cache's folder as -o DIR, or as teacher_cache in the config")
    if run.config.teacher_ema_decay is not None:
        raise ConfigError(
            "teacher_ema_decay is set: the average of a student in training is another teacher at every step and cannot "
            "be kept; name a teacher_model_name_or_path"
        )
    if server and run.config.teacher_model_name_or_path is None:
        raise ConfigError("--server needs teacher_model_name_or_path too: the served model's name, for its tokenizer")
    from qtarget.training.trainer import RowsTrainer

    trainer = setup.build(run, RowsTrainer, weights=False)
    plan = cache_build.plan(trainer, settings["shard_tokens"])
    scorer, about = None, cache_build.about(trainer)
    if server:
        scorer, served = cache_scorers.server_scorer(trainer, given["server"], given["server_model"], settings["k"])
        about["teacher"] |= {"weights": None, "served_as": served}
    k = settings["k"]
    cache_build.check_folder(folder, plan, k, given["cache_dtype"], about)
    if settings["coverage"] is not None:
        k, about["coverage"] = cache_build.needed_for(trainer, plan, settings["coverage"])
        _tell_coverage(k, about["coverage"])
    if k > trainer.vocab_size:
        raise ConfigError(f"k is {k}, more than the vocabulary's {trainer.vocab_size} tokens; keep fewer")
    megabytes = plan.megabytes(k, given["cache_dtype"])
    cache_build.check_room(folder, megabytes)
    repeated = f" ({plan.repeated} more are the same as another)" if plan.repeated else ""
    print(f"rows       {len(plan.rows)}{repeated}, {plan.tokens} supervised tokens, as {len(plan.shards)} files")
    print(f"teacher    {teacher_settings.describe(about['teacher'])}")
    time = "" if server else f", about {_time(cache_build.seconds_for(trainer, plan, settings['batch_size']))}"
    print(f"size       {megabytes:.1f} MB for k = {k}, {given['cache_dtype']}, in {folder}{time}", flush=True)
    with Progress(disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("asking the teacher", total=plan.tokens)
        cache_build.build(
            trainer,
            folder,
            plan,
            k,
            dtype=given["cache_dtype"],
            about=about,
            scorer=scorer,
            batch_size=settings["batch_size"],
            progress=lambda tokens: bar.advance(task, tokens),
        )
    print(f"cache      {folder}")
    print(
        f"next       qtarget cache doctor --config FILE --cache {folder}  |  qtarget train ... --teacher_cache {folder}"
    )
    return 0


def _checked(given: dict[str, Any]) -> dict[str, Any]:
    """The options of a build in their types, before anything is loaded."""
    from qtarget.teachers.cache.manifest import DTYPES

    if given["k"] is not None and given["coverage"] is not None:
        raise ConfigError("--k and --coverage are both given; keep one of them")
    if given["cache_dtype"] not in DTYPES:
        raise unknown("cache_dtype", given["cache_dtype"], DTYPES)
    checked: dict[str, Any] = {"coverage": None, "k": None, "shard_tokens": None}
    if given["coverage"] is None:
        checked["k"] = options.whole("k", 64 if given["k"] is None else given["k"], 1)
    else:
        coverage = checked["coverage"] = options.number("coverage", given["coverage"])
        if not 0 < coverage < 1:
            raise ConfigError(f"coverage is {coverage:g}; use a share of the teacher's mass above 0 and below 1")
        if given["server"] is not None:
            raise ConfigError("--coverage needs a teacher that is loaded; with --server give --k")
    checked["batch_size"] = options.whole("batch_size", given["batch_size"], 1)
    if given["shard_tokens"] is not None:
        checked["shard_tokens"] = options.whole("shard_tokens", given["shard_tokens"], 1)
    return checked


def _config_value(rest: Sequence[str], name: str) -> Any:
    from qtarget.cli import settings

    return settings.read(rest).values["training"].get(name)


def _tell_coverage(k: int, found: dict[str, Any]) -> None:
    needed = ", ".join(f"{percent} % of tokens need {n} or fewer" for percent, n in found["needed_k"].items())
    kept = ", ".join(f"{n}: {mass:.4f}" for n, mass in found["kept_mass"].items())
    print(f"coverage   k = {k} keeps a mean mass of {found['coverage']:g} ({found['sampled_tokens']} tokens looked at)")
    print(f"           to keep that much of each, {needed}")
    print(f"           mean kept mass by k: {kept}")


def _time(seconds: float) -> str:
    hours, minutes = seconds / 3600, seconds / 60
    return f"{hours:.1f} h" if hours >= 1 else f"{minutes:.0f} min" if minutes >= 2 else f"{seconds:.0f} s"


def _inspect(words: list[str]) -> int:
    given, rest = options.take(words, {}, ["verify"])
    if len(rest) != 1:
        raise ConfigError(f"{' '.join(rest) or 'nothing'} was named where the folder of one cache is asked for")
    from qtarget.teachers import settings as teacher_settings
    from qtarget.teachers.cache import manifest as manifests
    from qtarget.teachers.cache.reader import CachedTeacher

    manifest = manifests.read(rest[0])
    size = sum(line["bytes"] for line in manifest["shards"]) / 2**20
    done, planned = len(manifest["shards"]), manifest["planned_shards"]
    preparation = ", ".join(f"{name} {value}" for name, value in manifest["preparation"].items())
    lines = {
        "state": manifest["state"] + ("" if done == planned else f": {done} of {planned} files"),
        "teacher": teacher_settings.describe(manifest["teacher"]),
        "context": manifest["teacher_context"] or "none: it reads what the student reads",
        "rows": f"{manifest['rows']}, {manifest['tokens']} supervised tokens",
        "kept": f"{manifest['k']} tokens each, {manifest['dtype']}, {size:.1f} MB in {done} files",
        "tokenizer": f"{manifest['tokenizer']}, {manifest['vocab_size']} tokens; template {manifest['chat_template']}",
        "preparation": preparation,
        "program": manifest["program"],
    }
    for name, value in lines.items():
        print(f"{name:<12} {value}")
    cache = CachedTeacher(rest[0])
    cache.check_files(checksums=given["verify"])
    print(f"{'files':<12} " + ("all as they were written" if given["verify"] else "all there; --verify reads them"))
    return 0


def _doctor(words: list[str]) -> int:
    given, rest = options.take(words, {"cache": None, "rows": 50, "json": None})
    rows = options.whole("rows", given["rows"], 1)
    if given["json"] is not None:
        options.writable("json", Path(given["json"]))
    folder = given["cache"] or _config_value(rest, "teacher_cache")
    if folder is None:
        raise ConfigError("teacher_cache is not set; name the folder as --cache DIR, or as teacher_cache in the config")
    from qtarget.teachers.cache.reader import CachedTeacher

    cache = CachedTeacher(folder)
    cache.check_files(checksums=True)
    import json

    from rich.console import Console

    from qtarget.cli import setup
    from qtarget.teachers.cache import doctor as cache_doctor

    asked = _config_value(rest, "target")
    named = _config_value(rest, "teacher_model_name_or_path") or _config_value(rest, "teachers")
    had = cache.manifest["teacher"]
    if named is None and "pool" not in had:  # the cache says which teacher it is of
        rest = [*rest, "--teacher_model_name_or_path", had["name"]]
    fixed = fixed_settings(rest, teacher_context=cache.manifest["teacher_context"])
    run = setup.read(rest, fixed, trains=False)
    run.datasets.pop("test", None)
    trainer = setup.build(run)
    report = cache_doctor.examine(trainer, cache, rows, asked)
    console = Console() if sys.stdout.isatty() else Console(width=120)
    for part in report.shown():
        console.print(part, markup=False, highlight=False)
    if given["json"] is not None:
        Path(given["json"]).write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
    return 0
