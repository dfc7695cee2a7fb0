"""``qtarget data``: measures the columns that iw-sft, psft and cft train on.

They are measured with the run's own model and rows. The folder is a dataset: name it as dataset_name. Its signal.json
says what it was made from; a run that differs from it is refused.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qtarget.cli import setup, terminal
from qtarget.cli.arguments import ABOVE_ZERO, FOLDER, NAME, Option, Verb, whole
from qtarget.errors import ConfigError

VERB = Verb("data", __doc__)
_OUTPUT = Option(
    "output", "folder of the new dataset", FOLDER, mend="name the folder of the new dataset, as in: -o my_rows"
)


# -- a number per row or token -----------------------------------------------------------------------------------


@VERB.command(
    _OUTPUT,
    Option("fixed", "measure the column weight instead (the model against another reference), for weights: column"),
    word="weights",
    settings=True,
)
def measure_weights(options: Any) -> int:
    """Adds the column reference_logp to your rows, the mean log-prob of a row under the reference; iw-sft with weights:
    online then needs no second model.
    """
    from qtarget.signals import manifest, scoring

    run = _read_run(options)
    originals = run.datasets
    scoring.validate_reference(run.config, run.model, options.fixed)
    about = {
        "reference": manifest.reference_of(run.config, run.model),
        "weights_temperature": run.config.weights_temperature if options.fixed else None,
    }

    return _measured(
        run,
        options.output,
        ("weights", scoring.weight_column(options.fixed), about),
        functools.partial(scoring.weights, originals=originals, fixed=options.fixed),
    )


@VERB.command(_OUTPUT, word="oldlogps", settings=True)
def measure_old_logps(options: Any) -> int:
    """Your rows as token ids with the column old_logps, the log-prob of each label under the initial model; for psft
    with psft_refresh: never.
    """
    from qtarget.signals import scoring

    return _measured(_read_run(options), options.output, ("old_logps", "old_logps", {}), scoring.old_logps)


def _read_run(options: Any, **how: Any) -> setup.Run:
    """The run of the config: rows one by one, no target or teacher, since the column a target needs is what is made."""
    terminal.refuse_processes("qtarget data")
    fixed = {**setup.MEASURES, **setup.NO_TARGET, **setup.NO_TEACHER, "target": None, "psft_refresh": 8}
    fixed |= {"packing": False, "eval_packing": False, "padding_free": False}
    return setup.read(options.words, fixed, trains=False, **how)


def _measured(run: setup.Run, folder: Path, made: tuple[str, str, dict[str, Any]], tables: Callable) -> int:
    """Write the splits with a column measured by forward passes. ``made``: kind, column, further settings."""
    from qtarget.signals import manifest, scoring

    kind, column, about = made
    originals, numbered = run.datasets, scoring.numbered(run.datasets, column)
    settings = _settings(run, kind, column, about)
    manifest.free(folder, settings)
    run.datasets = numbered
    trainer = setup.build(run)
    ready = scoring.prepared(trainer)
    count = sum(map(len, ready.values()))
    tokens = sum(scoring.supervised(labels) for rows in ready.values() for labels in rows["labels"])
    print(f"{count} rows, {tokens} supervised tokens", flush=True)
    manifest.begin(folder, settings)
    advance, done = terminal.bar(count, column), itertools.count()
    advance(next(done))
    results = tables(
        trainer,
        lambda seconds: print(f"about {terminal.duration(seconds)}", flush=True),
        lambda: advance(next(done)),
    )
    dropped = {split: len(originals[split]) - len(ready.get(split, ())) for split in originals}
    manifest.finish(folder, settings, results, {"dropped": dropped})
    for split, left_out in dropped.items():
        if left_out:
            print(f"dropped    {left_out} of {len(originals[split])} rows of {split}: no supervised token")
    _show_next(folder, column)
    return 0


def _settings(run: setup.Run, kind: str, column: str, about: dict[str, Any]) -> dict[str, Any]:
    from qtarget.signals import manifest

    script = run.script
    dataset = {
        "name": script.dataset_name,
        "config": script.dataset_config,
        "rows": {split: len(rows) for split, rows in run.datasets.items()},
    }
    about = {"dataset": dataset, "dtype": run.model.dtype, **about}
    return manifest.describe(kind, column, run.config, run.model, about)


def _show_next(folder: Path, column: str) -> None:
    print(f"column     {column}")
    print(f"dataset    {folder}")
    print(f"next       qtarget train --config FILE --dataset_name {folder}")


# -- tokens that decide ------------------------------------------------------------------------------------------


@VERB.command(
    _OUTPUT,
    Option(
        "verifier",
        "reasoning_gym:TASK, math_verify (both judge by the column answer, an unmarked text as a whole), math, choice "
        "(what the text marks), or your own function of (text, row): "
        "my_pkg.my_module:function",
        NAME,
        mend="use reasoning_gym:TASK, math_verify or my_pkg.my_module:function",
    ),
    Option("verifier_timeout", "seconds; a call that takes longer counts as wrong", ABOVE_ZERO, 10.0),
    Option("alternatives", "how many of the next likeliest tokens to try in place of each token", whole(1), 2),
    Option("max_new_tokens", "the longest answer, in tokens", whole(1), 256),
    Option("batch_size", "answers generated at once", whole(1), 16),
    word="critical",
    settings=True,
)
def search_critical(options: Any) -> int:
    """The model's own right answers to your prompts as token ids, with the column critical, a mask of the tokens that
    decide; for cft. An interrupted search resumes with the same command. Tokens are decoded in the precision of the
    weights: --dtype bfloat16 is faster on a GPU.
    """
    folder = options.output
    from datasets import Dataset

    from qtarget.evaluation import graders
    from qtarget.evaluation.grading import Grader
    from qtarget.signals import critical, manifest
    from qtarget.signals.decoding import Greedy

    run = _read_run(options, trainable=False)
    rows = _prompt_rows(run)
    graders.check(options.verifier, rows.column_names)
    shaping = ("verifier", "verifier_timeout", "alternatives", "max_new_tokens")
    about = {**{name: getattr(options, name) for name in shaping}, "content": _content(rows)}
    run.datasets = {"train": rows}
    settings = _settings(run, "critical", critical.COLUMN, about)
    manifest.free(folder, settings)
    # The trainer holds model and tokenizer here and trains nothing; prompts alone it would refuse.
    run.datasets = {"train": Dataset.from_list([{"input_ids": [0, 0], "labels": [0, 0]}])}
    trainer = setup.build(run)
    greedy = Greedy(trainer, options.max_new_tokens)
    prompts = [greedy.prompt(row, number) for number, row in enumerate(rows)]
    manifest.begin(folder, settings)
    file = folder / "progress.jsonl"
    progress = critical.Progress(file)
    print(
        f"{len(rows)} rows, {sum(map(len, prompts))} prompt tokens, {len(progress.done)} done before; for each token "
        f"of a right answer up to {options.alternatives} answers of up to {options.max_new_tokens} tokens",
        flush=True,
    )
    with Grader(options.verifier, options.verifier_timeout, whole_text=True) as grader:
        search = critical.Search(greedy, grader, rows, prompts, options.alternatives, options.batch_size, progress)
        search.run(_progress(len(rows), len(progress.done)))
    counts = critical.report(progress.done.values())
    source = run.config.source_column
    others = {source: rows[source]} if source in rows.column_names else {}
    made = critical.table(progress.done, prompts, others)
    manifest.finish(folder, settings, {"train": made}, {"report": counts})
    file.unlink()
    _report(counts, grader.last_error)
    longer = sum(len(ids) > (run.config.max_length or len(ids)) for ids in made["input_ids"])
    if longer:
        print(f"note       {longer} rows are longer than max_length {run.config.max_length}, where training cuts them")
    _show_next(folder, critical.COLUMN)
    return 0


def _prompt_rows(run: setup.Run) -> Any:
    from datasets import Dataset

    rows = run.datasets["train"]
    if not isinstance(rows, Dataset):
        raise ConfigError("dataset_streaming is true, but the rows of a stream are not numbered; set it to false")
    if not {"prompt", "messages", "conversations"} & set(rows.column_names):
        raise ConfigError(
            f"the train split has columns {', '.join(rows.column_names)}, but critical answers prompts; give it prompt "
            "or messages"
        )
    return rows


def _content(rows: Any) -> str:
    """What tells other rows of the same dataset's name."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, default=str, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _progress(total: int, before: int) -> Callable[[int, int], None]:
    """The bar, and an estimate once the first right answer was searched: those that are wrong take next to no time."""
    step = terminal.timed_bar(total, "critical", "problems", before)
    return lambda done, searched: step(done, tells=bool(searched))


def _report(counts: dict[str, Any], last_error: str | None) -> None:
    share = counts["critical"] / counts["tokens"]
    print(f"problems   {counts['problems']}, answered to the end {counts['ended']}, correctly {counts['correct']}")
    print(f"tokens     {counts['tokens']} of right answers, critical {counts['critical']} ({share:.1%})")
    print(f"verifier   timed out {counts['timeouts']} times, failed {counts['errors']} times", end="")
    print(f", most recently with: {last_error}" if last_error else "")
