"""Reads settings from a YAML file and flags, under TRL's names; flags win."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qtarget import own_code
from qtarget.cli import yaml_text
from qtarget.errors import ConfigError
from qtarget.teachers import mapping

# Names of other versions and programs → what it is here.
_RENAMED = {
    **dict.fromkeys(("torch_dtype", "model_dtype", "bnb_4bit_compute_dtype"), "dtype"),
    **dict.fromkeys(
        ("max_seq_length", "max_seq_len", "model_max_length", "cutoff_len", "sequence_len", "block_size"), "max_length"
    ),
    **dict.fromkeys(
        ("model", "model_name", "model_id", "base_model", "pretrained_model_name_or_path"), "model_name_or_path"
    ),
    **dict.fromkeys(
        ("tokenizer", "tokenizer_name", "tokenizer_name_or_path"),
        "read from the folder of model_name_or_path: put the tokenizer there",
    ),
    **dict.fromkeys(("dataset", "datasets", "dataset_path", "data_path", "train_file"), "dataset_name"),
    **dict.fromkeys(("dataset_split", "train_split"), "dataset_train_split"),
    **dict.fromkeys(("eval_split", "validation_split", "test_split"), "dataset_test_split"),
    **dict.fromkeys(
        ("batch_size", "micro_batch_size", "train_batch_size", "per_gpu_train_batch_size"),
        "per_device_train_batch_size",
    ),
    **dict.fromkeys(("eval_batch_size", "per_gpu_eval_batch_size"), "per_device_eval_batch_size"),
    **dict.fromkeys(("epochs", "num_epochs", "n_epochs"), "num_train_epochs"),
    **dict.fromkeys(("no_cuda", "use_cuda"), "use_cpu: true to train without a GPU"),
    **dict.fromkeys(("lora_rank", "lora_dim"), "lora_r"),
    **dict.fromkeys(("flash_attn", "use_flash_attention_2"), "attn_implementation: flash_attention_2"),
    **dict.fromkeys(("ref_model", "reference_model", "ref_model_name_or_path"), "reference_model_name_or_path"),
    **dict.fromkeys(("push_to_hub_token", "use_auth_token"), "hub_token"),
    "adafactor": "optim: adafactor",
    "evaluation_strategy": "eval_strategy",
    "gradient_clipping": "max_grad_norm",
    "group_by_length": "train_sampling_strategy: group_by_length",
    "lora_target": "lora_target_modules",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "modules_to_save": "lora_modules_to_save",
    "num_workers": "dataloader_num_workers",
    "optimizer": "optim",
    "push_to_hub_model_id": "hub_model_id",
    "save_safetensors": "no longer a setting: weights are always safetensors",
    "streaming": "dataset_streaming",
    "teacher_model": "teacher_model_name_or_path",
    "text_field": "dataset_text_field",
    "use_lora": "use_peft",
    "warmup_ratio": "warmup_steps, where a number below 1 is a share of all steps",
}


SECRET = "hub_token"  # the one setting that is not printed, and not written into a run's folder


@dataclass
class Settings:
    """What a run was asked to do.

    Attributes:
        values: settings of each group of fields ("training", "model", "script"), only those that were given.
        spelled: peers' keys for an objective.
        origin: field → "file" or "flag".
        notes: what the file says of itself, and as ``provenance`` where its values come from (``cli/recipe.py``).
        faults: what is wrong with them so far.
        unreadable: the config file could not be read.
    """

    values: dict[str, dict[str, Any]] = field(default_factory=lambda: {"training": {}, "model": {}, "script": {}})
    spelled: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    unreadable: bool = False

    def given_by(self, origin: str) -> dict[str, Any]:
        """The settings that came from "file" or "flag", a secret as Transformers writes it."""
        values = {name: value for group in self.values.values() for name, value in group.items()} | self.spelled
        values |= {SECRET: f"<{SECRET.upper()}>"} if SECRET in values else {}
        return {name: values[name] for name, place in self.origin.items() if place == origin and name in values}


def without_secrets(words: Sequence[str]) -> list[str]:
    """A command's words without the flag of the secret and its value; flags may be written with hyphens."""
    flags = f"--{SECRET}", f"--{SECRET.replace('_', '-')}"
    pairs = zip(["", *words], words, strict=False)
    return [word for before, word in pairs if before not in flags and word.partition("=")[0] not in flags]


def groups() -> dict[str, type]:
    """The dataclasses whose fields are settings."""
    from trl import ModelConfig, ScriptArguments

    from qtarget.training import QTargetConfig

    return {"training": QTargetConfig, "model": ModelConfig, "script": ScriptArguments}


def read(arguments: Sequence[str]) -> Settings:
    """Collect settings from ``--config FILE`` and ``--field value`` flags; faults are kept, not raised."""
    from qtarget.cli import recipe
    from qtarget.targets import peers

    settings = Settings()
    flags = _flags(arguments, settings.faults)
    config_file = flags.pop("config", None)
    given: _Given = []
    if config_file is True or isinstance(config_file, list):
        raise ConfigError("--config has no value or several; write --config FILE")
    if config_file is not None:
        own_code.look_in(Path(str(config_file)).parent)
        from_file, text = _read_file(str(config_file), settings.faults)
        settings.unreadable = from_file is None
        settings.notes = {key: value for key, value in (from_file or {}).items() if key in recipe.NOTES}
        settings.faults += recipe.faults(settings.notes)
        if from_file and (provenance := recipe.provenance(text)):
            settings.notes["provenance"] = provenance
        given += [("file", key, value) for key, value in (from_file or {}).items() if key not in recipe.NOTES]
    given += [("flag", key, value) for key, value in flags.items()]
    where = {
        f.name: (group, _hint(cls, f.name))
        for group, cls in groups().items()
        for f in dataclasses.fields(cls)
        if f.init
    }
    for origin, key, value in _with_flat_teacher(given, settings.faults):
        try:
            if key in where:
                group, hint = where[key]
                settings.values[group][key] = _as(hint, value, key)
            elif key in peers.KEYS:
                settings.spelled[key] = _yaml(value, key) if isinstance(value, str) else value
            else:
                place = f"key in {config_file}" if origin == "file" else "flag"
                raise ConfigError(_unknown_key(place, key, origin, [*where, *peers.KEYS]))
        except ConfigError as error:
            settings.faults += error.faults
        else:
            settings.origin[key] = origin
    return settings


_Given = list[tuple[str, str, Any]]  # (origin, key, value)


def _with_flat_teacher(given: _Given, faults: list[str]) -> _Given:
    """``teacher: {model: ...}`` and ``--teacher.model`` as the settings they stand for, where they stand."""
    named = {(origin, key): value for origin, key, value in given}
    settings: _Given = []
    for origin, key, value in given:
        if key != "teacher" and not key.startswith("teacher."):
            settings.append((origin, key, value))
            continue
        try:
            if key != "teacher":
                value = {key.removeprefix("teacher."): value}
            elif isinstance(value, str) and value.lstrip().startswith("{"):
                value = _yaml(value, key)
            inside = mapping.flat(value)
        except ConfigError as error:
            faults += error.faults
            continue
        for setting, inner in inside.items():
            beside = named.setdefault((origin, setting), inner)
            if str(beside) != str(inner):  # flags are text
                faults.append(mapping.twice(setting, inner, beside))
            settings.append((origin, setting, inner))
    return settings


def _unknown_key(place: str, key: str, origin: str, valid: typing.Iterable[str]) -> str:
    """The sentence for it; with some two hundred valid names, only the nearest is shown."""
    shown = f"--{key}" if origin == "flag" else repr(key)
    if key in _RENAMED:
        return f"unknown {place}: {shown}; it is {_RENAMED[key]}"
    near = difflib.get_close_matches(key, list(valid), n=1, cutoff=0.5)
    mend = f"did you mean {near[0]}? " if near else ""
    return f"unknown {place}: {shown}; {mend}see all settings with: qtarget train --help_all"


def _flags(arguments: Sequence[str], faults: list[str]) -> dict[str, Any]:
    """``--name value``, ``--name=value``, ``--name`` (true) and ``--name a b`` (a list)."""
    flags: dict[str, Any] = {}
    name = None
    for word in arguments:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            flags[name] = value if equals else True
            if equals:
                name = None
        elif name is None:
            faults.append(f"{word!r} belongs to no setting; write settings as --name value")
        elif flags[name] is True:
            flags[name] = word
        elif isinstance(flags[name], list):
            flags[name].append(word)
        else:
            flags[name] = [flags[name], word]
    return flags


def _read_file(path: str, faults: list[str]) -> tuple[dict[str, Any] | None, str]:
    """(the settings of a file, None where it holds none; its text)."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        loaded = yaml_text.load(text, f"config is {path!r}")
        if loaded is None or isinstance(loaded, dict):
            return {str(key): value for key, value in (loaded or {}).items()}, text
        faults.append(f"config is {path!r}, which holds a {type(loaded).__name__}; write lines of name: value")
    except ConfigError as error:
        faults += error.faults
    except UnicodeDecodeError as error:
        faults.append(f"config is {path!r}, which is not UTF-8 at byte {error.start}; save it as UTF-8 text")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        faults.append(f"config is {path!r}, which cannot be read: {reason}; name a YAML file")
    return None, ""


_hints = functools.cache(typing.get_type_hints)  # milliseconds a class, which two hundred fields ask for


def _hint(cls: type, name: str) -> tuple[type, ...]:
    """The plain types a field takes, such as (float,) for ``float | None``."""
    annotation = _hints(cls)[name]
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    options = typing.get_args(annotation) if is_union else (annotation,)
    plain = [typing.get_origin(option) or option for option in options if option is not type(None)]
    return tuple(option for option in plain if isinstance(option, type)) if Any not in plain else ()


def _yaml(text: str, key: str) -> Any:
    return yaml_text.load(text, f"{key} is {text if len(text) < 200 else text[:200] + '...'!r}")


def _as(hint: tuple[type, ...], value: Any, key: str) -> Any:
    """A value in its field's type. YAML reads 1e-5 as text and no as false; flags are all text."""
    text = isinstance(value, str)
    if text and "\0" in value:
        raise ConfigError(f"{key} is {value!r}, which holds a NUL character; remove it")
    none = text and value.lower() in ("none", "null", "~") and key != "report_to"  # whose "none" is a name
    if value is None or none:
        return None
    if not hint:  # any type: a target
        return _yaml(value, key) if text else value
    if list in hint:
        if isinstance(value, list):
            return value
        if text and value.startswith("["):
            return _yaml(value, key)
        if text and str not in hint:
            return [value]
    if dict in hint and (isinstance(value, dict) or (text and re.match(r"\s*\{(?![{%])", value))):  # no template
        return _yaml(value, key) if text else value
    if bool in hint and not (text and str in hint):
        word = str(value).lower()
        if word in ("true", "false", "yes", "no", "on", "off", "1", "0"):
            return word in ("true", "yes", "on", "1")
        if str not in hint:
            raise ConfigError(f"{key} is {value!r}; use true or false")
    if str in hint:
        if value is False:
            return "no"  # eval_strategy: no
        if key == "resume_from_checkpoint" and str(value).lower() == "true":
            return True
        if isinstance(value, tuple({list, dict} - set(hint))):
            raise ConfigError(f"{key} is {value!r}; use text")
        if int in hint and re.fullmatch(r"-?\d+", str(value)):  # pad_to_multiple_of, psft_refresh
            return int(value)
        return value if isinstance(value, (dict, list)) else str(value)
    if int in hint or float in hint:
        if not isinstance(value, (bool, list, dict)):
            with contextlib.suppress(TypeError, ValueError):
                as_float = float(value)
                if int in hint and as_float.is_integer():
                    return int(as_float)
                if float in hint:
                    return as_float
        raise ConfigError(f"{key} is {value!r}; use {'a number' if float in hint else 'a whole number'}")
    return value
