"""``qtarget plan``: estimates a run's memory, time and operations before it starts.

Prints the memory on each GPU, the steps, the floating-point operations by part, and what a teacher cache would save. No
weights are loaded, nothing is trained. Formulas: docs/plan.md.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qtarget.cli import setup, terminal
from qtarget.cli.arguments import ABOVE_ZERO, NEW_FILE, Option, Verb, whole
from qtarget.errors import ConfigError

VERB = Verb("plan", __doc__)
_SAMPLE = 512  # rows whose lengths are looked at
_ROOM = 0.9  # of a GPU's memory


@VERB.command(
    Option("gpus", "number of GPUs", whole(1), 8),
    Option(
        "gpu_memory", "GiB of each GPU; a tenth of it is reserved for CUDA, NCCL and the allocator", ABOVE_ZERO, 80.0
    ),
    Option(
        "tflops",
        "10^12 operations per second that a GPU reaches in training, to turn operations into hours",
        ABOVE_ZERO,
    ),
    Option("row_tokens", "mean tokens per row, if the rows are not available (else max_length)", ABOVE_ZERO),
    Option("supervised_tokens", "how many of them have a label (else all)", ABOVE_ZERO),
    Option("k", "tokens that a teacher cache would keep", whole(1), 64),
    Option("json", "also write the figures to a file", NEW_FILE),
    settings=True,
)
def run(options: Any) -> int:
    rows, supervised = options.row_tokens, options.supervised_tokens
    if supervised is not None and (rows is None or supervised > rows):
        raise ConfigError(
            f"supervised_tokens is {supervised:g}"
            + (f", more than row_tokens, {rows:g}" if rows is not None else " without row_tokens")
            + "; give row_tokens, and supervised_tokens of at most that many"
        )
    from qtarget.cli import preview
    from qtarget.planning import shapes

    found = preview.look(options.words, options.gpus)
    if unknown := preview.unknown_shapes(found):
        raise ConfigError(
            f"the shape of {', '.join(unknown)} is not known here, so nothing can be calculated: {shapes.why_unknown()}"
        )
    if not found.asked.config.max_length:
        raise ConfigError("max_length is not set, so rows have any length; set it, because memory grows with it")
    figures = _figures(found, options, _lengths(found, options))
    _show(found, options, figures)
    if options.json is not None:
        options.json.write_text(terminal.as_json(figures), encoding="utf-8")
    return 0


# -- rows ----------------------------------------------------------------------------------------------------------


# Rows are the same in each, and a GPU's may not be here.
_ANY_PRECISION = {"bf16": False, "bf16_full_eval": False, "tf32": None}


def _lengths(found: Any, options: Any) -> Any:
    """Lengths of the rows: as told, as a sample of the rows at hand has them, or max_length."""
    from qtarget.planning.workload import Rows

    config = found.asked.config
    longest = config.max_length
    if options.row_tokens is not None:
        length = min(options.row_tokens, longest)
        supervised = length if options.supervised_tokens is None else min(options.supervised_tokens, length)
        return Rows(length, length, supervised, "as given")
    local = Path(found.asked.model.model_name_or_path).is_dir() and Path(found.asked.script.dataset_name).exists()
    sample = _sample(options.words) if local else []
    if not sample:
        return Rows(
            longest, longest, longest, f"not known: every row is assumed to have max_length, {longest}, and only labels"
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
    from qtarget.teachers.agreement.measure import evenly_spaced

    terminal.silence_libraries()
    with tempfile.TemporaryDirectory() as scratch:  # a trainer makes its output folder
        fixed = setup.row_by_row(rest, target="sft", output_dir=scratch, **setup.NO_TEACHER, **_ANY_PRECISION)
        run = setup.read(rest, fixed, trains=False)
        if run.script.dataset_streaming:
            return []
        run.keep(lambda length: evenly_spaced(length, _SAMPLE))
        rows = setup.build(run, weights=False).train_dataset
        return [(len(row["input_ids"]), sum(label != -100 for label in row["labels"][1:])) for row in rows]


# -- figures -------------------------------------------------------------------------------------------------------


def _figures(found: Any, options: Any, rows: Any) -> dict[str, Any]:
    """All of a plan, in bytes, tokens and operations, as ``--json`` writes it."""
    from qtarget.cli import preview
    from qtarget.planning import flops, memory, workload

    config, model = found.asked.config, found.asked.model
    work = preview.workload_of(found)
    assert work is not None  # run() has looked
    work = replace(work, gpu_memory=int(options.gpu_memory * 2**30))
    room = _ROOM * options.gpu_memory * 2**30
    held = {}
    for kind in preview.layouts(found.gpus):
        most = memory.peak(work, kind)
        held[kind] = {"parts": memory.estimate(work, kind), "most": most, "fits": most <= room}
    # A packed row is as long as can be: several of the data's rows go into it.
    each = config.max_length / rows.length if config.packing else 1.0
    batch = found.batch * each
    done = workload.of_flops(config, model, found.student, found.others, batch, rows)
    step = flops.of_step(done)
    total = _steps(found, batch)
    figures: dict[str, Any] = {
        "gpus": found.gpus,
        "gpu_memory_gib": options.gpu_memory,
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
        "cache": _cache(found, work, options.k, rows, step, batch, total),
        "not_counted": workload.notes(config, model, found.student, found.others),
    }
    if total is not None:
        figures["flops"] = total * sum(step.values())
        if options.tflops is not None:
            figures["gpu_hours"] = figures["flops"] / (options.tflops * 1e12) / 3600
    return figures


def _steps(found: Any, batch: float) -> int | None:
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
    from qtarget.cli import preview
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
        "most": {kind: memory.peak(replace(work, teachers=[]), kind) for kind in preview.layouts(found.gpus)},
    }
    if found.rows is not None:
        made["bytes"] = found.rows * rows.supervised * each
        made["build_flops"] = found.rows * asking
        if total is not None:
            made["passes"] = total * batch / found.rows
    return made


# -- what is told --------------------------------------------------------------------------------------------------


def _show(found: Any, options: Any, figures: dict[str, Any]) -> None:
    from qtarget.cli import preview
    from qtarget.cli.preview import GIB, tell

    config = found.asked.config
    plural = "s" if found.gpus > 1 else ""
    print(f"plan for {found.gpus} GPU{plural} of {options.gpu_memory:g} GiB: no weights are loaded, nothing is trained")
    preview.show_head(found, "target", [config.resolve_objective().describe()])
    tell("batch", preview.batch_line(config, found.gpus, found.batch))
    row, step = figures["row"], figures["step"]
    tell(
        "rows", f"{row['tokens']:,.0f} tokens, {row['with_padding']:,.0f} with padding, {row['supervised']:,.0f} labels"
    )
    tell("", row["source"])
    for sentence in found.picture.warnings if found.picture is not None else ():
        tell("warning", sentence)
    whole = sum(step["flops"].values())
    tell("a step", f"{step['tokens']:,.0f} tokens, {step['supervised']:,.0f} labels, {whole:.2e} operations")
    steps = figures["steps"]
    if config.packing:
        tell("steps", "not known: the number of rows is not known here" if steps is None else f"about {steps}, packed")
    else:
        tell("steps", preview.steps_line(config, found.steps))
    if steps is not None:
        hours = f"; {figures['gpu_hours']:,.1f} GPU hours at {options.tflops:g}e12 per second" if options.tflops else ""
        tell("run", f"{figures['flops']:.2e} operations{hours}")
    print("\noperations of a step")
    for name, value in step["flops"].items():
        if value:
            print(f"  {name:<24}{value:>10.2e}{value / whole:>8.1%}")
    print()
    preview.show_memory(found)
    kinds = preview.layouts(found.gpus)
    room = _ROOM * options.gpu_memory
    for i, (kind, held) in enumerate(figures["memory"].items()):
        left = room - held["most"] / GIB
        told = f"fits, {left:.1f} GiB to spare" if held["fits"] else f"does not fit, {-left:.1f} GiB too much"
        tell("" if i else "fits", f"{kinds[kind]}: {told} of the {room:g} that a run can use")
    _show_cache(figures, kinds)
    for line in [*figures["not_counted"], *found.untold]:
        tell("unknown", line)


def _show_cache(figures: dict[str, Any], kinds: dict[str, str]) -> None:
    from qtarget.cli.preview import GIB, tell

    cache, share = figures["cache"], figures["teacher_share"]
    if cache is None:
        if share:
            tell("teacher", f"{share:.1%} of the operations; it is the student's average, which cannot be cached")
        return
    tell("teacher", f"{share:.1%} of the operations: what a cache saves of a step, if all operations were equally fast")
    freed = ", ".join(
        f"{kinds[kind]} {cache['most'][kind] / GIB:.1f} ({(cache['most'][kind] - held['most']) / GIB:+.1f})"
        for kind, held in figures["memory"].items()
    )
    tell("cache", f"peak memory with a cache instead of the teacher, GiB: {freed}")
    size = f"{cache['bytes_per_token']} bytes per label at k = {cache['k']}"
    if cache["bytes"] is None:
        tell("", f"on disk {size}; the number of rows is not known here")
        return
    built = f"built once for {cache['build_flops']:.2e} operations"
    disk = f"{cache['bytes'] / 1e9:.2f} GB" if cache["bytes"] >= 1e8 else f"{cache['bytes'] / 1e6:.1f} MB"
    tell("", f"on disk {disk}, {size}; {built}")
    if (passes := cache["passes"]) is not None:
        pays = "a cache pays from the second run on"
        if passes > 1:
            saved = (passes - 1) * cache["build_flops"] / figures["flops"]
            pays = f"built for it alone, a cache saves {saved:.1%} of it"
        tell("", f"this run asks about each row {passes:.2f} times: {pays}")
