"""What can be known to be wrong before any weights are loaded. Each check returns sentences; none raises."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from qtarget.targets import Target
from qtarget.teachers.same_vocabulary import vocabulary_difference
from qtarget.training.columns import columns_of

_NAMES = {
    "weight": "weights",
    "critical": "a mask of critical tokens",
    "old_logps": "the old policy's log-probabilities",
}


def missing_teacher(args: Any, targets: Iterable[Target], teacher_given: bool) -> list[str]:
    """A target that needs a teacher and got none."""
    if teacher_given or args.teacher_model_name_or_path:
        return []
    return [
        f"target {target} needs a teacher and got none; set teacher_model_name_or_path"
        for target in _unique(targets)
        if "teacher" in target.requires
    ]


def unused_teacher(args: Any, targets: Iterable[Target], teacher_given: bool) -> list[str]:
    """Warnings: a teacher nobody asks is never loaded."""
    if (teacher_given or args.teacher_model_name_or_path) and not any("teacher" in t.requires for t in targets):
        return [f"a teacher is given, but target {next(iter(targets))} does not need it; it is not loaded"]
    return []


def missing_columns(dataset_name: str, columns: Iterable[str] | None, target: Target) -> list[str]:
    """A target that reads a column the dataset does not have."""
    if columns is None:
        return []
    columns = list(columns)
    return [
        f"target {target} needs {_NAMES[name]}, but the {dataset_name} dataset has no column {name!r} "
        f"(it has {', '.join(columns)}); add it, or choose another target"
        for name in columns_of(target)
        if name not in columns
    ]


def untrainable_rows(
    dataset_name: str, columns: Iterable[str] | None, text_field: str, formatted: bool = False
) -> list[str]:
    """A dataset without any of the shapes that can be trained on."""
    if columns is None or formatted:
        return []
    have = set(columns)
    shapes: list[set[str]] = [{"input_ids"}, {"messages"}, {"conversations"}, {"prompt", "completion"}, {text_field}]
    if any(shape <= have for shape in shapes):
        return []
    return [
        f"the {dataset_name} dataset has columns {', '.join(sorted(have)) or 'none'}; give it one of messages, "
        f"prompt and completion, {text_field} (dataset_text_field), conversations, or input_ids and labels"
    ]


def columns_cannot_follow(args: Any, targets: Iterable[Target]) -> list[str]:
    """Settings under which a per-token column would be cut off its tokens."""
    names = columns_of(*targets)
    if not names:
        return []
    faults = []
    for setting, value in (
        ("packing", args.packing),
        ("eval_packing", args.eval_packing),
        ("padding_free", args.padding_free),
    ):
        if value:
            faults.append(
                f"{setting} is {value} and the target reads column {names[0]!r}, which does not follow it yet; "
                f"turn {setting} off"
            )
    if args.truncation_mode == "keep_end":
        faults.append(
            f"truncation_mode is 'keep_end' and the target reads column {names[0]!r}, which is cut at the end; "
            "use keep_start"
        )
    return faults


def own_loss_beside_target(compute_loss_func: object) -> list[str]:
    if compute_loss_func is None:
        return []
    return [
        "compute_loss_func is given beside target; a run trains one objective: remove it, or write it as a target of "
        "your own (target: my_pkg.my_module:my_target)"
    ]


def adapter_on_head(
    target_modules: object, head_names: Iterable[str] = ("lm_head", "embed_out", "output_layer")
) -> list[str]:
    """LoRA on the head would be ignored: the loss multiplies by the head's own weight."""
    modules = [target_modules] if isinstance(target_modules, str) else list(target_modules or [])  # type: ignore[call-overload]
    hit = [name for name in modules if name in head_names]
    return [
        f"lora_target_modules holds {name!r}; an adapter on the head is not supported: take it out, or train the whole "
        "head with lora_modules_to_save"
        for name in hit
    ]


def other_tokenizer(student: Any, teacher: Any, teacher_name: str) -> list[str]:
    """A teacher whose ids mean other tokens."""
    difference = vocabulary_difference(student, teacher)
    if difference is None:
        return []
    return [
        f"teacher_model_name_or_path is {teacher_name!r}, which has another tokenizer: {difference}; "
        "use a teacher of the same family"
    ]


def no_supervised_token(dataset_name: str, rows: Iterable[Mapping[str, Any]], looked_at: int = 1000) -> list[str]:
    """Labels that are all ignored, or only at position 0, which nothing predicts."""
    seen = 0
    for row in rows:
        if "labels" not in row:
            return []
        if any(label != -100 for label in row["labels"][1:]):
            return []
        seen += 1
        if seen == looked_at:
            break
    what = f"none of its first {seen} rows has" if seen else "it has no row left with"
    return [
        f"the {dataset_name} dataset has no supervised token: {what} a label to train; check completion_only_loss, "
        "assistant_only_loss, the chat template, and max_length (a prompt that fills it leaves nothing to learn)"
    ]


def _unique(targets: Iterable[Target]) -> list[Target]:
    kept: list[Target] = []
    for target in targets:
        if target not in kept:
            kept.append(target)
    return kept
