"""``qtarget teacher``: does a teacher agree with the student and the labels?"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtarget.cli import options
from qtarget.errors import ConfigError, unknown

if TYPE_CHECKING:
    from qtarget.training.trainer import QTargetTrainer

_HELP = """\
usage: qtarget teacher check --config FILE [--rows 200] [--json FILE] [--any_field value ...]

Ask the teacher of a run about its own rows before training with it: how well student and teacher explain the labels, how
far they are from each other, where the teacher is sure of another token than the label, and a verdict by rule of thumb.

  --rows 200     rows looked at, evenly spread over the training set (the first of a stream)
  --json FILE    every figure, also of each place in the answer

The teacher is whatever the config trains with: a model, teachers, teacher_cache, teacher_context or teacher_ema_decay. A
target that needs no teacher is checked with kd, where the config names a teacher.
"""
# What the verb decides whatever the config says: nothing is trained, evaluated, written or pushed.
_FIXED: dict[str, Any] = {
    "gradient_checkpointing": False,
    "eval_strategy": "no",
    "load_best_model_at_end": False,
    "resume_from_checkpoint": None,
    "lens_every": None,
    "push_to_hub": False,
    "teacher_check_rows": 0,
}
# What else says what a run trains, and is set aside with its target where kd takes its place.
_WITHOUT_TARGET: dict[str, Any] = {
    "targets": None,
    "eval_target": None,
    "loss_type": None,
    "label_smoothing_factor": 0.0,
    "denominator": "all_labels",
}


def run(arguments: Sequence[str]) -> int:
    words = list(arguments)
    if not words or "-h" in words or "--help" in words:
        print(_HELP, end="")
        return 0
    if words[0] != "check":
        raise unknown("word after teacher", words[0], ("check",))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("qtarget teacher check runs in one process; start it without accelerate launch or torchrun")
    return _check(words[1:])


def _check(words: list[str]) -> int:
    own, rest = options.take(words, {"rows": 200, "json": None})
    rows, out = options.whole("rows", own["rows"], 1), None if own["json"] is None else Path(own["json"])
    if out is not None:
        options.writable("json", out)
    from qtarget.cli import setup
    from qtarget.teachers.agreement import measure as agreement

    asked = setup.read(rest, _FIXED, trains=False)
    _ask_a_teacher(asked.config)
    asked.datasets.pop("test", None)
    train = asked.datasets["train"]
    if hasattr(train, "select"):  # what is not looked at need not be tokenised
        asked.datasets["train"] = train.select(agreement.evenly_spaced(len(train), rows))
    trainer = setup.build(asked)
    count, tokens = agreement.estimate(trainer, rows)
    print(f"{count} rows, {tokens} supervised tokens", flush=True)
    made = _measured(trainer, rows)
    if out is not None:
        out.write_text(
            json.dumps(made.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
        )
    _show(made)
    if out is not None:
        print(f"figures    {out}")
    return 0


def _ask_a_teacher(config: Any) -> None:
    """kd in place of a target that needs no teacher: the figures are those of the models, whatever is trained.

    It is set on the config that was read: among the settings a peer's spelling of the target would contradict it.
    """
    objectives = config.resolve_objective(), config.resolve_eval_objective()
    if any("teacher" in objective.requires for objective in objectives):
        return
    if not config.names_teacher:
        raise ConfigError(
            f"target {objectives[0]} has no teacher and none is named; set teacher_model_name_or_path, or teachers, "
            "teacher_cache or teacher_ema_decay"
        )
    print(f"target {objectives[0]} asks no teacher; the one that is named is checked with target kd")
    for name, value in {"target": "kd", **_WITHOUT_TARGET}.items():
        setattr(config, name, value)


def _measured(trainer: QTargetTrainer, rows: int) -> Any:
    from rich.console import Console
    from rich.progress import Progress

    from qtarget.teachers.agreement import measure as agreement

    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("comparing", total=None)
        return agreement.measure(trainer, rows, progress=lambda done: bar.update(task, completed=done))


def _show(made: Any) -> None:
    if not sys.stdout.isatty():
        print("\n".join(made.lines()))
        return
    from rich.console import Console
    from rich.text import Text

    console = Console()
    for table in tables(made):
        console.print(table)
    for note in made.notes():
        console.print(Text(f"note: {note}"))
    console.print(Text(f"verdict: {made.verdict}", style="bold"))


def tables(made: Any) -> list[Any]:
    """An agreement as tables for a terminal."""
    from rich.text import Text

    figures = _table(f"{made.rows} rows, {made.tokens} tokens", "", "student", "teacher")
    for what, student, teacher in made.figures():
        figures.add_row(Text(what), student, teacher)
    places = _table(
        "by place in the answer", "", "tokens", "nll", "p", "likeliest", "teacher's nll", "p", "likeliest", "conflicts"
    )
    for place in made.places:
        if not place.tokens:
            places.add_row(place.name, "0", *["-"] * 7)
            continue
        sides = [f for s in (place.student, place.teacher) for f in (f"{s.nll:.3f}", f"{s.p:.3f}", f"{s.accuracy:.0%}")]
        places.add_row(place.name, str(place.tokens), *sides, f"{place.conflicts:.0%}")
    conflicts = _table("labels with most conflicts", "label", "conflicts", "the teacher says")
    for label, often, instead in made.conflict_lines():
        conflicts.add_row(Text(label), often, Text(instead))
    return [figures, places, *([conflicts] if made.conflicting else [])]


def _table(title: str, *headings: str) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for heading in headings:
        left = heading in ("", "label", "the teacher says")
        table.add_column(heading, justify="left" if left else "right")
    return table
