"""``qtarget data``: measures the columns that iw-sft, psft and cft train on."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qtarget.cli import options
from qtarget.errors import ConfigError, unknown

_HELP = """\
usage: qtarget data weights  --config FILE [--fixed] -o DIR [--any_field value ...]
       qtarget data oldlogps --config FILE -o DIR [--any_field value ...]
       qtarget data critical --config FILE --verifier NAME -o DIR [--any_field value ...]

Measure a signal before training with it. The folder is a dataset: name it as dataset_name. Its signal.json says what it
was made from, and a run that differs in that is refused.

  weights   your rows with reference_logp, the mean log-prob of a row under the reference; iw-sft with weights: online
            then needs no second model
              --fixed             the column weight instead, of the model against another reference, for weights: column
  oldlogps  your rows as token ids with old_logps, the log-prob of each label under the model as it starts; for psft with
            psft_refresh: never
  critical  the model's own right answers to your prompts as token ids with critical, a mask of the tokens that decide;
            for cft. A search that was stopped goes on with the same command
              --verifier NAME     reasoning_gym:TASK, math_verify (both judge by the column answer, an unmarked text as a
                                  whole), math, choice (what the text marks), or your own function of (text, row):
                                  my_pkg.my_module:function
              --alternatives 2    how many next likeliest tokens are tried in place of each token
              --max_new_tokens 256, --batch_size 16
              --verifier_timeout 10   seconds; a call that takes longer counts as wrong
            Tokens are decoded in the precision of the weights: --dtype bfloat16 is faster on a GPU.
"""
# What a verb decides whatever the config says: the column its target needs is what is being made.
FIXED: dict[str, Any] = {
    "target": None,
    "targets": None,
    "eval_target": None,
    "loss_type": None,
    "label_smoothing_factor": 0.0,
    "denominator": "all_labels",
    "psft_refresh": 8,
    "teacher_model_name_or_path": None,
    "teachers": None,
    "teacher_cache": None,
    "teacher_ema_decay": None,
    "teacher_context": None,
    "packing": False,
    "eval_packing": False,
    "padding_free": False,
    "gradient_checkpointing": False,
    "lens_every": None,
    "eval_strategy": "no",
    "load_best_model_at_end": False,
    "resume_from_checkpoint": None,
}


def run(arguments: Sequence[str]) -> int:
    words = list(arguments)
    if not words or "-h" in words or "--help" in words:
        print(_HELP, end="")
        return 0
    from qtarget.cli import data_critical

    verbs = {"weights": _weights, "oldlogps": _old_logps, "critical": data_critical.run}
    if words[0] not in verbs:
        raise unknown("word after data", words[0], verbs)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("qtarget data runs in one process; start it without accelerate launch or torchrun")
    return verbs[words[0]](words[1:])


def folder_of(own: dict[str, Any]) -> Path:
    """Where the dataset goes."""
    if own["output"] is None:
        raise ConfigError("output is not set; name the folder of the new dataset, as in: -o my_rows")
    return Path(own["output"])


def bar(total: int, what: str) -> Callable[[int], None]:
    """A progress bar on a terminal; called with the number done so far."""
    from rich.progress import track

    steps = iter(track(range(total), description=what, disable=not sys.stderr.isatty()))
    seen = -1  # the first step only starts the bar

    def advance(done: int) -> None:
        nonlocal seen
        while seen < done:
            next(steps, None)
            seen += 1

    return advance


# -- a number per row or token -----------------------------------------------------------------------------------


def _weights(words: list[str]) -> int:
    own, rest = options.take(words, {"output": None}, ["fixed"])
    folder = folder_of(own)
    from qtarget.cli import setup
    from qtarget.signals import origin, weights

    asked = setup.read(rest, FIXED, trains=False)
    originals = asked.datasets
    weights.check(asked.config, asked.model, own["fixed"])
    about = {
        "reference": origin.reference_of(asked.config, asked.model),
        "weights_temperature": asked.config.weights_temperature if own["fixed"] else None,
    }
    return _measured(
        asked,
        folder,
        ("weights", weights.column_of(own["fixed"]), about),
        lambda trainer, tell, step: weights.tables(trainer, originals, own["fixed"], tell, step),
    )


def _old_logps(words: list[str]) -> int:
    own, rest = options.take(words, {"output": None})
    folder = folder_of(own)
    from qtarget.cli import setup
    from qtarget.signals import old_logps

    asked = setup.read(rest, FIXED, trains=False)
    return _measured(asked, folder, ("old_logps", old_logps.COLUMN, {}), old_logps.tables)


def _measured(asked: Any, folder: Path, made: tuple[str, str, dict[str, Any]], tables: Callable) -> int:
    """Write the splits with a column measured by forward passes. ``made``: kind, column, further settings."""
    from qtarget.cli import setup
    from qtarget.signals import manifest, scoring

    kind, column, about = made
    originals = asked.datasets
    numbered = scoring.numbered(originals, column)
    settings = settings_of(asked, kind, column, about)
    manifest.free(folder, settings)
    asked.datasets = numbered
    trainer = setup.build(asked)
    ready = scoring.prepared(trainer)
    count = sum(map(len, ready.values()))
    tokens = sum(scoring.supervised(labels) for rows in ready.values() for labels in rows["labels"])
    print(f"{count} rows, {tokens} supervised tokens", flush=True)
    manifest.begin(folder, settings)
    advance, done = bar(count, column), 0
    advance(0)

    def step() -> None:
        nonlocal done
        done += 1
        advance(done)

    results = tables(trainer, lambda seconds: print(f"about {duration(seconds)}", flush=True), step)
    dropped = {split: len(originals[split]) - len(ready.get(split, ())) for split in originals}
    manifest.finish(folder, settings, results, {"dropped": dropped})
    for split, number in dropped.items():
        if number:
            print(f"left out   {number} of {len(originals[split])} rows of {split}: no supervised token")
    tell_end(folder, column)
    return 0


def settings_of(asked: Any, kind: str, column: str, about: dict[str, Any]) -> dict[str, Any]:
    from qtarget.signals import manifest, origin

    script = asked.script
    dataset = {
        "name": script.dataset_name,
        "config": script.dataset_config,
        "rows": {split: len(rows) for split, rows in asked.datasets.items()},
    }
    tokenizer = origin.tokenizer_of(asked.config, asked.model)
    return manifest.describe(
        kind, [column], asked.config, asked.model, tokenizer, {"dataset": dataset, "dtype": asked.model.dtype, **about}
    )


def tell_end(folder: Path, column: str) -> None:
    print(f"column     {column}")
    print(f"dataset    {folder}")
    print(f"next       qtarget train --config FILE --dataset_name {folder}")


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
