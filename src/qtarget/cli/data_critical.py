"""``qtarget data critical``: searches for the tokens that cft trains on."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from typing import Any

from qtarget.cli import data, options
from qtarget.errors import ConfigError, check_range


def run(words: list[str]) -> int:
    own, rest = options.take(
        words,
        {
            "output": None,
            "verifier": None,
            "verifier_timeout": 10.0,
            "alternatives": 2,
            "max_new_tokens": 256,
            "batch_size": 16,
        },
    )
    folder = data.folder_of(own)
    if not own["verifier"]:
        raise ConfigError("verifier is not set; use reasoning_gym:TASK, math_verify or my_pkg.my_module:function")
    numbers = {name: options.whole(name, own[name], 1) for name in ("alternatives", "max_new_tokens", "batch_size")}
    timeout = options.number("verifier_timeout", own["verifier_timeout"])
    check_range("verifier_timeout", timeout, 0, open_low=True)
    from qtarget.cli import setup
    from qtarget.evaluation import graders
    from qtarget.evaluation.grading import Grader
    from qtarget.signals import critical, manifest
    from qtarget.signals.decoding import Greedy
    from qtarget.signals.progress import Progress

    asked = setup.read(rest, data.FIXED, trains=False, trainable=False)
    rows = _prompt_rows(asked)
    graders.check(own["verifier"], rows.column_names)
    about = {
        "verifier": own["verifier"],
        "verifier_timeout": timeout,
        "alternatives": numbers["alternatives"],
        "max_new_tokens": numbers["max_new_tokens"],
        "content": _content(rows),
    }
    asked.datasets = {"train": rows}
    settings = data.settings_of(asked, "critical", critical.COLUMN, about)
    manifest.free(folder, settings)
    asked.datasets = {"train": _stand_in()}
    trainer = setup.build(asked)
    greedy = Greedy(trainer, numbers["max_new_tokens"])
    prompts = [*critical.prompts_of(greedy, rows)]
    manifest.begin(folder, settings)
    file = folder / "progress.jsonl"
    progress = Progress(file)
    print(
        f"{len(rows)} rows, {sum(map(len, prompts))} tokens of prompts, {len(progress.done)} done before; for each "
        f"token of a right answer up to {numbers['alternatives']} answers of up to {numbers['max_new_tokens']} tokens",
        flush=True,
    )
    with Grader(own["verifier"], timeout, whole_text=True) as grader:
        search = critical.Search(
            greedy, grader, rows, prompts, numbers["alternatives"], numbers["batch_size"], progress
        )
        search.run(_telling(len(rows), len(progress.done)))
    counts = critical.report(progress.done.values())
    source = asked.config.source_column
    others = {source: rows[source]} if source in rows.column_names else {}
    made = critical.table(progress.done, prompts, others)
    manifest.finish(folder, settings, {"train": made}, {"report": counts})
    file.unlink()
    _report(counts, grader.last_error)
    longer = sum(len(ids) > (asked.config.max_length or len(ids)) for ids in made["input_ids"])
    if longer:
        print(
            f"note       {longer} rows are longer than max_length {asked.config.max_length}, at which training cuts them"
        )
    data.tell_end(folder, critical.COLUMN)
    return 0


def _prompt_rows(asked: Any) -> Any:
    from datasets import Dataset

    rows = asked.datasets["train"]
    if not isinstance(rows, Dataset):
        raise ConfigError("dataset_streaming is true, but rows of a stream have no number; set it to false")
    if not {"prompt", "messages", "conversations"} & set(rows.column_names):
        raise ConfigError(
            f"the train split has columns {', '.join(rows.column_names)}, but critical answers prompts; give it prompt "
            "or messages"
        )
    return rows


def _stand_in() -> Any:
    """A row for the trainer, which holds model and tokenizer here and trains nothing; prompts alone it would refuse."""
    from datasets import Dataset

    return Dataset.from_list([{"input_ids": [0, 0], "labels": [0, 0]}])


def _content(rows: Any) -> str:
    """What tells other rows of the same dataset's name."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, default=str, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _telling(total: int, before: int) -> Callable[[int, int], None]:
    """The bar, and an estimate once the first right answer was searched: those that are wrong take next to no time."""
    advance, started, told = data.bar(total, "critical"), time.monotonic(), False
    advance(before)

    def step(done: int, searched: int) -> None:
        nonlocal told
        if searched and not told:
            told = True
            left = (time.monotonic() - started) * (total - done) / (done - before)
            print(
                f"about {data.duration(left)} for the other {total - done} problems, by the first {done - before}",
                flush=True,
            )
        advance(done)

    return step


def _report(counts: dict[str, Any], last_error: str | None) -> None:
    share = counts["critical"] / counts["tokens"]
    print(f"problems   {counts['problems']}, answered to the end {counts['ended']}, correctly {counts['correct']}")
    print(f"tokens     {counts['tokens']} of right answers, critical {counts['critical']} ({share:.1%})")
    print(f"verifier   took too long {counts['timeouts']} times, failed {counts['errors']} times", end="")
    print(f", the last time with: {last_error}" if last_error else "")
