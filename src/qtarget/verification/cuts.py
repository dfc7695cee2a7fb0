"""Is the gradient the same however a step is cut into micro-batches, chunks, processes?"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from qtarget.data.preparation import Preparation
from qtarget.models.forward import accepted
from qtarget.verification.check import Finding, check, expect, not_applicable, within, worst
from qtarget.verification.expected import Expected
from qtarget.verification.subject import Gradient, Row, Subject, distance, relative

# A chunk of this many tokens leaves a last one that is shorter.
_CHUNKS = (7, 16)


@check(
    "micro-batches",
    "the denominator is not counted over the whole step: a custom trainer's compute_loss or _get_num_items_in_batch "
    "averages each micro-batch for itself",
    of_gradient=True,
)
def micro_batches(subject: Subject) -> Finding:
    """However many micro-batches a step is cut into, its gradient is that of all rows in one micro-batch."""
    rows = subject.rows
    if subject.trainer.args.denominator == "micro_batch":
        return not_applicable(
            "denominator is micro_batch: each micro-batch counts the same, however many labels it has"
        )
    if len(rows) < 2:
        return not_applicable("one row cannot be cut into micro-batches")
    cuts = {f"{len(rows)} of 1 row": [[row] for row in rows]}
    if len(rows) > 2:  # halves of equal size would hide a mean of means
        uneven = -(-2 * len(rows) // 3)
        cuts["2 uneven ones"] = [rows[:uneven], rows[uneven:]]
    return _against_one(subject, {name: [subject.collate(part) for part in parts] for name, parts in cuts.items()})


@check(
    "padding",
    "padded positions take part: check the pad token, the attention mask and labels at padding",
    of_gradient=True,
)
def padding(subject: Subject) -> Finding:
    """However far rows are padded, the gradient is that of all rows in one micro-batch."""
    batch = subject.step.batch
    if "attention_mask" not in batch:
        return not_applicable("the batches have no attention mask, so no padding")
    longer, more = dict(batch), max(8, batch["labels"].shape[1] // 4)
    collator = getattr(subject.trainer.data_collator, "inner", None)
    fill = {"labels": -100, "input_ids": int(getattr(collator, "pad_token_id", 0) or 0)}
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.shape[:2] == batch["labels"].shape:
            nothing = fill.get(name, -1 if name.startswith("qtarget_uid_") else 0)
            padded = value.new_full((value.shape[0], more, *value.shape[2:]), nothing)
            longer[name] = torch.cat([value, padded], 1)
    return _against_one(subject, {f"{more} more tokens": [longer]})


@check(
    "padding-free",
    "documents of one line see each other, or positions do not start again: this model or its attn_implementation "
    "cannot tell them apart by position_ids; leave padding_free and packing off",
    of_gradient=True,
)
def padding_free(subject: Subject) -> Finding:
    """Rows in one line without padding have the gradient of all rows in one micro-batch."""
    if why := _no_positions(subject):
        return not_applicable(why)
    return _against_one(subject, {"in one line": [_joined(subject, subject.rows)]})


@check(
    "packing",
    "packed documents see each other, or a label or column moved: set packing: false, or another attn_implementation",
    of_gradient=True,
)
def packing(subject: Subject) -> Finding:
    """Rows packed into sequences have the gradient of all rows in one micro-batch."""
    if why := _no_positions(subject):
        return not_applicable(why)
    if subject.packing_strategy == "wrapped":
        return not_applicable("packing_strategy is wrapped, under which documents see each other by design")
    packed = pack(subject)
    together = max(len(row["seq_lengths"]) for row in packed)
    if together < 2:
        return not_applicable("no two of the rows fit into one sequence")
    batches = [packed] if subject.trainer.args.denominator == "micro_batch" else [[row] for row in packed]
    cut = [_joined(subject, rows) for rows in batches]
    finding = _against_one(subject, {f"{len(subject.rows)} rows in {len(packed)} sequences": cut})
    finding.figures["most_rows_in_a_sequence"] = together
    return finding


def pack(subject: Subject) -> list[Row]:
    """The rows packed by the run's own strategy, into sequences as long as half of them or the longest row."""
    trainer = subject.trainer
    lengths = [len(row["input_ids"]) for row in subject.rows]
    names = sorted({"input_ids", "labels", *trainer.rows.columns.carried}.intersection(*subject.rows))
    prepare = Preparation(
        max_length=max(max(lengths), -(-sum(lengths) // 2)),
        truncation_mode="keep_start",
        packing=True,
        packing_strategy=subject.packing_strategy,
        shuffle=False,
        seed=0,
        num_proc=None,
        columns=trainer.rows.columns,
    )
    rows = Dataset.from_list([{name: row[name] for name in names} for row in subject.rows])
    return [dict(row) for row in prepare(rows, "train", {})]


def _joined(subject: Subject, rows: list[Row]) -> dict[str, Tensor]:
    """A padding-free batch, by the trainer's own collator told so."""
    collator = subject.trainer.data_collator
    padding_free = dataclasses.replace(collator, inner=dataclasses.replace(collator.inner, padding_free=True))
    return padding_free([dict(row) for row in rows])


def _no_positions(subject: Subject) -> str | None:
    """Why rows cannot be joined into one line; None where they can."""
    if not dataclasses.is_dataclass(getattr(subject.trainer.data_collator, "inner", None)):
        return "the collator is the user's own, which cannot be told to leave padding out"
    if not accepted(subject.base, {"position_ids": None}):
        return f"{type(subject.base).__name__} takes no position_ids, which tell documents apart"
    return None


def _against_one(subject: Subject, cuts: Mapping[str, list[dict[str, Any]]]) -> Finding:
    """Each cut's gradient against that of all rows in one padded micro-batch."""
    distances = {name: distance(subject.gradient(batches), subject.step.gradient) for name, batches in cuts.items()}
    errors = {name: error for name, (error, _) in distances.items()}
    told = "; ".join(f"{name}: relative error {error:.1e}" for name, error in errors.items())
    largest, weight = distances[worst(errors)]
    if not largest <= subject.rounding:
        told += f", most of it in {weight}"
    return within(largest, subject.rounding, told, **errors)


@check("chunk size", "the loss engine depends on its chunks: report it with qtarget env", of_gradient=True)
def chunks(subject: Subject) -> Finding:
    """The number of tokens the engine processes at a time does not change the gradient."""
    expected = Expected(subject)
    errors: dict[int, float] = {}
    for sample in subject.samples:
        given = expected.given(sample)
        whole = subject.engine(sample, given, chunk_rows=len(sample.labels))
        for size in _CHUNKS:
            if size < len(sample.labels):
                parts = subject.engine(sample, given, chunk_rows=size)
                both = dict(enumerate(relative(got, wanted) for got, wanted in zip(parts, whole, strict=True)))
                both[-1] = errors.get(size, 0.0)  # of the targets before
                errors[size] = both[worst(both)]
    if not errors:
        return not_applicable("the rows have too few supervised tokens to be cut into chunks")
    told = "; ".join(f"{size} tokens: relative error {error:.1e}" for size, error in errors.items())
    return within(errors[worst(errors)], subject.rounding, told, **{str(size): error for size, error in errors.items()})


@check(
    "world size",
    "processes do not count labels together, or average what was already divided: check the launcher, and that no "
    "process holds other rows or weights",
    of_gradient=True,
)
def world_size(subject: Subject) -> Finding:
    """A step over several processes has the gradient of one."""
    trainer, world = subject.trainer, subject.processes
    if world == 1:
        return not_applicable("one process; start it with torchrun --nproc_per_node 2 -m qtarget verify ...")
    if trainer.args.denominator == "micro_batch":
        return not_applicable("denominator is micro_batch: each process's batch counts the same, whatever it holds")
    if len(subject.rows) < world:
        return not_applicable(f"{len(subject.rows)} rows cannot be split over {world} processes; use more")
    # What DDP leaves in each process, over the trainer's own loader, against autograd over all rows.
    steps = 2 if len(subject.rows) >= 2 * world else 1
    size = len(subject.rows) // (world * steps)
    used = size * world * steps  # a last batch would be filled up with rows from the front
    trainer.train_dataset = trainer.train_dataset.select(range(used))
    wrapped, batches = trainer.one_pass(size)
    got: Gradient = subject.gradient(batches, wrapped)
    error, worst = distance(got, Expected(subject).gradient(subject.rows[:used]))
    error = float(trainer.accelerator.gather(torch.tensor([error], device=subject.device)).max())
    told = f"{world} processes, {len(batches)} micro-batches of {size} rows each: relative error {error:.1e}"
    return within(error, subject.rounding, told, processes=world, worst=worst)


@check(
    "labels in place",
    "labels were shifted or moved before the collator: give rows whose labels are aligned with their input_ids",
)
def labels_in_place(subject: Subject) -> Finding:
    """A label is the id at its own place, in every layout of a batch."""
    layouts = {"padded": [subject.step.batch]}
    if _no_positions(subject) is None:
        layouts["padding-free"] = [_joined(subject, subject.rows)]
        layouts["packed"] = [_joined(subject, [row]) for row in pack(subject)]
    count, wrong = 0, dict.fromkeys(layouts, 0)
    for name, batches in layouts.items():
        for batch in batches:
            trained = batch["labels"] != -100
            count += int(trained.sum())
            wrong[name] += int((batch["labels"] != batch["input_ids"])[trained].sum())
    told = f"{count} labels in {', '.join(layouts)} batches"
    if any(wrong.values()):
        told += "; not the id at their place: " + ", ".join(f"{n} {name}" for name, n in wrong.items() if n)
    return expect(not any(wrong.values()), told, labels=count, **wrong)


CHECKS = [micro_batches, padding, padding_free, packing, chunks, world_size, labels_in_place]
