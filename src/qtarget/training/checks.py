"""What can be known to be wrong before a step is trained."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from qtarget import hub
from qtarget.data.columns import REFERENCE, SOURCE_ID
from qtarget.data.messages import trained_columns
from qtarget.data.validation import TOKEN_COLUMNS
from qtarget.errors import ConfigError, DataError, reason
from qtarget.losses.full_logits import target_loss
from qtarget.models.loading import find_adapter, load_tokenizer
from qtarget.targets.objective import Objective
from qtarget.teachers import settings as teacher_settings
from qtarget.training import fit, hosted, trainable

if TYPE_CHECKING:
    from qtarget.training.trainer import QTargetTrainer

# (name, columns, objective) of a dataset; columns is None where it does not know them before it is read.
ColumnSet = tuple[str, list[str] | None, Objective]

# Tokens of the vocabulary on which targets are tried: more than the k of any rule.
_MADE_UP = 2**12

# column → what it holds, and what to do where it is missing
_COLUMNS = {
    "weight": ("weights", "add it, set weights: online"),
    "critical": ("a mask of critical tokens", "add it"),
    "old_logps": ("the old policy's log-probabilities", "add it, set psft_refresh to a number of steps"),
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
            "weights is 'online' and packing_strategy is 'wrapped', which runs sequences together, so that a weight per "
            "sequence cannot be taken; use packing_strategy: bfd"
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
            f"{other}, and the {known[0][0]} dataset has a column {REFERENCE!r}; the reference is read from one of them: "
            "leave one out"
        ]
    if args.packing and args.packing_strategy == "bfd_split":
        return False, [
            f"packing_strategy is 'bfd_split', which parts a row, and column {REFERENCE!r} is the mean over a whole one; "
            "use packing_strategy: bfd"
        ]
    return True, [
        f"weights are taken against column {REFERENCE!r}, which the {name} dataset has not; add it there, or report "
        "another objective there: eval_target: sft"
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
        f"the {dataset_name} dataset has a column {name!r} and no input_ids; it holds a number per token only beside "
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


def target_faults(objectives: Iterable[Objective]) -> list[str]:
    """Targets whose rules, residuals or divergences fail on two tokens of made-up logits; a user's own code may."""
    logits = torch.linspace(0, 4, 2 * _MADE_UP).view(_MADE_UP, 2).T  # [2, V], every token another
    made_up: dict[str, dict[str, Any]] = {
        "teacher": {"teacher_logits": logits.flip(1)},
        "reference": {"reference_logits": logits.flip(0)},
        "old_policy": {"old_logps": torch.tensor([-1.0, -2.0])},
        "weight": {"weight": torch.tensor([1.0, 0.5])},
        "critical": {"critical": torch.tensor([True, False])},
    }
    faults = []
    targets = [target for objective in objectives for target in (*objective.finals(), *objective.at(0, 2))]
    for target in [target for number, target in enumerate(targets) if target not in targets[:number]]:
        tried = f"target {target}, trust {target.trust.label}, tried on two tokens of made-up statistics"
        given = {name: value for need in target.requires for name, value in made_up[need].items()}
        try:
            target_loss(logits, torch.tensor([0, _MADE_UP - 1]), target, **given)
        except ConfigError as error:
            faults += [f"{tried}: {fault}" for fault in error.faults]
        except Exception as error:
            faults.append(f"{tried}, failed with {reason(error)}; mend its rule, residual or divergence")
    return list(dict.fromkeys(faults))


def adapter_on_head(target_modules: str | Iterable[str] | None) -> list[str]:
    """LoRA on the head would be ignored: the loss multiplies by the head's own weight."""
    modules = [target_modules] if isinstance(target_modules, str) else target_modules or []
    return [
        f"lora_target_modules holds {name!r}; an adapter on the head is not supported: take it out, or train the whole "
        "head with lora_modules_to_save"
        for name in modules
        if name in ("lm_head", "embed_out", "output_layer")
    ]


# Settings of a new adapter → what PEFT calls them in one that is there.
_OF_ADAPTERS = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "lora_target_parameters": "target_parameters",
    "lora_modules_to_save": "modules_to_save",
    "lora_task_type": "task_type",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}


def beside_adapter(name: str, revision: str | None, setting: str | None, given: Mapping[str, Any]) -> list[str]:
    """What contradicts a model that is an adapter, which is trained on as it is.

    Args:
        name, revision: of the model. setting: the one that asks for a new adapter, None where none does.
        given: settings of adapters by TRL's names.
    """
    try:
        found = find_adapter(name, revision)
    except ValueError as error:
        return [f"model_name_or_path is {name!r}, which cannot be loaded: {error}"]
    if found is None:
        return []
    what = f"model_name_or_path is {name!r}, an adapter for {found.base!r}"
    if setting is not None:
        return [
            f"{setting} asks for a new adapter, but {what}; leave it out to train that adapter on, or merge it first "
            f"(qtarget merge {name} -o FOLDER) and train a new one on the merged model"
        ]
    return [
        f"{ours} is {value!r}, but {what} whose {theirs} is {found.settings.get(theirs)!r}; it is trained on as it is: "
        f"leave {ours} out"
        for ours, theirs in _OF_ADAPTERS.items()
        if (value := given.get(ours)) is not None and _differs(value, found.settings.get(theirs))
    ]


def _differs(value: Any, there: Any) -> bool:
    """Whether two settings of adapters mean other things; all-linear is not written into an adapter as such."""
    if value in ("all-linear", ["all-linear"]) and isinstance(there, list):
        return False
    one, other = (
        {each} if isinstance(each, str) else {*each} if isinstance(each, list) else each for each in (value, there)
    )
    return bool(one != other and (one or other))


def no_generation_markers(tokenizer: Any, args: Any) -> list[str]:
    """assistant_only_loss with a chat template that does not say which tokens are the assistant's."""
    template = tokenizer.chat_template
    if args.chat_template_path and Path(args.chat_template_path).is_file():
        template = Path(args.chat_template_path).read_text(encoding="utf-8")
    if template is None:
        return ["assistant_only_loss is true, but the tokenizer has no chat template; set chat_template_path"]
    if has_generation_markers(template):
        return []
    own, tokenizer.chat_template = tokenizer.chat_template, template
    try:
        if get_training_chat_template(tokenizer) is not None:
            return []
    except ValueError:  # TRL knows no template with markers for it
        pass
    finally:
        tokenizer.chat_template = own
    return [
        "assistant_only_loss is true, but the chat template has no {% generation %} markers, so nothing tells the "
        "assistant's tokens from the rest; name a template that has them in chat_template_path, or set "
        "assistant_only_loss: false"
    ]


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


def before_loading(
    model: str | nn.Module,
    args: Any,
    objectives: Sequence[Objective],
    sets: Iterable[ColumnSet],
    kwargs: Mapping[str, Any],
    teacher_given: bool,
) -> list[str]:
    """Every fault of a trainer's arguments that can be seen without weights, but for those of ``reference_column``."""
    faults = []
    if kwargs.get("compute_loss_func") is not None:
        faults.append(
            "compute_loss_func is given beside target; a run trains one objective: remove it, or write it as a target of "
            "your own (target: my_pkg.my_module:my_target)"
        )
    faults += target_faults(objectives) + missing_teacher(args, objectives, teacher_given)
    named = [name for name in args.teacher_settings if name != "teacher_model_name_or_path"]
    if teacher_given and named:
        faults.append(f"teacher_model is given beside {named[0]}; a run has one teacher: keep one")
    faults += adapter_on_head(getattr(kwargs.get("peft_config"), "target_modules", None))
    if isinstance(model, str):
        asks = None if kwargs.get("peft_config") is None else "peft_config"
        faults += beside_adapter(model, (args.model_init_kwargs or {}).get("revision"), asks, {})
    faults += column_faults(args, objectives, sets, kwargs.get("formatting_func") is not None)
    evaluated, own_metrics = kwargs.get("eval_dataset"), kwargs.get("compute_metrics") is not None
    own_optimizer = any(part is not None for part in kwargs.get("optimizers") or ())
    own_optimizer |= kwargs.get("optimizer_cls_and_kwargs") is not None
    roles = args.models_for(frozenset().union(*(objective.requires for objective in objectives)))
    reference = args.reference_model_name_or_path
    if "reference" in roles and reference is not None and (why := hub.nowhere(reference)):
        faults.append(f"reference_model_name_or_path is {reference!r}, which cannot be loaded: {why}")
    faults += hosted.faults(args, objectives[0], evaluated, own_metrics, own_optimizer)
    asks_teacher = any("teacher" in objective.requires for objective in objectives)
    loads_teacher = asks_teacher and not teacher_given
    if asks_teacher:
        faults += teacher_settings.settings_faults(args)
    if loads_teacher or args.assistant_only_loss:
        name: Any = model if isinstance(model, str) else model.config._name_or_path  # type: ignore[union-attr]
        tokenizer: Any = kwargs.get("processing_class") or load_tokenizer(name)
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        if args.assistant_only_loss:
            faults += no_generation_markers(tokenizer, args)
        if loads_teacher and args.teacher_cache is not None:
            faults += teacher_settings.cache_faults(args, tokenizer)
        if loads_teacher:
            faults += teacher_settings.tokenizer_faults(args, tokenizer)
    return faults


def prepared(trainer: QTargetTrainer, images: bool) -> list[str]:
    """Every fault of a trainer that has its data and its model. ``images``: whether its dataset holds some."""
    if images:
        return ["the dataset holds images; only text can be trained with a target: use TRL's SFTTrainer"]
    faults = [*trainable.tied_tokens(trainer.model), *trainable.missing_modules(trainer.model)]
    for name, dataset in datasets_of(trainer.train_dataset, trainer.eval_dataset):
        faults += packed_without_boundaries(name, dataset, trainer.padding_free)
        if not isinstance(dataset, torch.utils.data.IterableDataset):
            faults += no_supervised_token(name, dataset)
        faults += fit.faults(trainer, name, dataset)
    parallelism = trainer.accelerator.parallelism_config
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        faults.append("context and sequence parallelism are not supported: their labels are already shifted")
    return faults
