"""``qtarget plan``: what a run takes in memory, time and operations, known beforehand."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qtarget.cli import options
from qtarget.errors import ConfigError

_HELP = """\
usage: qtarget plan --config FILE [--gpus 8] [--gpu_memory 80] [--tflops N] [--row_tokens N] [--supervised_tokens N]
                    [--k 64] [--json FILE] [--any_field value ...]

Memory on each GPU, steps, floating-point operations by part, and what a teacher cache would save. No weights are loaded,
nothing is trained. Formulas: docs/plan.md.

  --gpus               GPUs of the run
  --gpu_memory         GiB of each; a tenth of it is left to CUDA, NCCL and the allocator
  --tflops             10^12 operations a second that a GPU keeps up in training, to turn operations into hours
  --row_tokens         tokens of a row on average, where rows are not at hand (else max_length is taken)
  --supervised_tokens  of them, those with a label (else all)
  --k                  tokens a cache would keep of the teacher
  --json               also write the figures to a file
"""
_SAMPLE = 512  # rows whose lengths are looked at
_ROOM = 0.9  # of a GPU's memory


@dataclass(frozen=True)
class Options:
    gpus: int
    gpu_memory: float
    tflops: float | None
    row_tokens: float | None
    supervised_tokens: float | None
    k: int
    json: str | None


def run(arguments: Sequence[str]) -> int:
    if not arguments or "-h" in arguments or "--help" in arguments:
        print(_HELP, end="")
        return 0
    own = {"gpus": 8, "gpu_memory": 80, "tflops": None, "row_tokens": None, "supervised_tokens": None}
    given, rest = options.take(arguments, {**own, "k": 64, "json": None})
    asked = _checked(given)

    from qtarget.cli import dry_run
    from qtarget.planning import shapes

    found = dry_run.look(rest, asked.gpus)
    if unknown := dry_run.unknown_shapes(found):
        raise ConfigError(
            f"the shape of {', '.join(unknown)} is not known here, so nothing can be counted: {shapes.why_unknown()}"
        )
    if not found.asked.config.max_length:
        raise ConfigError("max_length is not set, so rows have any length; set it, as memory grows with it")
    if asked.json is not None:
        options.writable("json", Path(asked.json))
    figures = _figures(found, asked, _lengths(found, asked, rest))
    _show(found, asked, figures)
    if asked.json is not None:
        Path(asked.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


def _checked(given: dict[str, Any]) -> Options:
    def above_zero(name: str) -> float | None:
        if given[name] is None:
            return None
        value = options.number(name, given[name])
        if not 0 < value < float("inf"):
            raise ConfigError(f"{name} is {given[name]}; use a number above 0")
        return value

    rows, supervised = above_zero("row_tokens"), above_zero("supervised_tokens")
    if supervised is not None and (rows is None or supervised > rows):
        raise ConfigError(
            f"supervised_tokens is {supervised:g}"
            + (f", more than row_tokens, {rows:g}" if rows is not None else " without row_tokens")
            + "; give the tokens of a row and, of these, those with a label"
        )
    memory = above_zero("gpu_memory")
    assert memory is not None
    return Options(
        options.whole("gpus", given["gpus"], 1),
        memory,
        above_zero("tflops"),
        rows,
        supervised,
        options.whole("k", given["k"], 1),
        given["json"],
    )


# -- rows ----------------------------------------------------------------------------------------------------------


def _lengths(found: Any, asked: Options, rest: Sequence[str]) -> Any:
    """Lengths of the rows: as told, as a sample of the rows at hand has them, or max_length."""
    from qtarget.planning.workload import Rows

    config = found.asked.config
    longest = config.max_length
    if asked.row_tokens is not None:
        length = min(asked.row_tokens, longest)
        supervised = length if asked.supervised_tokens is None else min(asked.supervised_tokens, length)
        return Rows(length, length, supervised, "as given")
    local = Path(found.asked.model.model_name_or_path).is_dir() and Path(found.asked.script.dataset_name).exists()
    sample = _sample(rest) if local else []
    if not sample:
        return Rows(
            longest, longest, longest, f"not known: every row is taken to have max_length, {longest}, all labels"
        )
    lengths = [length for length, _ in sample]
    mean, supervised = sum(lengths) / len(sample), sum(labels for _, labels in sample) / len(sample)
    if config.packing or config.padding_free:
        padded = mean
    else:
        padded = _longest_of(min(config.per_device_train_batch_size, len(lengths)), lengths)
    return Rows(padded, mean, supervised, f"mean of {len(sample)} rows, as training prepares them")


def _longest_of(some: int, lengths: list[int]) -> float:
    """Mean length of the longest of ``some`` rows drawn at random: the others of its micro-batch are padded to it."""
    # the i-th shortest is the longest of C(i, some - 1) draws, as the others are among the i before it
    draws = (math.comb(before, some - 1) * length for before, length in enumerate(sorted(lengths)))
    return sum(draws) / math.comb(len(lengths), some)


def _sample(rest: Sequence[str]) -> list[tuple[int, int]]:
    """(tokens, of these supervised) of some rows, through the trainer's own preparation, without weights."""
    import datasets as hub

    from qtarget.cli import cache, setup
    from qtarget.teachers.agreement.measure import evenly_spaced

    hub.disable_progress_bars()
    others = dict.fromkeys(("teacher_model_name_or_path", "teachers", "teacher_context", "teacher_ema_decay"))
    with tempfile.TemporaryDirectory() as scratch:  # a trainer makes its output folder
        fixed = cache.fixed_settings(rest, target="sft", output_dir=scratch, **others)
        run = setup.read(rest, fixed, trains=False)
        if run.script.dataset_streaming:
            return []
        train = run.datasets["train"]
        run.datasets = {"train": train.select(evenly_spaced(len(train), _SAMPLE))}
        rows = setup.build(run, weights=False).train_dataset
        return [(len(row["input_ids"]), sum(label != -100 for label in row["labels"][1:])) for row in rows]


# -- figures -------------------------------------------------------------------------------------------------------


def _figures(found: Any, asked: Options, rows: Any) -> dict[str, Any]:
    """All of a plan, in bytes, tokens and operations, as ``--json`` writes it."""
    from qtarget.cli import dry_run
    from qtarget.planning import flops, memory, workload

    config, model = found.asked.config, found.asked.model
    work = dry_run.workload_of(found)
    assert work is not None  # run() has looked
    work = replace(work, gpu_memory=int(asked.gpu_memory * 2**30))
    room = _ROOM * asked.gpu_memory * 2**30
    kinds = dry_run.layouts(found.gpus)
    held = {
        kind: {
            "parts": memory.estimate(work, kind),
            "most": memory.peak(work, kind),
            "fits": memory.peak(work, kind) <= room,
        }
        for kind in kinds
    }
    # A packed row is as long as can be: several of the data's rows go into it.
    each = config.max_length / rows.length if config.packing else 1.0
    batch = found.batch * each
    done = workload.of_flops(config, model, found.student, found.others, batch, rows)
    step = flops.of_step(done)
    total = _steps(found, batch)
    figures: dict[str, Any] = {
        "gpus": found.gpus,
        "gpu_memory_gib": asked.gpu_memory,
        "rows": found.rows,
        "row": {
            "tokens": rows.length,
            "with_padding": rows.positions,
            "supervised": rows.supervised,
            "source": rows.source,
        },
        "step": {
            "rows": batch,
            "tokens": batch * rows.length,
            "with_padding": batch * rows.positions,
            "supervised": batch * rows.supervised,
            "flops": step,
        },
        "steps": total,
        "memory": held,
        "teacher_share": flops.teacher_share(step),
        "cache": _cache(found, work, asked.k, rows, step, batch, total),
        "not_counted": workload.notes(config, model, found.student),
    }
    if total is not None:
        figures["flops"] = total * sum(step.values())
        if asked.tflops is not None:
            figures["gpu_hours"] = figures["flops"] / (asked.tflops * 1e12) / 3600
    return figures


def _steps(found: Any, batch: float) -> int | None:
    import math

    if found.steps is not None:
        return found.steps.total
    config = found.asked.config
    if config.max_steps > 0:
        return config.max_steps
    return math.ceil(found.rows / batch * config.num_train_epochs) if found.rows is not None else None


def _cache(
    found: Any, work: Any, k: int, rows: Any, step: dict[str, float], batch: float, total: int | None
) -> dict[str, Any] | None:
    """What a cache in place of the teacher's models would change; None where there are none to replace."""
    from qtarget.cli import dry_run
    from qtarget.planning import memory
    from qtarget.teachers.cache import build as cache_build

    if not any(other.role == "teacher" for other in found.others):
        return None
    each = cache_build.bytes_per_token(k)
    asking = (step["teacher"] + step["teacher head"]) / batch  # of a row
    made: dict[str, Any] = {
        "k": k,
        "bytes_per_token": each,
        "bytes": None,
        "build_flops": None,
        "passes": None,
        "most": {kind: memory.peak(replace(work, teachers=[]), kind) for kind in dry_run.layouts(found.gpus)},
    }
    if found.rows is not None:
        made["bytes"] = found.rows * rows.supervised * each
        made["build_flops"] = found.rows * asking
        if total is not None:
            made["passes"] = total * batch / found.rows
    return made


# -- what is told --------------------------------------------------------------------------------------------------


def _show(found: Any, asked: Options, figures: dict[str, Any]) -> None:
    from qtarget.cli import dry_run
    from qtarget.cli.dry_run import GIB, tell

    config, notes = found.asked.config, found.asked.settings.notes
    plural = "s" if found.gpus > 1 else ""
    print(f"plan for {found.gpus} GPU{plural} of {asked.gpu_memory:g} GiB: no weights are loaded, nothing is trained")
    if "name" in notes:
        tell("recipe", notes["name"])
    tell("target", config.resolve_objective().describe())
    model = found.asked.model
    tell("model", dry_run.model_line(model.model_name_or_path, model.model_revision, found.student))
    for other in found.others:
        tell(other.role, dry_run.model_line(other.name, other.revision, other.shape))
    tell("batch", dry_run.batch_line(config, found.gpus, found.batch))
    row, step = figures["row"], figures["step"]
    tell(
        "rows", f"{row['tokens']:,.0f} tokens, {row['with_padding']:,.0f} with padding, {row['supervised']:,.0f} labels"
    )
    tell("", row["source"])
    whole = sum(step["flops"].values())
    tell("a step", f"{step['tokens']:,.0f} tokens, {step['supervised']:,.0f} labels, {_operations(whole)} operations")
    steps = figures["steps"]
    if config.packing:
        tell("steps", "not known: the number of rows is not known here" if steps is None else f"about {steps}, packed")
    else:
        tell("steps", dry_run.steps_line(config, found.steps))
    if steps is not None:
        hours = f"; {figures['gpu_hours']:,.1f} GPU hours at {asked.tflops:g}e12 a second" if asked.tflops else ""
        tell("run", f"{_operations(figures['flops'])} operations{hours}")
    print("\noperations of a step")
    for name, value in step["flops"].items():
        if value:
            print(f"  {name:<24}{_operations(value):>10}{value / whole:>8.1%}")
    print()
    dry_run.show_memory(found)
    kinds = dry_run.layouts(found.gpus)
    room = _ROOM * asked.gpu_memory
    for number, (kind, held) in enumerate(figures["memory"].items()):
        left = room - held["most"] / GIB
        told = f"fits, {left:.1f} GiB to spare" if held["fits"] else f"does not fit, {-left:.1f} GiB too much"
        tell("" if number else "fits", f"{kinds[kind]}: {told} of the {room:g} that a run may use")
    _show_cache(figures, kinds)
    for line in [*figures["not_counted"], *found.untold]:
        tell("unknown", line)


def _show_cache(figures: dict[str, Any], kinds: dict[str, str]) -> None:
    from qtarget.cli.dry_run import GIB, tell

    cache, share = figures["cache"], figures["teacher_share"]
    if cache is None:
        if share:
            tell("teacher", f"{share:.1%} of the operations; it is the student's average, which no cache can keep")
        return
    tell("teacher", f"{share:.1%} of the operations: what a cache takes off a step, were all operations equally fast")
    freed = ", ".join(
        f"{kinds[kind]} {cache['most'][kind] / GIB:.1f} ({(cache['most'][kind] - held['most']) / GIB:+.1f})"
        for kind, held in figures["memory"].items()
    )
    tell("cache", f"most memory with one in the teacher's place, GiB: {freed}")
    size = f"{cache['bytes_per_token']} bytes a label at k = {cache['k']}"
    if cache["bytes"] is None:
        tell("", f"on disk {size}; the number of rows is not known here")
        return
    built = f"built once for {_operations(cache['build_flops'])} operations"
    tell("", f"on disk {_size(cache['bytes'])}, {size}; {built}")
    passes = cache["passes"]
    if passes is None:
        return
    if passes <= 1:
        told = f"this run asks about each row {passes:.2f} times: a cache pays from the second run on"
    else:
        saved = (passes - 1) * cache["build_flops"] / figures["flops"]
        told = f"this run asks about each row {passes:.2f} times: built for it alone, a cache saves {saved:.1%} of it"
    tell("", told)


def _size(value: float) -> str:
    return f"{value / 1e9:.2f} GB" if value >= 1e8 else f"{value / 1e6:.1f} MB"


def _operations(value: float) -> str:
    return f"{value:.2e}"
