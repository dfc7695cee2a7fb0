"""``qtarget teacher``: checks whether a teacher agrees with the student and the labels.

On the run's own rows it measures how well student and teacher explain the labels, how far apart they are, and where the
teacher is confident of a token other than the label; then it gives a verdict by rule of thumb. The teacher is the one
the config trains with: a model, teachers, teacher_cache, teacher_context or teacher_ema_decay. If the target needs no
teacher but the config names one, it is checked with kd.
"""

from __future__ import annotations

from typing import Any

from qtarget.cli import setup, terminal
from qtarget.cli.arguments import NEW_FILE, Option, Verb, whole
from qtarget.errors import ConfigError

VERB = Verb("teacher", __doc__)


@VERB.command(
    Option("rows", "how many rows to use, evenly spread over the training set (the first of a stream)", whole(1), 200),
    Option("json", "write every figure to a file, including those for each part of the answer", NEW_FILE),
    word="check",
    settings=True,
)
def check(options: Any) -> int:
    terminal.refuse_processes("qtarget teacher check")
    rows, out = options.rows, options.json
    from qtarget.teachers.agreement import measure as agreement

    run = setup.read(options.words, setup.MEASURES, trains=False)
    _ask_a_teacher(run.config)
    run.keep(lambda length: agreement.evenly_spaced(length, rows))
    trainer = setup.build(run)
    count, tokens = agreement.estimate(trainer, rows)
    print(f"{count} rows, {tokens} supervised tokens", flush=True)
    with terminal.spinner("comparing") as update:
        made = agreement.measure(trainer, rows, progress=lambda done: update(completed=done))
    if out is not None:
        out.write_text(terminal.as_json(made.to_dict()), encoding="utf-8")
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
            f"target {objectives[0]} needs no teacher, and none is named to check; set teacher_model_name_or_path, or "
            "teachers, teacher_cache or teacher_ema_decay"
        )
    print(f"target {objectives[0]} needs no teacher; the one that is named is checked with target kd")
    for name, value in {"target": "kd", **setup.NO_TARGET}.items():
        setattr(config, name, value)


def _show(made: Any) -> None:
    console = terminal.console(120)
    for table in tables(made):
        console.print(table)
    for note in made.notes():
        print(f"note: {note}")
    print(f"verdict: {made.verdict}")


def tables(made: Any) -> list[Any]:
    """An agreement as tables for a terminal."""
    from rich.text import Text

    left = ("", "label", "the teacher says")
    figures = terminal.table("", "student", "teacher", left=left, title=f"{made.rows} rows, {made.tokens} tokens")
    for what, student, teacher in made.figures():
        figures.add_row(Text(what), student, teacher)
    headings = ("", "tokens", "nll", "p", "likeliest", "teacher's nll", "p", "likeliest", "conflicts")
    places = terminal.table(*headings, left=left, title="by part of the answer")
    for place in made.places:
        if not place.tokens:
            places.add_row(place.name, "0", *["-"] * 7)
            continue
        sides = [f for s in (place.student, place.teacher) for f in (f"{s.nll:.3f}", f"{s.p:.3f}", f"{s.accuracy:.0%}")]
        places.add_row(place.name, str(place.tokens), *sides, f"{place.conflicts:.0%}")
    conflicts = terminal.table(
        "label", "conflicts", "the teacher says", left=left, title="labels with the most conflicts"
    )
    for label, often, instead in made.conflict_lines():
        conflicts.add_row(Text(label), often, Text(instead))
    return [figures, places, *([conflicts] if made.conflicting else [])]
