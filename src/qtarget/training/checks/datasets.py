"""What can be found wrong in datasets and their columns before the first training step."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qtarget.data.columns import REFERENCE, SOURCE_ID
from qtarget.data.messages import trained_columns
from qtarget.data.validation import TOKEN_COLUMNS
from qtarget.errors import DataError
from qtarget.targets.objective import Objective

# (name, columns, objective) of a dataset; columns is None where it does not know them before it is read.
ColumnSet = tuple[str, list[str] | None, Objective]


# column → what it holds, and what to do where it is missing
_COLUMNS = {
    "weight": ("weights", "add it, set weights: online"),
    "critical": ("a mask of critical tokens", "add it"),
    "old_logps": ("the old policy's log-probabilities", "add it, set psft_refresh to a number of steps"),
}


def datasets_of(train: Any, evaluated: Any) -> list[tuple[str, Any]]:
    """(name, dataset) of a trainer's datasets, the one that is trained first."""
    named = evaluated.items() if isinstance(evaluated, Mapping) else [("eval", evaluated)]
    return [(name, dataset) for name, dataset in [("train", train), *named] if dataset is not None]


def column_sets(
    objective: Objective, eval_objective: Objective, datasets: Iterable[tuple[str, Any]]
) -> list[ColumnSet]:
    """What is known of datasets, given by name; the one that is trained is called "train"."""
    columns = [(name, getattr(dataset, "column_names", None)) for name, dataset in datasets]
    return [
        (name, [*names] if isinstance(names, list) else None, objective if name == "train" else eval_objective)
        for name, names in columns
    ]


def column_faults(
    args: Any, objectives: Iterable[Objective], sets: Iterable[ColumnSet], formatted: bool = False
) -> list[str]:
    """Every fault of the datasets' columns. ``formatted``: a function makes the text of each row."""
    faults = []
    online = args.weights == "online" and any("weight" in objective.requires for objective in objectives)
    if online and args.packing and args.packing_strategy == "wrapped":
        faults.append(
            "weights is 'online' and packing_strategy is 'wrapped', which joins sequences, so there is no weight per "
            "sequence; use packing_strategy: bfd"
        )
    for name, columns, objective in sets:
        faults += faults_of_columns(name, columns, objective, args, formatted)
    return faults


def faults_of_columns(
    name: str, columns: Sequence[str] | None, objective: Objective, args: Any, formatted: bool = False
) -> list[str]:
    """Every fault of one dataset's columns; none where they are not known before it is read."""
    if columns is None:
        return []
    faults = missing_columns(name, columns, objective, args)
    if "input_ids" not in columns:
        faults += token_columns_without_ids(name, columns)
        faults += [] if formatted else untrainable_rows(name, columns, args.dataset_text_field)
    return faults + unmet_masks(name, columns, args, formatted)


def missing_columns(dataset_name: str, columns: Sequence[str] | None, objective: Objective, args: Any) -> list[str]:
    """A target that reads a column the dataset does not have, or a column that nothing would read."""
    if columns is None:
        return []
    has = f"(it has {', '.join(columns)})"
    instead = "" if dataset_name == "train" else ", or report another objective there: eval_target: sft"
    faults = []
    if "old_policy" in objective.requires and args.psft_refresh != "never" and "old_logps" in columns:
        faults.append(
            f"the {dataset_name} dataset has a column old_logps, but psft_refresh is {args.psft_refresh}, which takes "
            "the old policy from the model itself; set psft_refresh: never to read the column, or drop it"
        )
    for name in sorted(set(args.columns_for(objective.requires)) - {*columns}):
        what, mend = _COLUMNS[name]
        faults.append(
            f"target {objective} needs {what}, but the {dataset_name} dataset has no column {name!r} {has}; {mend}, or "
            f"choose another target{instead}"
        )
    if objective.column is not None and not {objective.column, SOURCE_ID} & set(columns):
        faults.append(
            f"targets names a target for each source, but the {dataset_name} dataset has no column "
            f"{objective.column!r} {has}; add it, or name the right one in source_column{instead}"
        )
    return faults


def reference_column(args: Any, sets: Iterable[ColumnSet], reference_given: bool) -> tuple[bool, list[str]]:
    """Whether iw-sft's reference is read from a column in place of a model, and faults.

    Args:
        sets: the one that is trained first. reference_given: as a model.
    """
    known = [(name, columns, objective) for name, columns, objective in sets if columns is not None]
    if args.weights != "online" or not known or REFERENCE not in known[0][1]:
        return False, []
    if reference_given or args.reference_model_name_or_path is not None:
        other = "reference_model is given" if reference_given else "reference_model_name_or_path is set"
        return False, [
            f"{other}, and the {known[0][0]} dataset has a column {REFERENCE!r}; the reference is read from one of "
            "them: keep one"
        ]
    if args.packing and args.packing_strategy == "bfd_split":
        return False, [
            f"packing_strategy is 'bfd_split', which splits rows, but column {REFERENCE!r} is the mean over a whole "
            "row; use packing_strategy: bfd"
        ]
    return True, [
        f"weights are measured against column {REFERENCE!r}, which the {name} dataset does not have; add it there, or "
        "report another objective there: eval_target: sft"
        for name, columns, objective in known
        if "weight" in objective.requires and REFERENCE not in columns
    ]


def untrainable_rows(dataset_name: str, columns: Iterable[str] | None, text_field: str) -> list[str]:
    """A dataset without any of the shapes that can be trained on."""
    if columns is None or "input_ids" in columns or trained_columns(columns, text_field):
        return []
    return [
        f"the {dataset_name} dataset has columns {', '.join(sorted(columns)) or 'none'}; give it one of messages, "
        f"prompt and completion, {text_field} (dataset_text_field), conversations, or input_ids and labels"
    ]


def token_columns_without_ids(dataset_name: str, columns: Iterable[str]) -> list[str]:
    """Columns that would be taken for numbers of each token, such as the labels of a classification."""
    return [
        f"the {dataset_name} dataset has a column {name!r} and no input_ids; it holds a number per token only next to "
        "input_ids: rename it or drop it"
        for name in TOKEN_COLUMNS
        if name in columns
    ]


def unmet_masks(dataset_name: str, columns: Sequence[str], args: Any, formatted: bool = False) -> list[str]:
    """A mask that is asked for by name and that rows of this shape cannot have: all their tokens would be trained."""
    shape = ("input_ids",) if "input_ids" in columns else trained_columns(columns, args.dataset_text_field)
    rows = f"the rows of the {dataset_name} dataset are {' and '.join(shape)}"
    faults = []
    if (
        shape != ("prompt", "completion")
        and args.completion_only_loss
        and not {"completion_mask", "labels"} & {*columns}
    ):
        instead = "completion_mask, or labels" if "input_ids" in columns else "prompt and completion"
        faults.append(
            f"completion_only_loss is true, but {rows}; write {instead}, set assistant_only_loss: true for messages, or "
            "leave it out to train all tokens"
        )
    is_text = formatted or shape == (args.dataset_text_field,)
    no_mask = shape == ("input_ids",) and not {"assistant_masks", "labels"} & {*columns}
    if args.assistant_only_loss and shape and (is_text or no_mask):
        why = ", made text by formatting_func" if formatted else ", not conversational" if is_text else ""
        instead = "assistant_masks, or labels" if no_mask else "messages"
        faults.append(f"assistant_only_loss is true, but {rows}{why}; write {instead}, or set it to false")
    return faults


def no_supervised_token(dataset_name: str, rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Labels of the first rows that are all ignored, or only at position 0, which nothing predicts."""
    seen = 0
    for row in itertools.islice(rows, 1000):
        if "labels" not in row or any(label != -100 for label in row["labels"][1:]):
            return []
        seen += 1
    what = f"none of its first {seen} rows has" if seen else "it has no row left with"
    return [
        f"the {dataset_name} dataset has no supervised token: {what} a label to train; check completion_only_loss, "
        "assistant_only_loss, the chat template, and max_length (a prompt that fills it leaves nothing to learn)"
    ]


def packed_without_boundaries(dataset_name: str, dataset: Any, padding_free: bool) -> list[str]:
    """Packed rows that would get an all-ones mask: their documents would see each other."""
    if padding_free or "seq_lengths" not in (getattr(dataset, "column_names", None) or []):
        return []
    if hasattr(dataset, "__len__") and all(len(lengths) < 2 for lengths in dataset["seq_lengths"]):
        return []
    return [
        f"the {dataset_name} dataset is packed (column seq_lengths), but its batches would get an all-ones mask under "
        "which documents see each other; set padding_free: true with max_length: null, or turn packing (eval_packing) "
        "on for all sets or none"
    ]


def packed_batch(inputs: Mapping[str, Any]) -> None:
    """Raise where a batch holds several documents in a row under a mask that does not part them."""
    positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
    if positions is None or mask is None or mask.ndim != 2:
        return
    if bool(((positions[:, 1:] == 0) & (mask[:, 1:] == 1)).any()):
        raise DataError(
            "the batch is packed (position_ids start again inside a row) and has a two-dimensional attention_mask, "
            "under which documents see each other; leave attention_mask out of a packed batch"
        )
