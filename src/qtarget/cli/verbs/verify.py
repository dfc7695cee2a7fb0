"""``qtarget verify``: checks the trainer's promises on your own model, rows and config.

The gradient equals p - Q and autograd's; micro-batches, padding, packing, chunks and processes do not change it; the
masks train the answer and its end token and nothing of the prompt; the teacher sees the same ids; the target reduces to
related targets where it should; bf16 costs the loss no more than rounding its result; a step takes the estimated
memory. Nothing is trained, and nothing is written except the JSON file.

torchrun --nproc_per_node 2 -m qtarget verify --config FILE compares several processes with one as well.
Exit status: 0 no check failed, 1 some failed, 2 wrong settings or arguments.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from qtarget.cli import picture, setup, terminal
from qtarget.cli.arguments import Kind, Option, Verb, whole, writable
from qtarget.errors import ConfigError

if TYPE_CHECKING:
    from qtarget.training.trainer import QTargetTrainer

VERB = Verb("verify", __doc__)
# No rounding but that of float32.
_FIXED: dict[str, Any] = dict.fromkeys(("bf16", "fp16", "torch_compile"), False)
_FIXED |= {"report_to": "none", "disable_tqdm": True}
_ENGINES = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}
_MARKS = {"pass": "green", "fail": "bold red", "not applicable": "dim"}


@VERB.command(
    Option("rows", "how many rows to use, evenly spread over the training set (the first of a stream)", whole(1), 8),
    Option(
        "json",
        "write every figure to a file; -: to the screen instead of the table",
        Kind("FILE", lambda name, text: text if text == "-" else writable(name, text)),
    ),
    Option(
        "keep_dtype",
        "keep the configured dtype of the models; otherwise all are compared in float32, where rounding hides nothing "
        "(twice the memory of bf16)",
    ),
    picture.SHOW_ROWS,
    settings=True,
)
def verify_run(options: Any) -> int:
    from qtarget.verification import verify

    with tempfile.TemporaryDirectory() as folder:  # a trainer makes its output_dir when it is made
        fixed = {**setup.MEASURES, **setup.ONE_BY_ONE, **_FIXED, "output_dir": folder}
        subject = _subject(options.words, fixed, options.rows, options.keep_dtype)
        with terminal.spinner("verifying") as update:
            made = verify(subject, progress=lambda name: update(description=name))
    if terminal.is_main():
        figures = terminal.as_json(made.to_dict())
        if options.json == "-":
            print(figures, end="")
        else:
            if (seen := subject.trainer.picture()) is not None:
                picture.show(seen, options.show_rows)
            _show(made)
        if options.json not in (None, "-"):
            options.json.write_text(figures, encoding="utf-8")
            print(f"figures    {options.json}")
    return int(_failed_anywhere(made, subject))


def _failed_anywhere(made: Any, subject: Any) -> bool:
    """One status for all processes, since a launcher tells of the first that differs; what the others found is said."""
    accelerator = subject.trainer.accelerator
    if accelerator.num_processes == 1:
        return bool(made.failed)
    from accelerate.utils import gather_object

    everywhere = gather_object([made.failed])
    if terminal.is_main():
        for process, failed in enumerate(everywhere):
            if process and failed != made.failed:
                print(
                    f"process {process} has a different verdict: {', '.join(failed) or 'nothing'} failed",
                    file=sys.stderr,
                )
    accelerator.end_training()
    return any(everywhere)


# -- what is verified --------------------------------------------------------------------------------------------


def _subject(rest: list[str], fixed: dict[str, Any], rows: int, keep_dtype: bool) -> Any:
    """The subject of a config: its trainer on some rows, built as training builds it."""
    from qtarget.verification import Subject

    _refuse([engine for name, engine in _ENGINES.items() if os.environ.get(name, "").lower() == "true"])
    run = setup.read(rest, fixed, trains=False)
    _refuse([name for name in ("fsdp", "deepspeed") if getattr(run.config, name, None)])
    if not keep_dtype:
        run.model.dtype = "float32"
        run.config.model_init_kwargs = {**(run.config.model_init_kwargs or {}), "dtype": "float32"}
    some, raw = _some(run.datasets["train"], rows, run.config.source_column)
    run.datasets = {"train": some}
    trainer = setup.build(run)
    if not keep_dtype:
        _in_float32(trainer)
    return Subject(trainer, raw, _estimate(run, trainer), run.config.packing_strategy)


def _refuse(engines: list[str]) -> None:
    """Raise where the student would be held in pieces."""
    if engines:
        raise ConfigError(
            f"{engines[0]} is on, but verify compares whole gradients; run it with torchrun or as one process, without "
            "a sharding engine"
        )


def _some(train: Any, rows: int, source_column: str) -> tuple[Any, list[dict[str, Any]]]:
    """(a dataset of so many rows, the same rows)."""
    from datasets import Dataset

    from qtarget.teachers.agreement.measure import evenly_spaced

    if hasattr(train, "select"):
        of_source: dict[Any, list[int]] = {}
        sources = train[source_column] if source_column in train.column_names else [None] * len(train)
        for number, source in enumerate(sources):
            of_source.setdefault(source, []).append(number)
        each = -(-rows // len(of_source)) if of_source else rows  # some of every source
        some = train.select(sorted(group[i] for group in of_source.values() for i in evenly_spaced(len(group), each)))
    else:
        some = Dataset.from_list(list(train.take(rows)))
    if not len(some):
        raise ConfigError("dataset_name: the training set has no rows")
    return some, [dict(row) for row in some]


def _in_float32(trainer: QTargetTrainer) -> None:
    """Every model that is no quantised one; what is loaded in half precision keeps its values."""
    for model in (trainer.model, *(one.model for one in trainer.aux.models)):
        if not getattr(model, "is_quantized", False):
            model.float()


def _estimate(run: setup.Run, trainer: QTargetTrainer) -> Callable[[int, int], int | None]:
    """(positions, supervised tokens) → bytes a step takes beyond models and optimiser. The one place that knows how."""
    from qtarget.planning import memory, shapes

    def held(model: Any) -> Any:
        """(shape, bytes of a number) of a model by its name; None where it cannot be looked up."""
        try:
            shape = shapes.find("model", str(model.config._name_or_path))
        except (ConfigError, AttributeError):
            return None
        return None if shape is None else (shape, model.dtype.itemsize)

    def of_step(positions: int, supervised: int) -> int | None:
        student = held(trainer.student.base)
        aux = trainer.aux
        teachers = [] if aux.teacher is None else [held(one.base) for one in aux.teacher.models[:1]]
        references = [] if aux.reference is None else [held(aux.reference.base)]
        models = [trainer.student, *aux.models]
        if None in [student, *teachers, *references] or any(hasattr(one.unwrapped, "peft_config") for one in models):
            return None
        work = memory.Workload(
            student[0],
            gpus=1,
            tokens=positions,
            bytes=student[1],
            teachers=teachers,
            references=references,
            supervised=supervised,
            checkpointing=False,
            mixed=False,
            accumulates=False,
            device=trainer.args.device.type,
        )
        stages = memory.stages(work)
        return stages["peak"] - stages["between"] + memory.kept_buffers(work)  # it is the first step that is measured

    return of_step


# -- what is told ------------------------------------------------------------------------------------------------


def _show(made: Any) -> None:
    from rich.text import Text

    console = terminal.console(122)
    about = made.about
    console.print(
        Text(
            f"{about['model']}, target {about['target']}: {about['rows']} rows, {about['supervised_tokens']} of "
            f"{about['tokens']} tokens trained; {about['dtype']} on {about['device']}, {about['processes']} process"
            + ("es" if about["processes"] > 1 else "")
        )
    )
    if about["not_among_the_rows"]:
        console.print(
            Text(f"not covered by these rows: {'; '.join(about['not_among_the_rows'])}; use more with --rows")
        )
    headings = ("check", "", "figures")
    table = terminal.table(*headings, left=headings)
    for column in table.columns[:2]:
        column.no_wrap = True
    for check, finding in made.found:
        status = Text("n/a" if finding.status == "not applicable" else finding.status, style=_MARKS[finding.status])
        table.add_row(Text(check.name), status, Text(finding.told))
    console.print(table)
    for check, finding in made.found:
        if finding.status == "fail":
            console.print(Text(f"{check.name}: expected: {check.promise}", style="bold"))
            console.print(Text(f"  {finding.hint or check.hint}"))
    console.print(Text(made.verdict, style="bold"))
