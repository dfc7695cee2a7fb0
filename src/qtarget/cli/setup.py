"""From a config file and flags to a trainer, for every verb that starts from a config."""

from __future__ import annotations

import contextlib
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtarget.errors import ConfigError, QTargetError, loading, raise_together, reason
from qtarget.planning.shapes import is_path

if TYPE_CHECKING:
    from qtarget.cli.settings import Settings

# What a verb decides whatever the config says. One that measures trains, evaluates, writes and pushes nothing.
MEASURES: dict[str, Any] = {
    "gradient_checkpointing": False,
    "eval_strategy": "no",
    "load_best_model_at_end": False,
    "resume_from_checkpoint": None,
    "lens_every": None,
    "push_to_hub": False,
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
        datasets: {"train": ..., "test": ...}. notes: what peers' spellings became.
    """

    settings: Settings
    config: Any
    model: Any
    script: Any
    datasets: dict[str, Any]
    notes: list[str]

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

    # TRL's own default trips a deprecation warning of Transformers on every start.
    warnings.filterwarnings("ignore", message="`gradient_checkpointing` is deprecated", category=FutureWarning)
    settings = reading.read(arguments)
    if settings.unreadable:  # what else is missing may stand in that file
        raise ConfigError(settings.faults)
    settings.values["training"].update(fixed or {})
    config, notes = _training_config(settings)
    groups = reading.groups()
    model, script = groups["model"](**settings.values["model"]), groups["script"](**settings.values["script"])
    for name, value in (("model_name_or_path", model.model_name_or_path), ("dataset_name", script.dataset_name)):
        if not value:
            settings.faults.append(f"{name} is not set; name a folder or a hub id, in the config or as --{name}")
    if config is not None:
        settings.faults += _output_faults(config) if trains else []
        objectives = [config.resolve_objective(), config.resolve_eval_objective()]
        settings.faults += checks.target_faults(objectives)
        settings.faults += checks.missing_teacher(config, objectives, False) + _resume_faults(config)
        settings.faults += checks.adapter_on_head(model.lora_target_modules) if model.use_peft else []
    raise_together(settings.faults)
    assert config is not None
    return Run(settings, config, model, script, {}, notes)


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
    text = reason(error)
    said = []
    for name, value in values.items():
        words = [word for word in (value if isinstance(value, list) else [value]) if isinstance(word, str) and word]
        if any(word in text for word in [name, *words]):
            said.append(name)
    if isinstance(error, ImportError) and values.get("deepspeed"):
        said = ["deepspeed"]
    if not said or any(name in text for name in said):
        return text
    return f"{said[0]} is {values[said[0]]!r}: {text}"


def _output_faults(config: Any) -> list[str]:
    from qtarget.training import checkpoints

    folder = Path(config.output_dir)
    try:
        folder.exists()
    except OSError as error:  # a name longer than the file system takes
        return [f"output_dir is {str(folder)[:100]!r}..., which cannot be a folder ({error.strerror}); choose another"]
    held = [*folder.glob("checkpoint-*"), *folder.glob("*.safetensors"), *folder.glob("train_results.json")]
    if held and not config.resume_from_checkpoint:
        return [
            f"output_dir is {str(folder)!r}, which holds another run ({held[0].name}); choose another folder, or go on "
            "with that run by --resume_from_checkpoint true"
        ]
    return checkpoints.unwritable(folder)


def _resume_faults(config: Any) -> list[str]:
    """What can be seen of a checkpoint without models; the trainer looks again with them."""
    from qtarget.training import checkpoints, run_identity

    folder = checkpoints.to_resume_from(config.resume_from_checkpoint, config.output_dir)
    if folder is None and config.resume_from_checkpoint is True:
        if not (passed_over := checkpoints.passed_over(config.output_dir)):
            return []  # a run killed before its first checkpoint starts anew by the same command
        return [
            f"resume_from_checkpoint is true, but output_dir {config.output_dir!r} holds no checkpoint that is whole: "
            f"{'; '.join(passed_over)}; leave it out to start anew"
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
    if Path(name).is_file():
        if Path(name).suffix not in _FILES:
            faults.append(
                f"dataset_name is {name!r}, a file of a kind that is not read; name a {', '.join(_FILES)} file, a folder "
                "of them, or a hub id"
            )
            return {}
        name, how = _FILES[Path(name).suffix], {"data_files": name, **how}
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
    init |= config.model_init_kwargs or {}
    config.model_init_kwargs = {name: value for name, value in init.items() if value is not None}
    settings: dict[str, Any] = {"train_dataset": run.datasets["train"], "eval_dataset": run.datasets.get("test")}
    try:
        student = model.model_name_or_path
        if weights:
            settings["quantization_config"] = get_quantization_config(model)
            settings["peft_config"] = get_peft_config(model)
        else:
            student, settings["processing_class"] = _without_weights(model, config)
        return (kind or QTargetTrainer)(student, config, **settings)
    except QTargetError:
        raise
    except UnicodeDecodeError as error:
        name = run.script.dataset_name
        raise ConfigError(f"dataset_name is {name!r}, which is not UTF-8 ({error}); save it as that") from error
    except Exception as error:
        refusal = isinstance(error, ValueError | ImportError) and not isinstance(error, OSError)
        if not (refusal or isinstance(error, OSError) or _comes_of_loading(error)):
            raise
        name = model.model_name_or_path  # TRL's and Transformers' own refusals say what they are about
        about = "" if refusal else f"model_name_or_path is {name!r}, which cannot be loaded: "
        raise ConfigError(about + reason(error)) from error


def _check_files(model: Any, config: Any) -> None:
    """The small files of a model, so that what is wrong with them is said by name."""
    from transformers import AutoConfig, AutoTokenizer

    name = model.model_name_or_path
    how = {"revision": model.model_revision, "trust_remote_code": config.trust_remote_code}
    for kind, what in ((AutoConfig, ""), (AutoTokenizer, "tokenizer")):
        with loading("model_name_or_path", name, what):
            kind.from_pretrained(name, **how)
    path = config.chat_template_path
    if path is not None and is_path(path) and not Path(path).exists():
        raise ConfigError(
            f"chat_template_path is {path!r}, which is not there; name a Jinja file, a folder or a hub id"
        )


def _comes_of_loading(error: Exception) -> bool:
    """Whether it was raised while Transformers read a model's weights."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(frame.name == "from_pretrained" and "transformers" in frame.filename for frame in frames)


def _without_weights(model: Any, config: Any) -> tuple[Any, Any]:
    """A student that has a shape and no numbers, and its tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    loading = {"revision": model.model_revision, "trust_remote_code": config.trust_remote_code}
    shape = AutoConfig.from_pretrained(model.model_name_or_path, **loading)
    with torch.device("meta"):
        student = AutoModelForCausalLM.from_config(shape, trust_remote_code=config.trust_remote_code)
    student.hf_device_map = {"": "meta"}  # so that nothing tries to move it
    with contextlib.suppress(OSError):  # a model need not have one
        student.generation_config = GenerationConfig.from_pretrained(
            model.model_name_or_path, revision=model.model_revision
        )
    config.model_init_kwargs = None
    return student, AutoTokenizer.from_pretrained(model.model_name_or_path, **loading)
