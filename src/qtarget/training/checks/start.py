"""What can be found wrong in a recipe, its models and targets before the first step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from qtarget import hub
from qtarget.errors import ConfigError, reason
from qtarget.losses.full_logits import target_loss
from qtarget.models.loading import find_adapter, load_tokenizer
from qtarget.targets.objective import Objective
from qtarget.teachers import settings as teacher_settings
from qtarget.training.checks import fit, hosted, trainable
from qtarget.training.checks.datasets import (
    ColumnSet,
    column_faults,
    datasets_of,
    no_supervised_token,
    packed_without_boundaries,
)

if TYPE_CHECKING:
    from qtarget.training.trainer import QTargetTrainer

# Tokens of the vocabulary on which targets are tried: more than the k of any rule.
_MADE_UP = 2**12


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
            faults.append(f"{tried}, failed with {reason(error)}; fix its rule, residual or divergence")
    return list(dict.fromkeys(faults))


def adapter_on_head(target_modules: str | Iterable[str] | None) -> list[str]:
    """LoRA on the head would be ignored: the loss multiplies by the head's own weight."""
    modules = [target_modules] if isinstance(target_modules, str) else target_modules or []
    return [
        f"lora_target_modules holds {name!r}; an adapter on the head is not supported: remove it, or train the whole "
        "head with lora_modules_to_save"
        for name in modules
        if name in ("lm_head", "embed_out", "output_layer")
    ]


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
            f"{setting} asks for a new adapter, but {what}; leave it out to train that adapter further, or merge it "
            f"first (qtarget merge {name} -o FOLDER) and train a new one on the merged model"
        ]
    return [
        f"{ours} is {value!r}, but {what} whose {theirs} is {found.settings.get(theirs)!r}; it is trained further as "
        f"it is: leave {ours} out"
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
        "assistant_only_loss is true, but the chat template has no {% generation %} markers, so nothing marks the "
        "assistant's tokens; name a template that has them in chat_template_path, or set assistant_only_loss: false"
    ]


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
            "compute_loss_func is given together with target; a run trains one objective: remove it, or write it as a "
            "target of your own (target: my_pkg.my_module:my_target)"
        )
    faults += target_faults(objectives) + missing_teacher(args, objectives, teacher_given)
    named = [name for name in args.teacher_settings if name != "teacher_model_name_or_path"]
    if teacher_given and named:
        faults.append(f"teacher_model is given together with {named[0]}; a run has one teacher: keep one")
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
