"""From a config file and flags to a trainer, for every verb that starts from a config."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import re
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtarget import hub
from qtarget.cli import terminal
from qtarget.errors import ConfigError, QTargetError, check_range, faults_of, loading, raise_together, reason

if TYPE_CHECKING:
    from qtarget.cli.settings import Settings

# What a verb decides whatever the config says. One that measures trains, evaluates, writes and pushes nothing.
MEASURES: dict[str, Any] = {
    "gradient_checkpointing": False,
    "activation_offloading": False,
    "eval_strategy": "no",
    "load_best_model_at_end": False,
    "resume_from_checkpoint": None,
    "lens_every": None,
    "push_to_hub": False,
    "report_to": "none",
    "optim": "adamw_torch",
    "lr_scheduler_type": "linear",
    "lr_scheduler_kwargs": None,
    "teacher_check_rows": 0,
}
# What else says what a run trains, where the verb says it.
NO_TARGET: dict[str, Any] = {
    "targets": None,
    "eval_target": None,
    "loss_type": None,
    "label_smoothing_factor": 0.0,
    "denominator": "all_labels",
}
NO_TEACHER: dict[str, Any] = dict.fromkeys(
    ("teacher_model_name_or_path", "teachers", "teacher_cache", "teacher_ema_decay", "teacher_context")
)
# Packing and shuffling change no row.
ONE_BY_ONE: dict[str, Any] = {"packing": False, "padding_free": False, "shuffle_dataset": False}


@dataclass
class Run:
    """What was asked for, checked as far as it can be without models.

    Attributes:
        settings: as read, with origins. config: QTargetConfig. model, script: TRL's ModelConfig and ScriptArguments.
        datasets: {"train": ..., "test": ...}. notes: what peers' spellings became. words: as given, less secrets.
    """

    settings: Settings
    config: Any
    model: Any
    script: Any
    datasets: dict[str, Any]
    notes: list[str]
    words: Sequence[str]

    def keep(self, chosen: Callable[[int], Iterable[int]]) -> None:
        """Drop the test split and all training rows but those chosen of so many: what is left out is not tokenised.

        A stream stays whole.
        """
        train = self.datasets["train"]
        self.datasets = {"train": train.select(chosen(len(train))) if hasattr(train, "select") else train}


def read(
    arguments: Sequence[str], fixed: dict[str, Any] | None = None, trains: bool = True, trainable: bool = True
) -> Run:
    """Read settings and load the datasets.

    Args:
        arguments: ``--config FILE`` and flags. fixed: settings that the verb decides, whatever was asked for.
        trains: whether the run writes to its output folder, resumes, and needs what its target needs.
        trainable: whether the rows must have a shape that can be trained on; prompts alone have not.

    Raises:
        ConfigError: every fault found, together.
    """
    from qtarget.signals import manifest

    run = check(arguments, fixed, trains)
    settings, config, script = run.settings, run.config, run.script
    raise_together(manifest.check(script.dataset_name, config, run.model))
    run.datasets = load_datasets(script, settings.faults)
    settings.faults += column_faults(config, run.datasets) if trainable else []
    raise_together(settings.faults)
    return run


def check(arguments: Sequence[str], fixed: dict[str, Any] | None = None, trains: bool = True) -> Run:
    """``read`` without the datasets: what the settings alone tell."""
    from qtarget.cli import settings as reading
    from qtarget.training import checks
    from qtarget.training.saving import output_folder

    # TRL's own default trips a deprecation warning of Transformers on every start.
    warnings.filterwarnings("ignore", message="`gradient_checkpointing` is deprecated", category=FutureWarning)
    settings = reading.read(arguments)
    if settings.unreadable:  # what else is missing may stand in that file
        raise ConfigError(settings.faults)
    settings.values["training"].update(fixed or {})
    config, notes = _training_config(settings)
    if config is not None and config.disable_tqdm:
        terminal.silence_libraries()
    groups = reading.groups()
    model, script = groups["model"](**settings.values["model"]), groups["script"](**settings.values["script"])
    # TRL makes text of a list of one, which PEFT takes for a pattern that the whole name must match.
    if isinstance(name := model.lora_target_modules, str) and name != "all-linear" and re.fullmatch(r"[\w.]+", name):
        model.lora_target_modules = [name]
    for name, value in (("model_name_or_path", model.model_name_or_path), ("dataset_name", script.dataset_name)):
        if not (value or "").strip():
            settings.faults.append(f"{name} is not set; name a folder or a hub id, in the config or as --{name}")
    if config is not None:
        if trains:
            named = [model.model_name_or_path, script.dataset_name, config.teacher_cache]
            named += [config.teacher_model_name_or_path, config.reference_model_name_or_path]
            settings.faults += output_folder.faults(config, [*named, *(one.name for one in config.pool_members())])
        objectives = [config.resolve_objective(), config.resolve_eval_objective()]
        settings.faults += checks.target_faults(objectives)
        settings.faults += checks.missing_teacher(config, objectives, False) + _resume_faults(config)
        settings.faults += _adapter_faults(model) if model.use_peft else []
    if (model.model_name_or_path or "").strip():
        asks, given = "use_peft" if model.use_peft else None, settings.values["model"]
        settings.faults += checks.beside_adapter(model.model_name_or_path, model.model_revision, asks, given)
    raise_together(settings.faults)
    assert config is not None
    return Run(settings, config, model, script, {}, notes, reading.without_secrets(arguments))


def _adapter_faults(model: Any) -> list[str]:
    from qtarget.training import checks

    faults = checks.adapter_on_head(model.lora_target_modules)
    faults += faults_of(check_range, "lora_alpha", model.lora_alpha, 0, open_low=True)  # 0 would train nothing
    return faults + faults_of(check_range, "lora_dropout", model.lora_dropout, 0, 1, open_high=True)


def row_by_row(arguments: Sequence[str], **more: Any) -> dict[str, Any]:
    """Settings under which rows come one by one, and as the config's own packing would cut them."""
    from qtarget.cli import settings

    given = settings.read(arguments).values["training"]
    fixed = MEASURES | NO_TARGET | ONE_BY_ONE | {"teacher_cache": None, "teacher_end_token": "label"} | more
    if given.get("packing"):
        fixed["truncation_mode"] = "keep_start"
        if given.get("packing_strategy", "bfd") != "bfd":  # rows go on in the next sequence: nothing is cut
            fixed["max_length"] = None
    return fixed


def _training_config(settings: Settings):
    """The QTargetConfig and notes on spellings; None where it cannot be built, with the reason among the faults."""
    from qtarget.targets import peers
    from qtarget.training import QTargetConfig

    values, notes = dict(settings.values["training"]), []
    try:
        spelled = peers.read(settings.spelled, values.get("target"))
        if spelled is not None:
            values["target"] = spelled.target.to_config()
            notes.append(spelled.note)
    except ConfigError as error:
        settings.faults += error.faults
    try:
        return QTargetConfig(**values), notes
    except ConfigError as error:
        settings.faults += error.faults
    except (ValueError, TypeError, OSError, ImportError) as error:
        settings.faults.append(_of_transformers(error, values))
    return None, notes


def _of_transformers(error: Exception, values: dict[str, Any]) -> str:
    """A refusal of TRL or Transformers, which may not say which setting it is about."""
    if isinstance(error, ImportError) and values.get("deepspeed"):
        return f"deepspeed is {values['deepspeed']!r}, but its package is not installed; pip install deepspeed"
    text = reason(error)
    said = []
    for name, value in values.items():
        words = [word for word in (value if isinstance(value, list) else [value]) if isinstance(word, str)]
        words = [name, *(word for word in words if len(word) > 2 and word not in ("none", "auto"))]
        if any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) for word in words):
            said.append(name)
    if not said or any(name in text for name in said):
        return text
    return f"{said[0]} is {values[said[0]]!r}: {text}"


def _resume_faults(config: Any) -> list[str]:
    """What can be seen of a checkpoint without models; the trainer looks again with them."""
    from qtarget.training.saving import checkpoints, run_identity

    folder = checkpoints.to_resume_from(config.resume_from_checkpoint, config.output_dir)
    if folder is None and config.resume_from_checkpoint is True:
        if not (passed_over := checkpoints.passed_over(config.output_dir)):
            return []  # a run killed before its first checkpoint starts from scratch by the same command
        return [
            f"resume_from_checkpoint is true, but output_dir {config.output_dir!r} holds no complete checkpoint: "
            f"{'; '.join(passed_over)}; leave it out to start from scratch"
        ]
    if folder is None:
        return []
    if broken := checkpoints.unreadable_files(folder):
        return broken
    known = run_identity.identity(config, config.resolve_objective(), {})
    del known["teacher"], known["reference"]
    return run_identity.differences(folder, known, partly=True)


def column_faults(config: Any, datasets: dict[str, Any]) -> list[str]:
    from qtarget.training import checks

    objectives = config.resolve_objective(), config.resolve_eval_objective()
    return checks.column_faults(config, objectives, checks.column_sets(*objectives, datasets.items()))


# How datasets calls what reads a file.
_FILES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def load_datasets(script: Any, faults: list[str], **how: Any) -> dict[str, Any]:
    """{"train": ..., "test": ...}; a missing test split is left out, a missing train split is a fault.

    ``how``: further arguments of ``datasets.load_dataset``.
    """
    from datasets import load_dataset

    name = script.dataset_name
    if why := hub.nowhere(name, "dataset"):
        faults.append(f"dataset_name is {name!r}, which cannot be loaded: {why}")
        return {}
    if Path(name).is_file():
        if Path(name).suffix not in _FILES:
            faults.append(
                f"dataset_name is {name!r}, a file type that qtarget does not read; name a {', '.join(_FILES)} file, a "
                "folder of them, or a hub id"
            )
            return {}
        name, how = _FILES[Path(name).suffix], {"data_files": name, **how}
    elif Path(name).is_dir():  # one called text, json or csv is no reader of such files
        name = os.path.join(".", name)
    try:
        splits = load_dataset(name, name=script.dataset_config, streaming=script.dataset_streaming, **how)
    except Exception as error:  # datasets raises many kinds, all of them about what was asked for
        faults.append(f"dataset_name is {script.dataset_name!r}, which cannot be loaded: {reason(error)}")
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


def build(run: Run, kind: Any = None, weights: bool = True) -> Any:
    """The trainer of a run, models loaded. Raises ConfigError for what TRL and Transformers refuse, too.

    Args:
        kind: QTargetTrainer, or a subclass of it. weights: load the student's; without them it can only prepare rows.
    """
    from trl import get_peft_config, get_quantization_config

    from qtarget.training import QTargetTrainer

    config, model = run.config, run.model
    _check_files(model, config)
    init = {"revision": model.model_revision, "attn_implementation": model.attn_implementation, "dtype": model.dtype}
    given: dict[str, Any] = config.model_init_kwargs or {}
    init |= {"dtype" if name == "torch_dtype" else name: value for name, value in given.items()}  # its old name
    config.model_init_kwargs = {name: value for name, value in init.items() if value is not None}
    settings: dict[str, Any] = {"train_dataset": run.datasets["train"], "eval_dataset": run.datasets.get("test")}
    try:
        student = model.model_name_or_path
        if weights:
            quantised = next((name for name in ("load_in_4bit", "load_in_8bit") if getattr(model, name)), None)
            if quantised and importlib.util.find_spec("bitsandbytes") is None:
                raise ConfigError(f"{quantised} is true, but its package is not installed; pip install bitsandbytes")
            settings["quantization_config"] = get_quantization_config(model)
            settings["peft_config"] = get_peft_config(model)
            if model.use_peft and model.model_revision != "main":  # or the adapter would be loaded on another base
                settings["peft_config"].revision = model.model_revision
        else:
            student, settings["processing_class"] = _without_weights(model, config)
        return (kind or QTargetTrainer)(student, config, **settings)
    except QTargetError:
        raise
    except Exception as error:
        if (sentence := _blamed(error, run)) is None:
            raise
        raise ConfigError(sentence) from error


# function that a library was in → the setting that asked for it, and what failed; the first that fits
_STEPS: dict[str, tuple[str, str]] = {
    "init_hf_repo": (
        "push_to_hub",
        "but the hub refuses it: {}; run hf auth login, name hub_model_id, or leave push_to_hub out",
    ),
    "clone_chat_template": ("chat_template_path", "whose chat template cannot be used: {}"),
    "_prepare_dataset": ("dataset_name", "whose rows cannot be prepared: {}"),
    "get_peft_model": ("use_peft", "but no adapters can be created: {}"),
    "from_pretrained": ("model_name_or_path", "which cannot be loaded: {}"),
}


def _blamed(error: Exception, run: Run) -> str | None:
    """The sentence for what a library refused while a trainer was made, by the step it was in; None: a fault of code."""
    trace = traceback.extract_tb(error.__traceback__)
    frames = {frame.name for frame in trace}
    if isinstance(error, UnicodeDecodeError) and any("pyarrow" in frame.filename for frame in trace):
        return f"dataset_name is {run.script.dataset_name!r}, which is not UTF-8 ({error}); save it as UTF-8"
    for function, (field, what) in _STEPS.items():
        if function in frames and (function != "_prepare_dataset" or isinstance(error, OSError | ValueError)):
            holder = next(h for h in (run.config, run.model, run.script) if hasattr(h, field))
            return f"{field} is {getattr(holder, field)!r}, {what.format(reason(error))}"
    if isinstance(error, OSError):
        return f"{error.filename} cannot be read or written: {reason(error)}" if error.filename else reason(error)
    if isinstance(error, ValueError | ImportError):
        return _of_transformers(error, run.settings.values["training"] | run.settings.values["model"])
    return None


def _check_files(model: Any, config: Any) -> None:
    """The small files of a model, so that what is wrong with them is said by name."""
    from transformers import GenerationConfig

    from qtarget.models.loading import load_config, load_tokenizer

    name = model.model_name_or_path
    for load, what in ((load_config, ""), (load_tokenizer, "tokenizer")):
        with loading("model_name_or_path", name, what):
            load(name, model.model_revision, trust_remote_code=config.trust_remote_code)
    if (Path(name) / "generation_config.json").is_file():
        with loading("model_name_or_path", name, "generation_config.json"):
            GenerationConfig.from_pretrained(name)
    if config.chat_template_path is not None:
        _check_template(config.chat_template_path)


def _check_template(path: str) -> None:
    """A Jinja file that can be read and parsed, or the folder or hub id of a tokenizer that has a template."""
    from jinja2 import TemplateError
    from transformers import AutoTokenizer
    from transformers.utils.chat_template_utils import _compile_jinja_template

    asked = f"chat_template_path is {path!r}"
    if not Path(path).is_file():
        with loading("chat_template_path", path, "tokenizer"):
            tokenizer: Any = AutoTokenizer.from_pretrained(path)
        if not tokenizer.chat_template:
            raise ConfigError(f"{asked}, whose tokenizer has no chat template; name a Jinja file, or another model")
        return
    if Path(path).suffix not in (".jinja", ".j2"):
        raise ConfigError(f"{asked}, which is not a template file; name a file that ends in .jinja")
    try:
        _compile_jinja_template(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, TemplateError) as error:
        raise ConfigError(f"{asked}, which cannot be read as a chat template: {reason(error)}; fix it") from error


def _without_weights(model: Any, config: Any) -> tuple[Any, Any]:
    """A student that has a shape and no numbers, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    from qtarget.models.loading import load_config, load_tokenizer

    named, trusted = (model.model_name_or_path, model.model_revision), config.trust_remote_code
    shape = load_config(*named, trust_remote_code=trusted)
    with torch.device("meta"):
        student = AutoModelForCausalLM.from_config(shape, trust_remote_code=trusted)
    student.hf_device_map = {"": "meta"}  # so that nothing tries to move it
    # A template's new tokens get rows in the embedding, whose mean and covariance are no numbers here.
    student.resize_token_embeddings = functools.partial(student.resize_token_embeddings, mean_resizing=False)
    with contextlib.suppress(OSError):  # a model need not have one
        student.generation_config = GenerationConfig.from_pretrained(
            model.model_name_or_path, revision=model.model_revision
        )
    config.model_init_kwargs = None
    return student, load_tokenizer(*named, trust_remote_code=trusted)
