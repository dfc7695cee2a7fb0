"""``qtarget train``: a model, a dataset and a target from a YAML file and flags."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qtarget.cli import fields
from qtarget.errors import ConfigError

_USAGE = """\
usage: qtarget train --config FILE [--any_field value ...]
       accelerate launch -m qtarget train --config FILE   (or torchrun --nproc_per_node N -m qtarget train ...)

Fine-tune a model toward a target. Keys of the file and flags are TRL's names and those below; flags win. Peers'
spellings of an objective (use_dft_loss, use_eaft, gem_beta, ...) are read too.
"""


def run(arguments: Sequence[str]) -> int:
    if "-h" in arguments or "--help" in arguments or not arguments:
        _print_help()
        return 0
    if "--help_all" in arguments or "--help-all" in arguments:
        _print_help_all()
        return 0
    # TRL's own default trips a deprecation warning of Transformers on every start.
    warnings.filterwarnings("ignore", message="`gradient_checkpointing` is deprecated", category=FutureWarning)
    from qtarget.cli import settings as reading

    settings = reading.read(arguments)
    if settings.unreadable:  # what else is missing may stand in that file
        raise ConfigError(settings.faults)
    config, notes = _training_config(settings)
    groups = reading.groups()
    model, script = groups["model"](**settings.values["model"]), groups["script"](**settings.values["script"])
    for name, value in (("model_name_or_path", model.model_name_or_path), ("dataset_name", script.dataset_name)):
        if not value:
            settings.faults.append(f"{name} is not set; name a folder or a hub id, in the config or as --{name}")
    if config is not None:
        settings.faults += _output_faults(config) + _need_faults(config)
        settings.faults += _adapter_faults(model)
    _raise_together(settings.faults)
    assert config is not None
    datasets = _load_datasets(script, settings.faults)
    settings.faults += _column_faults(config, datasets)
    _raise_together(settings.faults)
    if _is_main():
        _print_settings(settings, config, model, script, notes)
    trainer = _build(config, model, script, datasets)
    try:
        return _train(trainer, config, script)
    except ConfigError:
        print(file=sys.stderr)  # leave the progress bar's line
        raise


def _raise_together(faults: list[str]) -> None:
    if faults:
        raise ConfigError(list(dict.fromkeys(faults)))


# -- what was asked for ------------------------------------------------------------------------------------------


def _training_config(settings: Any):
    """The QTargetConfig and notes on spellings; None where it cannot be built, with the reason among the faults."""
    from qtarget.targets import Target, spellings
    from qtarget.training import QTargetConfig

    values, notes = dict(settings.values["training"]), []
    try:
        spelled = spellings.read(settings.spelled)
        if spelled is not None:
            if values.get("target") is not None and Target.from_config(values["target"]) != spelled.target:
                raise ConfigError(f"target is {values['target']!r}, but {spelled.note}; keep one of them")
            values["target"] = spelled.target.to_config()
            notes.append(spelled.note)
    except ConfigError as error:
        settings.faults += error.faults
    try:
        return QTargetConfig(**values), notes
    except ConfigError as error:
        settings.faults += error.faults
    except (ValueError, TypeError, OSError) as error:
        settings.faults.append(_one_line(error))
    return None, notes


def _output_faults(config: Any) -> list[str]:
    folder = Path(config.output_dir)
    held = [*folder.glob("checkpoint-*"), *folder.glob("*.safetensors"), *folder.glob("train_results.json")]
    if held and not config.resume_from_checkpoint:
        return [
            f"output_dir is {str(folder)!r}, which holds another run ({held[0].name}); choose another folder, or go on "
            "with that run by --resume_from_checkpoint true"
        ]
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return [f"output_dir is {str(folder)!r}, which cannot be written; choose a folder you own"]
    return []


def _need_faults(config: Any) -> list[str]:
    from qtarget.training import checks

    faults = checks.missing_teacher(config, [config.resolve_objective(), config.resolve_eval_objective()], False)
    return faults + _resume_faults(config)


def _resume_faults(config: Any) -> list[str]:
    """What can be seen of a checkpoint without models; the trainer looks again with them."""
    from qtarget.training import checks, identity

    folder = checks.checkpoint_folder(_resume(config.resume_from_checkpoint), config.output_dir)
    if folder is None:
        return []
    settings = identity.identity(config, config.resolve_objective(), None, None)
    known = {name: value for name, value in settings.items() if name not in ("teacher", "reference")}
    return identity.differences(folder, known, partly=True)


def _adapter_faults(model: Any) -> list[str]:
    from qtarget.training import checks

    return checks.adapter_on_head(model.lora_target_modules) if model.use_peft else []


def _column_faults(config: Any, datasets: dict[str, Any]) -> list[str]:
    from qtarget.training import checks

    objective, eval_objective = config.resolve_objective(), config.resolve_eval_objective()
    faults = checks.columns_cannot_follow(config, [objective, eval_objective])
    for name, dataset in datasets.items():
        if getattr(dataset, "column_names", None) is not None:
            trained = name == "train"
            faults += checks.missing_columns(
                name, dataset.column_names, objective if trained else eval_objective, config, not trained
            )
            faults += checks.untrainable_rows(name, dataset.column_names, config.dataset_text_field)
    return faults


def _load_datasets(script: Any, faults: list[str]) -> dict[str, Any]:
    """{"train": ..., "test": ...}; a missing test split is left out, a missing train split is a fault."""
    from datasets import load_dataset

    try:
        splits = load_dataset(script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming)
    except Exception as error:  # datasets raises many kinds, all of them about what was asked for
        faults.append(f"dataset_name is {script.dataset_name!r}, which cannot be loaded: {_one_line(error)}")
        return {}
    if script.dataset_train_split not in splits:
        faults.append(
            f"dataset_train_split is {script.dataset_train_split!r}, but {script.dataset_name} has {', '.join(splits)}"
        )
        return {}
    datasets = {"train": splits[script.dataset_train_split]}
    if script.dataset_test_split in splits and script.dataset_test_split != script.dataset_train_split:
        datasets["test"] = splits[script.dataset_test_split]
    return datasets


# -- the run -----------------------------------------------------------------------------------------------------


def _build(config: Any, model: Any, script: Any, datasets: dict[str, Any]) -> Any:
    from trl import get_peft_config, get_quantization_config

    from qtarget.training import QTargetTrainer

    init = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(config.model_init_kwargs or {}),
    }
    config.model_init_kwargs = {name: value for name, value in init.items() if value is not None}
    try:
        return QTargetTrainer(
            model.model_name_or_path,
            config,
            train_dataset=datasets["train"],
            eval_dataset=datasets.get("test"),
            quantization_config=get_quantization_config(model),
            peft_config=get_peft_config(model),
        )
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(
            f"model_name_or_path is {model.model_name_or_path!r}, which cannot be loaded: {_one_line(error)}"
        ) from error
    except (ValueError, ImportError) as error:  # TRL's and Transformers' own refusals
        raise ConfigError(_one_line(error)) from error


def _train(trainer: Any, config: Any, script: Any) -> int:
    from qtarget.cli import summary

    evaluated = trainer.eval_dataset is not None
    before = summary.evaluate(trainer) if evaluated else {}
    result = trainer.train(resume_from_checkpoint=_resume(config.resume_from_checkpoint))
    after = summary.evaluate(trainer) if evaluated else {}
    trainer.save_model(config.output_dir)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    if trainer.accelerator.is_main_process:
        folder = Path(config.output_dir)
        (folder / "target.json").write_text(json.dumps(trainer.args.resolve_objective().to_config(), indent=2) + "\n")
        if evaluated:
            (folder / "before_after.json").write_text(json.dumps({"before": before, "after": after}, indent=2) + "\n")
        summary.show(trainer, before, after, folder)
    if config.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
    trainer.accelerator.wait_for_everyone()
    if hasattr(trainer, "end"):
        trainer.end()
    return 0


def _resume(value: Any) -> Any:
    return True if str(value).lower() == "true" else value


def _is_main() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text or type(error).__name__


# -- help and settings -------------------------------------------------------------------------------------------


def _print_help() -> None:
    print(_USAGE)
    for group, rows in fields.COMMON:
        print(f"{group}:")
        for name, default, what in rows:
            shown = "" if default is None else f" ({_shown(default)})"
            print(f"  --{name:<30} {what}{shown}")
        print()
    print("every field: qtarget train --help_all      the targets: qtarget targets")


def _print_help_all() -> None:
    from qtarget.cli.settings import groups

    print(_USAGE)
    for group, cls in groups().items():
        print(f"{group} ({cls.__name__}):")
        for field in dataclasses.fields(cls):
            if field.init:
                default = "" if field.default is dataclasses.MISSING else f" ({_shown(field.default)})"
                text = " ".join(str(field.metadata.get("help", "")).replace("%%", "%").split())
                print(f"  --{field.name:<32} {text}{default}")
        print()


def _print_settings(settings: Any, config: Any, model: Any, script: Any, notes: list[str]) -> None:
    """Each setting with its origin; of TRL's many, those that were given or that the help table shows."""
    given = settings.origin
    names = [*fields.names(), *(name for name in given if name not in fields.names())]
    width = max(len(name) for name in names)
    print("settings")
    for name in names:
        holder = next((h for h in (config, model, script) if hasattr(h, name)), None)
        value = getattr(holder, name) if holder is not None else settings.spelled.get(name)
        if name in given or value is not None:
            print(f"  {name:<{width}}  {_shown(value):<40}  {given.get(name, 'default')}")
    for note in notes:
        print(f"note: {note}")


def _shown(value: Any) -> str:
    return str(getattr(value, "value", value))
