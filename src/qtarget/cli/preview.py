"""Checks a recipe without weights, for `qtarget train --dry_run` and `qtarget plan`."""

from __future__ import annotations

import copy
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtarget.cli import fields, picture, recipe, setup
from qtarget.cli.settings import Settings
from qtarget.cli.terminal import silence_libraries, tell
from qtarget.errors import ConfigError, loading, raise_together
from qtarget.planning import memory, shapes, workload
from qtarget.planning import steps as arithmetic
from qtarget.planning.workload import Frozen

if TYPE_CHECKING:
    from qtarget.data.picture import Picture

GIB = 2**30


@dataclass
class Found:
    """What a recipe's settings, folders and known shapes tell, without weights.

    Attributes:
        asked: the settings. gpus: processes. student: its shape, None where it is not known. others: frozen models.
        rows: of the training data, None where that is not known; where: what is known of them. batch: rows of an
            optimiser step. steps: None where they are not known. untold: sentences on what could not be looked at.
        picture: of what the first rows train; None where rows or tokenizer are not here.
    """

    asked: setup.Run
    gpus: int
    student: shapes.Shape | None
    others: list[Frozen]
    rows: int | None
    where: str
    batch: int
    steps: arithmetic.Steps | None
    untold: list[str]
    picture: Picture | None


def look(arguments: Sequence[str], gpus: int) -> Found:
    """Read and check. Raises ConfigError with every contradiction found."""
    asked = _checked(arguments)
    faults: list[str] = []
    student, others, untold = _models(asked, faults)
    rows, where, picture = _rows(asked, faults, untold)
    notes, config = asked.settings.notes, asked.config
    batch = gpus * config.per_device_train_batch_size * config.gradient_accumulation_steps
    steps = None if rows is None or config.packing else arithmetic.planned(rows, gpus, config)
    given_epochs = "num_train_epochs" in asked.settings.origin
    faults += arithmetic.faults(steps, batch, gpus, config, notes.get("expected_batch"), given_epochs)
    raise_together(faults)
    return Found(asked, gpus, student, others, rows, where, batch, steps, untold, picture)


def show(arguments: Sequence[str], gpus: int, show_rows: int, every_setting: bool = False) -> None:
    """Check and print, so many rows as text. Raises ConfigError with every contradiction found."""
    found = look(arguments, gpus)
    asked, config = found.asked, found.asked.config
    print(f"dry run on {gpus} GPU{'s' if gpus > 1 else ''}: no weights are loaded, nothing is written")
    given = f"{len(asked.settings.origin)} given, all valid; {config.resolve_objective().describe()}"
    show_head(found, "settings", [given, *asked.notes])
    tell("data", f"{asked.script.dataset_name}: {found.where}")
    tell("batch", batch_line(config, gpus, found.batch))
    tell("steps", steps_line(config, found.steps))
    limit = f"gradient norm {config.max_grad_norm:g}" if config.max_grad_norm else "none"
    tell("clipping", f"{limit}, of a gradient whose denominator is {config.denominator}")
    show_memory(found)
    if found.picture is not None:
        tell("rows read", f"the first {found.picture.given:,}, prepared as training prepares them")
        picture.show(found.picture, show_rows)
    _show_notes(asked.settings, found.untold)
    if every_setting:
        fields.show_run(asked, True)
    print("no contradictions found")


# -- what is looked at -------------------------------------------------------------------------------------------


def _checked(arguments: Sequence[str]) -> setup.Run:
    """The settings; a precision of GPUs is no fault where there is none: Transformers would ask this machine for it."""
    import torch

    from qtarget.cli import settings

    given = settings.read(arguments).values["training"]
    if torch.accelerator.is_available() or given.get("use_cpu"):
        return setup.check(arguments)
    as_here: dict[str, Any] = {"tf32": None} if given.get("tf32") else {}
    if given.get("bf16") or given.get("bf16_full_eval"):
        as_here["use_cpu"] = True
    asked = setup.check(arguments, as_here)
    asked.config.use_cpu, asked.config.tf32 = False, given.get("tf32")
    return asked


def _models(asked: setup.Run, faults: list[str]) -> tuple[shapes.Shape | None, list[Frozen], list[str]]:
    """(the student's shape, each frozen model, what could not be told)."""
    from qtarget.teachers import settings as teacher_settings

    config, model = asked.config, asked.model
    requires = config.resolve_objective().requires | config.resolve_eval_objective().requires
    models, untold = config.models_for(requires), []

    def find(field: str, name: str, revision: str | None) -> shapes.Shape | None:
        try:
            return shapes.find(field, name, revision, config.trust_remote_code)
        except ConfigError as error:
            faults.extend(error.faults)
            return None

    student = find("model_name_or_path", model.model_name_or_path, model.model_revision)
    others: list[Frozen] = []
    if "teacher" in models and config.teacher_cache is None and config.teacher_ema_decay is None:
        field = "teachers" if config.teachers is not None else "teacher_model_name_or_path"
        for name, revision, kwargs in teacher_settings.named_models(config):
            shape = shapes.as_loaded(find(field, name, revision), kwargs)
            others.append(Frozen("teacher", name, revision, shape, shapes.frozen_bytes(kwargs, shape, config.use_cpu)))
        faults += teacher_settings.settings_faults(config)
        shapes_known = student is not None and all(other.shape is not None for other in others)
        if all(Path(name).is_dir() for name in [model.model_name_or_path, *(other.name for other in others)]):
            faults += _tokenizer_faults(asked) if shapes_known else []
        else:
            untold.append("whether student and teacher have the same tokens: their tokenizers are not here")
    if "reference" in models and config.reference_model_name_or_path is not None:
        name, revision = config.reference_model_name_or_path, config.reference_model_revision
        shape = find("reference_model_name_or_path", name, revision)
        shape = shapes.as_loaded(shape, config.reference_model_init_kwargs)
        width = shapes.frozen_bytes(config.reference_model_init_kwargs, shape, config.use_cpu)
        others.append(Frozen("reference", name, revision, shape, width))
    return student, others, untold


def _tokenizer_faults(asked: setup.Run) -> list[str]:
    from qtarget.models.loading import load_tokenizer
    from qtarget.teachers import settings as teacher_settings

    name = asked.model.model_name_or_path
    try:
        with loading("model_name_or_path", name, "tokenizer"):
            tokenizer = load_tokenizer(name)
    except ConfigError as error:
        return error.faults
    return teacher_settings.tokenizer_faults(asked.config, tokenizer)


def _rows(asked: setup.Run, faults: list[str], untold: list[str]) -> tuple[int | None, str, Picture | None]:
    """(rows of the training data, where that number is from, what the first of them train)."""
    from qtarget.signals import manifest

    silence_libraries()
    name, notes = asked.script.dataset_name, asked.settings.notes
    expected = notes.get("expected_rows")
    if Path(name).exists():
        faults += manifest.check(name, asked.config, asked.model)
        with tempfile.TemporaryDirectory() as cache:  # what datasets makes of the files goes with it
            datasets = setup.load_datasets(asked.script, faults, cache_dir=cache)
            faults += setup.column_faults(asked.config, datasets)
            rows = len(datasets["train"]) if "train" in datasets and not asked.script.dataset_streaming else None
            columns = ", ".join(datasets["train"].column_names or []) if "train" in datasets else "none"
            picture = _picture(asked, datasets, faults, untold)
        if rows is None:
            return expected, f"columns {columns}; its rows are not counted", picture
        told = "" if expected in (None, rows) else f"; the recipe expects {expected:,}"
        return rows, f"{rows:,} rows with {columns}{told}", picture
    source = notes.get("dataset_source")
    if source is None and shapes.is_path(name):
        faults.append(f"dataset_name is {name!r}, which is not a folder or file here; create it, or name a hub id")
        return expected, "", None
    said = "not known here" if expected is None else f"{expected:,} as the recipe says"
    place = "assumed to be a hub id, not looked up" if source is None else f"not prepared yet, from {source}"
    return expected, f"{place}; rows: {said}", None


def _picture(asked: setup.Run, datasets: dict[str, Any], faults: list[str], untold: list[str]) -> Picture | None:
    """What the first rows train, through the trainer's own preparation and checks, without weights."""
    from qtarget.data.counting import SAMPLE
    from qtarget.teachers import settings as teacher_settings
    from qtarget.training.preparing import DryTrainer

    name = asked.model.model_name_or_path
    if faults or "train" not in datasets:  # the trainer would name the same
        return None
    if not _on_disk(name, asked.model.model_revision):
        untold.append(f"what the rows train and what max_length cuts: the tokenizer of {name} is not here")
        return None
    config = copy.copy(asked.config)
    if not all(_on_disk(*model[:2]) for model in teacher_settings.named_models(config)):
        config.teacher_model_name_or_path = config.teachers = None
        if config.teacher_cache is None:
            config.teacher_ema_decay = 0.0  # a teacher that needs no tokenizer of its own
    with tempfile.TemporaryDirectory() as folder:  # a trainer makes its output folder
        here: dict[str, Any] = {
            "output_dir": folder,
            "report_to": [],
            "fsdp": None,
            "deepspeed": None,
            "deepspeed_plugin": None,
        }
        for field, value in {**setup.MEASURES, **here}.items():
            setattr(config, field, value)
        first = {
            split: rows.take(min(SAMPLE, len(rows)) if hasattr(rows, "__len__") else SAMPLE)
            for split, rows in datasets.items()
        }
        try:
            return setup.build(replace(asked, config=config, datasets=first), DryTrainer, weights=False).picture()
        except ConfigError as error:
            faults.extend(error.faults)
    return None


def _on_disk(name: str, revision: str | None) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return Path(name).is_dir() or isinstance(
        try_to_load_from_cache(name, "tokenizer_config.json", revision=revision), str
    )


# -- what is told ------------------------------------------------------------------------------------------------


def show_head(found: Found, what: str, texts: Sequence[str]) -> None:
    """The recipe's name, what is trained toward, and each model."""
    asked = found.asked
    if "name" in asked.settings.notes:
        tell("recipe", asked.settings.notes["name"])
    for number, text in enumerate(texts):
        tell("" if number else what, text)
    tell("model", _model_line(asked.model.model_name_or_path, asked.model.model_revision, found.student))
    for other in found.others:
        tell(other.role, _model_line(other.name, other.revision, other.shape))


def _model_line(name: str, revision: str | None, shape: shapes.Shape | None) -> str:
    told = f"{name}, revision {'default' if revision is None else revision}"
    if shape is None:
        return f"{told}; its shape is not known here"
    bits = "" if shape.bits is None else f" of {shape.bits:g} bits"
    held = "" if shape.quantised is None else f", layers quantised by {shape.quantised}{bits}"
    size = f"{shape.parameters / 1e9:.2f} billion parameters, head of {shape.vocab:,} rows"
    return f"{told}; {size} ({shape.source}{held})"


def batch_line(config: Any, gpus: int, batch: int) -> str:
    micro, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    tokens = f"at most {batch * config.max_length:,} tokens" if config.max_length else "of any length"
    split = f"{gpus} GPU{'s' if gpus > 1 else ''} x {micro} rows x {accumulation} accumulations"
    return f"{split} = {batch} rows a step, {tokens}"


def steps_line(config: Any, steps: arithmetic.Steps | None) -> str:
    if steps is None:
        why = "packing puts several rows into one" if config.packing else "the number of rows is not known here"
        return f"{config.max_steps}" if config.max_steps > 0 else f"not known: {why}"
    total, warm = steps.total, config.get_warmup_steps(steps.total)
    told = f"{total}, {warm} of them warm-up; an epoch of {steps.rows:,} rows has {steps.whole} whole steps"
    over = steps.rows - steps.whole * steps.batch
    if not over:
        return told
    if not steps.short:
        return f"{told}; {over} rows are left over"
    if total == steps.whole:
        return f"{told}; max_steps stops before the {over} rows left over"
    return f"{told} and one of {steps.short} rows"


def layouts(gpus: int) -> dict[str, str]:
    """Ways of spreading a run over GPUs, and what they are called."""
    return memory.KINDS if gpus > 1 else {"ddp": "one GPU"}


def unknown_shapes(found: Found) -> list[str]:
    """Models whose shape is not known here."""
    names = [found.asked.model.model_name_or_path] if found.student is None else []
    return [*names, *(other.name for other in found.others if other.shape is None)]


def show_memory(found: Found) -> None:
    """A table of the parts for each layout, and the most at one time; or why there is none."""
    work = workload_of(found)
    if work is None:
        unknown = unknown_shapes(found)
        why = f"the shape of {', '.join(unknown)} is unknown: {shapes.why_unknown()}"
        tell("memory", f"not known, because {why if unknown else 'max_length is not set and rows have any length'}")
        return
    tell("memory", "GiB on each GPU, calculated without allocator, NCCL and CUDA (docs/plan.md); most: the peak")
    parts = {kind: memory.estimate(work, kind) for kind in layouts(found.gpus)}
    shown = [name for name in memory.PARTS if any(part[name] for part in parts.values())]
    print(f"  {'':<10}{'':<8}{'most':>8}{''.join(f'{name:>13}' for name in shown)}")
    for kind, called in layouts(found.gpus).items():
        cells = "".join(f"{parts[kind][name] / GIB:>13.1f}" for name in shown)
        print(f"  {'':<10}{called:<8}{memory.peak(work, kind) / GIB:>8.1f}{cells}")


def workload_of(found: Found) -> memory.Workload | None:
    """What each GPU holds; None where a shape or max_length is not known."""
    asked, config = found.asked, found.asked.config
    if found.student is None or unknown_shapes(found) or not config.max_length:
        return None
    return workload.of_memory(config, asked.model, asked.settings.origin, found.student, found.others, found.gpus)


def _show_notes(settings: Settings, untold: list[str]) -> None:
    """Where values come from, what is still to pin, and what nobody knows."""
    notes, flags = settings.notes, settings.given_by("flag")
    # A flag took the place of the file's value, whose origin is then nobody's.
    origins = {name: text for name, text in notes.get("provenance", {}).items() if name.split(".")[0] not in flags}
    if origins:
        words = {name: next(word for word in recipe.ORIGINS if text.startswith(word)) for name, text in origins.items()}
        counts = [f"{number} {word}" for word, number in sorted(Counter(words.values()).items())]
        tell("values", ", ".join([*counts, *[f"by flag: {', '.join(flags)}"] * bool(flags)]))
        tell("ours", ", ".join(name for name, word in words.items() if word == "ours") or "none")
    if to_pin := recipe.to_pin({**settings.given_by("file"), **notes, **flags}):
        tell("to pin", ", ".join(to_pin) + ": they name branches, which move")
    for what in [*notes.get("unknown", []), *untold]:
        tell("unknown", what)
