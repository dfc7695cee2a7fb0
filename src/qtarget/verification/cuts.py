"""Is the gradient the same however a step is cut into micro-batches, chunks, processes?"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from qtarget.data.columns import columns_of
from qtarget.data.preparation import Preparation
from qtarget.verification.check import Check, Finding, expect, not_applicable, within, worst
from qtarget.verification.expected import Oracle, at
from qtarget.verification.subject import Gradient, Row, Subject, distance, relative

# A chunk of this many tokens leaves a last one that is shorter.
_CHUNKS = (7, 16)


def micro_batches(subject: Subject) -> Finding:
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


def padding(subject: Subject) -> Finding:
    batch = subject.step.batch
    if "attention_mask" not in batch:
        return not_applicable("the batches have no attention mask, so no padding")
    longer, more = dict(batch), max(8, batch["labels"].shape[1] // 4)
    collator = getattr(subject.trainer.data_collator, "inner", None)
    fill = {"labels": -100, "input_ids": int(getattr(collator, "pad_token_id", 0) or 0)}
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.shape[:2] == batch["labels"].shape:
            padded = value.new_full((value.shape[0], more, *value.shape[2:]), fill.get(name, _nothing_at(name)))
            longer[name] = torch.cat([value, padded], 1)
    return _against_one(subject, {f"{more} more tokens": [longer]})


def _nothing_at(name: str) -> int:
    return -1 if name.startswith("qtarget_uid_") else 0


def padding_free(subject: Subject) -> Finding:
    if why := _no_positions(subject):
        return not_applicable(why)
    return _against_one(subject, {"in one line": [_joined(subject, subject.rows)]})


def packing(subject: Subject) -> Finding:
    if why := _no_positions(subject):
        return not_applicable(why)
    if subject.packing_strategy == "wrapped":
        return not_applicable("packing_strategy is wrapped, under which documents see each other by design")
    packed = pack(subject)
    together = max(len(row["seq_lengths"]) for row in packed)
    if together < 2:
        return not_applicable("no two of the rows fit into one sequence")
    cut = [_joined(subject, [row]) for row in packed]
    if subject.trainer.args.denominator == "micro_batch":
        cut = [_joined(subject, packed)]
    found = _against_one(subject, {f"{len(subject.rows)} rows in {len(packed)} sequences": cut})
    return dataclasses.replace(found, figures={**found.figures, "most_rows_in_a_sequence": together})


def pack(subject: Subject) -> list[Row]:
    """The rows packed by the run's own strategy, into sequences as long as half of them or the longest row."""
    trainer = subject.trainer
    lengths = [len(row["input_ids"]) for row in subject.rows]
    carried = [name for name in trainer.rows.columns.carried if all(name in row for row in subject.rows)]
    names = ["input_ids", "labels", *carried]
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
    inner = collator.inner
    try:
        collator.inner = dataclasses.replace(inner, padding_free=True)
        return subject.collate(rows)
    finally:
        collator.inner = inner


def _no_positions(subject: Subject) -> str | None:
    """Why rows cannot be joined into one line; None where they can."""
    if not dataclasses.is_dataclass(getattr(subject.trainer.data_collator, "inner", None)):
        return "the collator is the user's own, which is not told to leave padding out"
    parameters = inspect.signature(type(subject.base).forward).parameters
    if "position_ids" not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return f"{type(subject.base).__name__} takes no position_ids, by which documents are told apart"
    return None


def _against_one(subject: Subject, cuts: Mapping[str, list[dict[str, Any]]]) -> Finding:
    """Each cut's gradient against that of all rows in one padded micro-batch."""
    errors = {name: distance(subject.gradient(batches), subject.step.gradient) for name, batches in cuts.items()}
    told = "; ".join(f"{name}: relative error {error:.1e}" for name, (error, _) in errors.items())
    error, weight = errors[worst({name: error for name, (error, _) in errors.items()})]
    if not error <= subject.rounding:
        told += f", most of it in {weight}"
    return within(error, subject.rounding, told, **{name: error for name, (error, _) in errors.items()})


def chunks(subject: Subject) -> Finding:
    """The engine over the sample in chunks of a few tokens, against all tokens at once."""
    sample, (_, columns) = subject.sample, Oracle(subject).sampled
    errors: dict[int, float] = {}
    for chosen, target in Oracle(subject).of_target():
        read = {name: column for name, column in at(columns, chosen).items() if name in columns_of(target)}
        others = subject.heads_at(chosen)

        def made(
            rows: int, chosen: Tensor = chosen, target: Any = target, others: Any = others, read: Any = read
        ) -> tuple[Tensor, Tensor]:
            hidden = sample.hidden[chosen.to(sample.hidden.device)]
            return subject.engine(hidden, sample.labels[chosen], target, others, read, chunk_rows=rows)

        whole = made(len(chosen))
        for rows in _CHUNKS:
            if rows < len(chosen):
                found = [relative(got, wanted) for got, wanted in zip(made(rows), whole, strict=True)]
                found.append(errors.get(rows, 0.0))
                errors[rows] = found[worst(dict(enumerate(found)))]
    if not errors:
        return not_applicable("the rows have too few supervised tokens to be cut into chunks")
    told = "; ".join(f"{rows} tokens: relative error {error:.1e}" for rows, error in errors.items())
    return within(errors[worst(errors)], subject.rounding, told, **{str(rows): e for rows, e in errors.items()})


def world_size(subject: Subject) -> Finding:
    """The gradient that DDP leaves in each process, over the trainer's own loader, against autograd over all rows."""
    trainer, world = subject.trainer, subject.processes
    if world == 1:
        return not_applicable("one process; start it with torchrun --nproc_per_node 2 -m qtarget verify ...")
    if trainer.args.denominator == "micro_batch":
        return not_applicable("denominator is micro_batch: each process's batch counts the same, whatever it holds")
    if len(subject.rows) < world:
        return not_applicable(f"{len(subject.rows)} rows cannot be shared by {world} processes; look at more")
    steps = 2 if len(subject.rows) >= 2 * world else 1
    size = len(subject.rows) // (world * steps)
    used = size * world * steps  # a last batch would be filled up with rows from the front
    trainer.train_dataset = trainer.train_dataset.select(range(used))
    wrapped, batches = trainer.one_pass(size)
    got: Gradient = subject.gradient(batches, wrapped)
    error, worst = distance(got, Oracle(subject).gradient(subject.rows[:used]))
    error = float(trainer.accelerator.gather(torch.tensor([error], device=subject.device)).max())
    told = f"{world} processes, {len(batches)} micro-batches of {size} rows each: relative error {error:.1e}"
    return within(error, subject.rounding, told, processes=world, worst=worst)


def labels_in_place(subject: Subject) -> Finding:
    """In every layout, a label is the id that stands at its own place."""
    batches = {"padded": [subject.step.batch]}
    if _no_positions(subject) is None:
        batches["padding-free"] = [_joined(subject, subject.rows)]
        batches["packed"] = [_joined(subject, [row]) for row in pack(subject)]
    wrong: dict[str, int] = {}
    count = 0
    for name, made in batches.items():
        for batch in made:
            trained = batch["labels"] != -100
            count += int(trained.sum())
            wrong[name] = wrong.get(name, 0) + int((batch["labels"] != batch["input_ids"])[trained].sum())
    told = f"{count} labels in {', '.join(batches)} batches"
    if any(wrong.values()):
        told += "; not the id at their place: " + ", ".join(f"{n} {name}" for name, n in wrong.items() if n)
    return expect(not any(wrong.values()), told, labels=count, **wrong)


_SAME = "the gradient is that of all rows in one micro-batch"

CHECKS = [
    Check(
        "micro-batches",
        f"in how many micro-batches a step is cut: {_SAME}",
        "the denominator is not counted over the whole step: a custom trainer's compute_loss or _get_num_items_in_batch "
        "averages each micro-batch for itself",
        micro_batches,
    ),
    Check(
        "padding",
        f"how far rows are padded: {_SAME}",
        "padded positions take part: check the pad token, the attention mask and labels at padding",
        padding,
    ),
    Check(
        "padding-free",
        f"rows in one line without padding: {_SAME}",
        "documents of a line see each other, or positions do not start again: this model or its attn_implementation "
        "cannot tell them apart by position_ids; leave padding_free and packing off",
        padding_free,
    ),
    Check(
        "packing",
        f"rows packed into sequences: {_SAME}",
        "packed documents see each other, or a label or column moved: set packing: false, or another attn_implementation",
        packing,
    ),
    Check(
        "chunk size",
        "how many tokens the engine takes at a time leaves the gradient unchanged",
        "the loss engine depends on its chunks: report it with qtarget env",
        chunks,
    ),
    Check(
        "world size",
        "a step over several processes has the gradient of one",
        "processes do not count labels together, or average what was already divided: check the launcher, and that no "
        "process holds other rows or weights",
        world_size,
    ),
]
