"""Objectives × layouts of a batch: the rows as a trainer gets them, and the documents autograd sees one at a time.

Cutting and joining are written out here, from what each packing promises, so that a trainer that agrees has moved every
label and every column where it belongs and has kept documents apart.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

import tiny_models
from published import CASES, label_log_p
from quick_runs import (
    Weights,
    change_by_autograd,
    copied_weights,
    labels_of,
    logits_of,
    quick_trainer,
    supervised_positions,
    tokenised_dataset,
    weight_change,
)

CASE = {case.id: case for case in CASES}
OBJECTIVES = ["sft", "dft", "asft:kl_weight=0.8", "gem", "cft", "iw-sft", "psft", "target-sft"]
# At which the rows below fill eight sequences in each packing: two processes with four micro-batches each get as many.
MAX_LENGTH = 116
LAYOUTS: dict[str, dict[str, Any]] = {
    "padded": {},
    "bfd": {"packing": True, "max_length": MAX_LENGTH},
    "bfd_split": {"packing": True, "packing_strategy": "bfd_split", "max_length": MAX_LENGTH},
    "wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": MAX_LENGTH},
    "padding_free": {"padding_free": True, "max_length": None},
}


@functools.cache
def layout_dataset() -> Dataset:
    """Sixteen rows, the last longer than ``MAX_LENGTH``, prompts masked, with every column."""
    model = tiny_models.trained_model().eval()
    single = [dict(row) for row in tokenised_dataset(tiny_models.conversation_dataset(18))]
    long = {name: [value for row in single[15:] for value in row[name]] for name in single[0]}

    @torch.no_grad()
    def old_logps(number: int, row: dict) -> list[float]:
        made = torch.zeros(len(row["input_ids"]))
        ratios = torch.tensor([0.0, 0.1, -0.1, 0.4, -0.5]).repeat(len(made))[: len(labels_of(row))]
        made[supervised_positions(row) + 1] = label_log_p(logits_of(model, row), labels_of(row)) - ratios
        made = made.clamp(max=0)  # a probability is 1 at most
        return made.tolist()

    return tokenised_dataset(
        Dataset.from_list([*single[:15], long]),
        weight=lambda number, row: [(i + number) % 4 / 3 for i in range(len(row["input_ids"]))],
        critical=lambda number, row: [(i + number) % 3 == 0 for i in range(len(row["input_ids"]))],
        old_logps=old_logps,
    )


def layout_documents(layout: str) -> list[dict[str, Any]]:
    """What autograd sees: each document with nothing before it."""
    rows = [dict(row) for row in layout_dataset()]
    columns = list(rows[0])
    if layout in ("padded", "padding_free"):
        return rows
    if layout == "bfd":
        return [{name: row[name][:MAX_LENGTH] for name in columns} for row in rows]
    if layout == "wrapped":  # one long text, cut anywhere
        rows = [{name: [value for row in rows for value in row[name]] for name in columns}]
    return [
        dict(zip(columns, map(list, zip(*piece, strict=True)), strict=True))
        for row in rows
        for piece in _pieces([*zip(*(row[name] for name in columns), strict=True)])
    ]


def _pieces(tokens: list) -> list[list]:
    return [tokens[begin : begin + MAX_LENGTH] for begin in range(0, len(tokens), MAX_LENGTH)]


def layout_teacher(dtype: torch.dtype = torch.float64):
    return tiny_models.trained_model(seed=7, width=48, tied=False).to(dtype).eval()


def layout_student(tied: bool = True) -> Any:
    return tiny_models.trained_model(tied=tied).double()


def case_loss(name: str) -> Callable[..., Any]:
    return lambda logits, labels, **given: CASE[name].loss(logits, labels, given)


def layout_change_by_autograd(name: str, layout: str, make: Callable[[], Any] = layout_student, **more: Any) -> Weights:
    """How far one step of SGD (``steps``, ``lr``) moves the weights, by autograd on full logits."""
    start = make().eval()
    return change_by_autograd(
        make(),
        layout_documents(layout),
        case_loss(name),
        teacher=layout_teacher() if "teacher_logits" in CASE[name].needs else None,
        reference=(lambda row: logits_of(start, row)) if "reference_logits" in CASE[name].needs else None,
        **more,
    )


def trainer_for_layout(name: str, layout: str, folder: Path, make: Callable[[], Any] = layout_student, **settings: Any):
    """A trainer on that layout; its batch is set by ``in_one_step``."""
    case = CASE[name]
    refresh = settings.setdefault("psft_refresh", "never")
    return quick_trainer(
        make(),
        folder,
        layout_dataset() if refresh == "never" else layout_dataset().remove_columns(["old_logps"]),
        target={"preset": case.preset, **case.hyperparameters},
        teacher_model=copy.deepcopy(layout_teacher()) if "teacher_logits" in case.needs else None,
        **(LAYOUTS[layout] | settings),
    )


def in_one_step(made: Any, accumulation: int, processes: int = 1) -> None:
    """Let one optimiser step see every row, in so many micro-batches a process."""
    size = -(-len(made.train_dataset) // (accumulation * processes))
    made.args.per_device_train_batch_size = made._train_batch_size = size
    made.args.gradient_accumulation_steps = accumulation


def layout_change_by_trainer(
    name: str, layout: str, accumulation: int, folder: Path, processes: int = 1, **settings: Any
) -> Weights:
    """How far one step of the trainer moves the weights."""
    made = trainer_for_layout(name, layout, folder, **settings)
    in_one_step(made, accumulation, processes)
    before = copied_weights(made.model)
    made.train()
    return weight_change(before, made.model)
