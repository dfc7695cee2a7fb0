"""What can be known to be wrong before a step is trained.

Each check returns sentences; those at the end put them together and raise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoTokenizer
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from qtarget.data.columns import REFERENCE, SOURCE_ID
from qtarget.errors import DataError
from qtarget.targets.objective import Objective
from qtarget.teachers import settings as teacher_settings

if TYPE_CHECKING:
    from qtarget.training.trainer import QTargetTrainer

_NAMES = {
    "weight": "weights",
    "critical": "a mask of critical tokens",
    "old_logps": "the old policy's log-probabilities",
}
_MENDS = {
    "weight": "add it, set weights: online, or choose another target",
    "old_logps": "add it, set psft_refresh to a number of steps, or choose another target",
}


def missing_teacher(args: Any, objectives: Iterable[Objective], teacher_given: bool) -> list[str]:
    """A target that needs a teacher and got none."""
    if teacher_given or args.names_teacher:
        return []
    return [
        f"target {target} needs a teacher and got none; set teacher_model_name_or_path, or teachers, teacher_cache or "
        "teacher_ema_decay"
        for objective in objectives
        for target in objective.targets.values()
        if "teacher" in target.requires
    ]


def two_teachers(args: Any, teacher_given: bool) -> list[str]:
    """A teacher handed over as a model beside settings that name one."""
    named = [name for name in args.teacher_settings if name != "teacher_model_name_or_path"]
    return (
        [f"teacher_model is given beside {named[0]}; a run has one teacher: keep one"]
        if teacher_given and named
        else []
    )


def unused_teacher(args: Any, objectives: Iterable[Objective], teacher_given: bool) -> list[str]:
    """Warnings: a teacher nobody asks is never loaded."""
    objectives = list(objectives)
    if (teacher_given or args.names_teacher) and not any("teacher" in o.requires for o in objectives):
        return [f"a teacher is given, but target {objectives[0]} does not need it; it is not loaded"]
    return []


def missing_columns(
    dataset_name: str, columns: Iterable[str] | None, objective: Objective, args: Any, evaluated: bool = False
) -> list[str]:
    """A target that reads a column the dataset does not have, or a column that nothing would read."""
    if columns is None:
        return []
    columns = list(columns)
    has = f"(it has {', '.join(columns)})"
    instead = ", or report another objective there: eval_target: sft" if evaluated else ""
    faults = []
    if "old_policy" in objective.requires and args.psft_refresh != "never" and "old_logps" in columns:
        faults.append(
            f"the {dataset_name} dataset has a column old_logps, but psft_refresh is {args.psft_refresh}, which takes "
            "the old policy from the model itself; set psft_refresh: never to read the column, or drop it"
        )
    faults += [
        f"target {objective} needs {_NAMES[name]}, but the {dataset_name} dataset has no column {name!r} {has}; "
        + _MENDS.get(name, "add it, or choose another target")
        + instead
        for name in sorted(args.columns_for(objective.requires))
        if name not in columns
    ]
    if objective.column is not None and not {objective.column, SOURCE_ID} & set(columns):
        faults.append(
            f"targets names a target for each source, but the {dataset_name} dataset has no column "
            f"{objective.column!r} {has}; add it, or name the right one in source_column{instead}"
        )
    return faults


def reference_column(
    args: Any, sets: Iterable[tuple[str, Iterable[str] | None, Objective]], reference_given: bool
) -> tuple[bool, list[str]]:
    """Whether iw-sft's reference is read from a column in place of a model, and faults.

    Args:
        sets: (name, columns, objective) of each dataset, the one that is trained first. reference_given: as a model.
    """
    read = [(name, [*columns], objective) for name, columns, objective in sets if columns is not None]
    if args.weights != "online" or not read or REFERENCE not in read[0][1]:
        return False, []
    other = "reference_model is given" if reference_given else "reference_model_name_or_path is set"
    if reference_given or args.reference_model_name_or_path is not None:
        return False, [
            f"{other}, and the {read[0][0]} dataset has a column {REFERENCE!r}; the "
            "reference is read from one of them: leave one out"
        ]
    if args.packing and args.packing_strategy == "bfd_split":
        return False, [
            f"packing_strategy is 'bfd_split', which parts a row, and column {REFERENCE!r} is the mean over a whole one; "
            "use packing_strategy: bfd"
        ]
    return True, [
        f"weights are taken against column {REFERENCE!r}, which the {name} dataset has not; add it there, or report "
        "another objective there: eval_target: sft"
        for name, columns, objective in read
        if "weight" in objective.requires and REFERENCE not in columns
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


def columns_cannot_follow(args: Any, objectives: Iterable[Objective]) -> list[str]:
    """Settings under which what belongs to a sequence is lost."""
    online = args.weights == "online" and any("weight" in objective.requires for objective in objectives)
    if online and args.packing and args.packing_strategy == "wrapped":
        return [
            "weights is 'online' and packing_strategy is 'wrapped', which runs sequences together, so that a weight per "
            "sequence cannot be taken; use packing_strategy: bfd"
        ]
    return []


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


def no_generation_markers(tokenizer: Any, args: Any) -> list[str]:
    """assistant_only_loss with a chat template that does not say which tokens are the assistant's."""
    template = tokenizer.chat_template
    if args.chat_template_path and Path(args.chat_template_path).is_file():
        template = Path(args.chat_template_path).read_text(encoding="utf-8")
    if template is None:
        return ["assistant_only_loss is true, but the tokenizer has no chat template; set chat_template_path"]
    if has_generation_markers(template):
        return []
    given, tokenizer.chat_template = tokenizer.chat_template, template
    try:
        known = get_training_chat_template(tokenizer) is not None
    except ValueError:
        known = False
    finally:
        tokenizer.chat_template = given
    if known:
        return []
    return [
        "assistant_only_loss is true, but the chat template has no {% generation %} markers, so nothing tells the "
        "assistant's tokens from the rest; name a template that has them in chat_template_path, or set "
        "assistant_only_loss: false"
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


def packed_without_boundaries(dataset_name: str, dataset: Any, padding_free: bool) -> list[str]:
    """Packed rows that would get an all-ones mask: their documents would see each other."""
    if padding_free or (not isinstance(dataset, torch.utils.data.Dataset) and not hasattr(dataset, "column_names")):
        return []
    if "seq_lengths" not in (getattr(dataset, "column_names", None) or []):
        return []
    if hasattr(dataset, "__len__") and all(len(lengths) < 2 for lengths in dataset["seq_lengths"]):
        return []
    return [
        f"the {dataset_name} dataset is packed (column seq_lengths), but its batches would get an all-ones mask under "
        "which documents see each other; set padding_free: true with max_length: null, or turn packing (eval_packing) "
        "on for all sets or none"
    ]


# -- together ----------------------------------------------------------------------------------------------------


def before_loading(
    model: str | nn.Module,
    args: Any,
    objective: Objective,
    eval_objective: Objective,
    kwargs: Mapping[str, Any],
    teacher_given: bool,
    reference_given: bool,
) -> list[str]:
    """Every fault of a trainer's arguments that can be seen without weights."""
    objectives = [objective, eval_objective]
    faults = own_loss_beside_target(kwargs.get("compute_loss_func"))
    faults += missing_teacher(args, objectives, teacher_given) + two_teachers(args, teacher_given)
    faults += columns_cannot_follow(args, objectives)
    faults += adapter_on_head(getattr(kwargs.get("peft_config"), "target_modules", None))
    faults += reference_column(args, column_sets(objective, eval_objective, kwargs), reference_given)[1]
    if any("teacher" in o.requires for o in objectives):
        faults += teacher_settings.settings_faults(args)
    for name, dataset, trained in _sets(kwargs.get("train_dataset"), kwargs.get("eval_dataset")):
        columns = getattr(dataset, "column_names", None)
        if dataset is None or isinstance(columns, dict):
            continue
        faults += missing_columns(name, columns, objective if trained else eval_objective, args, not trained)
        formatted = kwargs.get("formatting_func") is not None
        faults += untrainable_rows(name, columns, args.dataset_text_field, formatted)
    reads_teacher = any("teacher" in o.requires for o in objectives) and not teacher_given
    if reads_teacher or args.assistant_only_loss:
        tokenizer = kwargs.get("processing_class") or _tokenizer_of(model)
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        if args.assistant_only_loss:
            faults += no_generation_markers(tokenizer, args)
        if reads_teacher and args.teacher_cache is not None:
            faults += teacher_settings.cache_faults(args, tokenizer)
        if reads_teacher:
            faults += teacher_settings.tokenizer_faults(args, tokenizer)
    return faults


def column_sets(
    objective: Objective, eval_objective: Objective, kwargs: Mapping[str, Any]
) -> list[tuple[str, Iterable[str] | None, Objective]]:
    """(name, columns, objective) of each dataset of a trainer's arguments."""
    return [
        (name, getattr(dataset, "column_names", None), objective if trained else eval_objective)
        for name, dataset, trained in _sets(kwargs.get("train_dataset"), kwargs.get("eval_dataset"))
    ]


def _sets(train: Any, evaluated: Any) -> list[tuple[str, Any, bool]]:
    """(name, dataset, whether it is trained on)."""
    named = evaluated.items() if isinstance(evaluated, Mapping) else [("eval", evaluated)]
    return [("train", train, True), *((name, dataset, False) for name, dataset in named)]


def prepared(trainer: QTargetTrainer, images: bool) -> list[str]:
    """Every fault of a trainer that has its data and its model. ``images``: whether its dataset holds some."""
    if images:
        return ["the dataset holds images; only text can be trained with a target: use TRL's SFTTrainer"]
    faults = []
    for name, dataset, _ in _sets(trainer.train_dataset, trainer.eval_dataset):
        if dataset is None:
            continue
        faults += packed_without_boundaries(name, dataset, trainer.padding_free)
        if not isinstance(dataset, torch.utils.data.IterableDataset):
            faults += no_supervised_token(name, dataset)
    parallelism = trainer.accelerator.parallelism_config
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        faults.append("context and sequence parallelism are not supported: their labels are already shifted")
    return faults


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


def _tokenizer_of(model: Any) -> Any:
    return AutoTokenizer.from_pretrained(model if isinstance(model, str) else model.config._name_or_path)
