"""``qtarget verify``: checks the trainer's promises on your own model, rows and config."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtarget.cli import options
from qtarget.errors import ConfigError

if TYPE_CHECKING:
    from qtarget.training.trainer import QTargetTrainer

_HELP = """\
usage: qtarget verify --config FILE [--rows 8] [--json FILE] [--keep_dtype] [--any_field value ...]
       torchrun --nproc_per_node 2 -m qtarget verify --config FILE     several processes against one as well

Hold the trainer's promises against your own model, data, target and config, before a run is trusted with them: the
gradient is p - Q and autograd's; micro-batches, padding, packing, chunks and processes leave it unchanged; the masks
train the answer and its end and nothing of the prompt; the teacher sees the same ids; the target becomes its neighbours
where it must; what bf16 costs; the memory of a step against the estimate. Nothing is trained and nothing is written but
the JSON.

  --rows 8        rows looked at, evenly spread over the training set (the first of a stream)
  --json FILE     every figure; - writes it to the screen in place of the table
  --keep_dtype    leave models in the dtype they are configured with; else all are compared in float32, where rounding
                  hides nothing (twice the memory of bf16)

Exit status: 0 no check failed, 1 some did, 2 something is wrong with what was asked for.
"""
# What the verb decides whatever the config says: nothing is trained, evaluated, written or pushed; rows stay whole and in
# their order; no rounding but that of float32.
_FIXED: dict[str, Any] = {
    "packing": False,
    "padding_free": False,
    "shuffle_dataset": False,
    "gradient_checkpointing": False,
    "bf16": False,
    "fp16": False,
    "eval_strategy": "no",
    "load_best_model_at_end": False,
    "resume_from_checkpoint": None,
    "lens_every": None,
    "push_to_hub": False,
    "teacher_check_rows": 0,
    "torch_compile": False,
    "report_to": "none",
    "disable_tqdm": True,
}
_ENGINES = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}
_MARKS = {"pass": "green", "fail": "bold red", "not applicable": "dim"}


def run(arguments: Sequence[str]) -> int:
    words = list(arguments)
    if not words or "-h" in words or "--help" in words:
        print(_HELP, end="")
        return 0
    own, rest = options.take(words, {"rows": 8, "json": None}, flags=("keep_dtype",))
    rows = options.whole("rows", own["rows"], 1)
    out = None if own["json"] in (None, "-") else Path(own["json"])
    if out is not None:
        options.writable("json", out)
    from qtarget.verification import verify

    with tempfile.TemporaryDirectory() as folder:  # a trainer makes its output_dir when it is made
        subject = _subject(rest, {**_FIXED, "output_dir": folder}, rows, own["keep_dtype"])
        made = _verified(verify, subject)
    if _is_main():
        if out is not None:
            out.write_text(_json(made), encoding="utf-8")
        if own["json"] == "-":
            print(_json(made), end="")
        else:
            _show(made)
            if out is not None:
                print(f"figures    {out}")
    return int(_failed_anywhere(made, subject))


def _failed_anywhere(made: Any, subject: Any) -> bool:
    """One status for all processes, since a launcher tells of the first that differs; what the others found is said."""
    accelerator = subject.trainer.accelerator
    if accelerator.num_processes == 1:
        return bool(made.failed)
    from accelerate.utils import gather_object

    everywhere = gather_object([made.failed])
    if _is_main():
        for process, failed in enumerate(everywhere):
            if process and failed != made.failed:
                print(
                    f"process {process} has another verdict: {', '.join(failed) or 'nothing'} failed", file=sys.stderr
                )
    accelerator.end_training()
    return any(everywhere)


def _json(made: Any) -> str:
    return json.dumps(_finite(made.to_dict()), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity; what failed may have either."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and not -float("inf") < value < float("inf"):
        return str(value)
    return value


def _is_main() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


# -- what is verified --------------------------------------------------------------------------------------------


def _subject(rest: list[str], fixed: dict[str, Any], rows: int, keep_dtype: bool) -> Any:
    """The subject of a config: its trainer on some rows, built as training builds it."""
    from qtarget.cli import setup
    from qtarget.verification import Subject

    _refuse([engine for name, engine in _ENGINES.items() if os.environ.get(name, "").lower() == "true"])
    asked = setup.read(rest, fixed, trains=False)
    _refuse([name for name in ("fsdp", "deepspeed") if getattr(asked.config, name, None)])
    if not keep_dtype:
        asked.model.dtype = "float32"
        asked.config.model_init_kwargs = {**(asked.config.model_init_kwargs or {}), "dtype": "float32"}
    asked.datasets.pop("test", None)
    asked.datasets["train"], raw = _some(asked.datasets["train"], rows, asked.config.source_column)
    trainer = setup.build(asked)
    if not keep_dtype:
        _in_float32(trainer)
    return Subject(trainer, raw, _estimate(asked, trainer), asked.config.packing_strategy)


def _refuse(engines: list[str]) -> None:
    """Raise where the student would be held in pieces."""
    if engines:
        raise ConfigError(
            f"{engines[0]} is on, and verify compares whole gradients; start it with torchrun or alone, without a "
            "sharding engine"
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


def _estimate(asked: Any, trainer: QTargetTrainer) -> Callable[[int, int], int | None]:
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
        if student is None or None in [*teachers, *references] or asked.model.use_peft:
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


def _verified(verify: Callable[..., Any], subject: Any) -> Any:
    from rich.console import Console
    from rich.progress import Progress

    shown = _is_main() and sys.stderr.isatty()
    with Progress(console=Console(stderr=True), transient=True, disable=not shown) as bar:
        task = bar.add_task("verifying", total=None)
        return verify(subject, progress=lambda name: bar.update(task, description=name))


def _show(made: Any) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 122, highlight=False)
    about = made.about
    console.print(
        Text(
            f"{about['model']}, target {about['target']}: {about['rows']} rows, {about['supervised_tokens']} of "
            f"{about['tokens']} tokens trained; {about['dtype']} on {about['device']}, {about['processes']} process"
            + ("es" if about["processes"] > 1 else "")
        )
    )
    if about["not_among_the_rows"]:
        console.print(Text(f"not among these rows: {'; '.join(about['not_among_the_rows'])}; look at more with --rows"))
    table = Table(box=None, pad_edge=False)
    for heading in ("check", "", "figures"):
        table.add_column(heading, no_wrap=heading != "figures")
    for check, finding in made.found:
        status = Text("n/a" if finding.status == "not applicable" else finding.status, style=_MARKS[finding.status])
        table.add_row(Text(check.name), status, Text(finding.told))
    console.print(table)
    for check, finding in made.found:
        if finding.status == "fail":
            console.print(Text(f"{check.name}: it should hold that {check.promise}", style="bold"))
            console.print(Text(f"  {finding.hint or check.hint}"))
    console.print(Text(made.verdict, style="bold"))
