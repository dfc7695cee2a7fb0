"""Checks a run's teacher before training: the right cache, context, tokens and end."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qtarget.errors import ConfigError, loading
from qtarget.models.loading import load_tokenizer
from qtarget.targets import Target, presets
from qtarget.teachers.cache import manifest as manifests
from qtarget.teachers.cache.reader import CachedTeacher
from qtarget.teachers.context import Context, read_template
from qtarget.teachers.fingerprints import named, shorter_hashes, template_hash, tokenizer_hash
from qtarget.teachers.joins import CacheJoin, ContextJoin, RowsThatAsk
from qtarget.teachers.vocabulary import added_by_one, real_vocabulary_size, shown, vocabulary_difference

logger = logging.getLogger(__name__)


# -- how tokens find their teacher -------------------------------------------------------------------------------


def open_join(
    args: Any,
    tokenizer: Any,
    chat_template: str | None,
    completion_only_loss: bool,
    asking: RowsThatAsk | None = None,
) -> CacheJoin | ContextJoin | None:
    """How the tokens of a run are joined to its teacher; None where it reads the student's own batch.

    Args:
        args: QTargetConfig. tokenizer: the student's. chat_template: in place of the tokenizer's own.
        completion_only_loss: as the trainer resolved it. asking: the rows whose target asks a teacher; None for all.

    Raises:
        ConfigError: a cache built for something else, with the first difference.
    """
    if args.teacher_cache is None:
        templates = read_template(args.teacher_context)
        if templates is None:
            return None
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        return ContextJoin(Context(templates, tokenizer, chat_template), pad, asking)
    cache = CachedTeacher(args.teacher_cache, args.teacher_tail)
    wanted = what_decides_rows(args, tokenizer, completion_only_loss) | _tokens_of_cache(cache, tokenizer)
    if args.teacher_context is None:  # the cache's own
        del wanted["teacher_context"]
    if difference := manifests.first_difference(cache.manifest, wanted):
        raise ConfigError(f"teacher_cache is {args.teacher_cache!r}: {difference}")
    templates = cache.manifest["teacher_context"]
    return CacheJoin(cache, None if templates is None else Context(templates, tokenizer, chat_template), asking)


def settings_faults(args: Any) -> list[str]:
    """Settings under which rows do not find their teacher."""
    faults = []
    if args.teacher_cache is None and args.teacher_context is None:
        return []
    if (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
        faults.append(
            "dataset_kwargs.skip_prepare_dataset is on, but teacher_cache and teacher_context find the teacher of a row "
            "while rows are prepared; leave it out"
        )
    if args.teacher_cache is None and args.packing and args.packing_strategy != "bfd":
        faults.append(
            f"packing_strategy is {args.packing_strategy!r}, which continues a row in the next sequence, without its "
            "teacher_context before it; use bfd, or build a teacher cache with this context"
        )
    return faults


def what_decides_rows(args: Any, tokenizer: Any, completion_only_loss: bool) -> dict[str, Any]:
    """The part of a cache's manifest that says which ids and labels rows become, and what the teacher reads."""
    splits = args.packing and args.packing_strategy != "bfd"
    return {
        "tokenizer": tokenizer_hash(tokenizer),
        "chat_template": template_hash(tokenizer),
        "vocab_size": real_vocabulary_size(tokenizer),
        "teacher_context": read_template(args.teacher_context),
        "preparation": {
            "max_length": None if splits else args.max_length,
            "truncation_mode": "keep_start" if args.packing else args.truncation_mode,
            "completion_only_loss": bool(completion_only_loss),
            "assistant_only_loss": bool(args.assistant_only_loss),
            "dataset_text_field": args.dataset_text_field,
            "eos_token": tokenizer.eos_token,
        },
    }


# -- which teacher -----------------------------------------------------------------------------------------------


def named_teacher(args: Any) -> dict[str, Any]:
    """The teacher that settings name, as a cache's manifest holds it."""
    if args.teachers is not None:
        pool = args.pool_members()
        return {"pool": [{"weight": one.weight, **named(one.name, one.revision)} for one in pool]}
    return {**named(args.teacher_model_name_or_path, args.teacher_model_revision)}


def describe(teacher: Mapping[str, Any]) -> str:
    """A line on a teacher of a manifest."""
    if "pool" in teacher:
        return " + ".join(f"{one['weight']:g} {describe(one)}" for one in teacher["pool"])
    return f"{teacher['name']} (revision {teacher['revision'] or 'default'}, weights {teacher['weights'] or 'unknown'})"


def teacher_named_by(args: Any, join: CacheJoin | ContextJoin | None) -> str | None:
    """What a checkpoint and the log say of a teacher that is not one named model; None where it is, or there is none."""
    if isinstance(join, CacheJoin):
        manifest = join.cache.manifest
        return (
            f"{describe(manifest['teacher'])}, from a cache of its {manifest['k']} likeliest tokens "
            f"({manifest['index']['checksum'][:8]})"
        )
    if args.teacher_ema_decay is not None:
        return f"the average of the student's own weights, decay {args.teacher_ema_decay:g}"
    return describe(named_teacher(args)) if args.teachers is not None else None


def cache_faults(args: Any, tokenizer: Any) -> list[str]:
    """What can be seen to be wrong with a cache before models and rows are loaded."""
    try:
        cache = CachedTeacher(args.teacher_cache)
        cache.check_files()
    except ConfigError as error:
        return error.faults
    # With chat_template_path the tokenizer is not yet what it will be: it is compared when rows are prepared.
    wanted: dict[str, Any] = {} if args.chat_template_path else _tokens_of_cache(cache, tokenizer)
    if named_models(args):
        had = cache.manifest["teacher"]
        wanted["teacher"] = named_teacher(args)
        if args.teachers is None and "pool" not in had and had["weights"] is None:  # a server does not say
            wanted["teacher"] = {"name": args.teacher_model_name_or_path}
    difference = manifests.first_difference(cache.manifest, wanted)
    return [] if difference is None else [f"teacher_cache is {args.teacher_cache!r}: {difference}"]


def _tokens_of_cache(cache: CachedTeacher, tokenizer: Any) -> dict[str, Any]:
    """What a cache's manifest must say of the tokens: tokens added since it was built are in no row that it holds."""
    built_for = cache.manifest["tokenizer"]
    if built_for == tokenizer_hash(tokenizer):
        return {"tokenizer": built_for, "vocab_size": real_vocabulary_size(tokenizer)}
    return next(
        ({"tokenizer": had, "vocab_size": size} for had, size in shorter_hashes(tokenizer) if had == built_for),
        {"tokenizer": tokenizer_hash(tokenizer), "vocab_size": real_vocabulary_size(tokenizer)},
    )


def tokenizer_faults(args: Any, tokenizer: Any) -> list[str]:
    """A named teacher whose ids mean other tokens, or whose tokenizer cannot be loaded."""
    setting = "teachers" if args.teachers is not None else "teacher_model_name_or_path"
    faults = []
    for name, revision, kwargs in named_models(args):
        try:
            with loading(setting, name, "tokenizer"):
                teacher = teacher_tokenizer(name, revision, kwargs)
        except ConfigError as error:
            faults += error.faults
            continue
        if (difference := vocabulary_difference(tokenizer, teacher)) is not None:
            faults.append(
                f"{setting} is {name!r}, which has another tokenizer: {difference}; use a teacher of the same family"
            )
    return faults


def other_templates(args: Any, tokenizer: Any) -> tuple[str, ...]:
    """The named teachers whose chat template is not the student's; none where the student has none, for rows of text."""
    own = template_hash(tokenizer)
    if own is None:
        return ()
    return tuple(named[0] for named in named_models(args) if template_hash(teacher_tokenizer(*named)) != own)


def unknown_tokens(args: Any, tokenizer: Any) -> dict[int, str]:
    """Added tokens that a named teacher does not know, id → token: a row may not hold them. Warns of them, once each."""
    unknown: dict[int, str] = {}
    for name, revision, kwargs in named_models(args):
        with loading("teacher_model_name_or_path", name, "tokenizer"):
            added = added_by_one(tokenizer, teacher_tokenizer(name, revision, kwargs))
        for index, (ours, theirs) in added.items():
            what = (index, shown(ours), shown(theirs), name)
            logger.warning(
                "id %d is %s for the student and %s for %s: an added token; a row that holds it is refused", *what
            )
        unknown |= {index: ours for index, (ours, _) in added.items() if ours is not None}
    return unknown


def named_models(args: Any) -> list[tuple[str, str | None, dict[str, Any]]]:
    """(name, revision, init_kwargs) of each model that the settings name as teacher."""
    if args.teachers is not None:
        return [(one.name, one.revision, one.init_kwargs) for one in args.pool_members()]
    if args.teacher_model_name_or_path is None:
        return []
    return [(args.teacher_model_name_or_path, args.teacher_model_revision, args.teacher_model_init_kwargs or {})]


def end_tokens(args: Any, given: Any = None, own: int | None = None) -> set[int]:
    """The tokens that the named teachers, or a model that was handed over, end a text with.

    Of a named teacher it is its tokenizer's. A model handed over may list several in its settings, and which it uses is
    not known: where the student's ``own`` is among them, the two are taken to agree.
    """
    if given is None:
        ends = {teacher_tokenizer(*named).eos_token_id for named in named_models(args)}
        return ends - {None}
    for settings in (getattr(given, "generation_config", None), getattr(given, "config", None)):
        ids = getattr(settings, "eos_token_id", None)
        if ids is not None:
            several = [*map(int, ids)] if isinstance(ids, list | tuple) else [int(ids)]
            return {own if own in several else several[0]}
    return set()


def teacher_tokenizer(name: str, revision: str | None, init_kwargs: Mapping[str, Any]) -> Any:
    trusted = bool(init_kwargs.get("trust_remote_code", False))
    return load_tokenizer(name, revision or init_kwargs.get("revision"), trust_remote_code=trusted)


# -- end tokens --------------------------------------------------------------------------------------------------


def label_only_end_token(own: int | None, theirs: int | None, setting: str) -> int | None:
    """The data's end token, where the teacher ends with another and its word on that position is not taken; or None.

    A base model is trained to end with its end of text and an instruct teacher ends with its end of turn, so that the
    teacher's word on the last position is mass on the wrong token.

    Args:
        own: the data's. theirs: the teacher's, None where it is not known. setting: teacher_end_token.
    """
    return own if theirs not in (None, own) and setting == "label" else None


def log_end_tokens(tokenizer: Any, own: int | None, theirs: int | None, setting: str) -> None:
    """Warn that teacher and data end with different tokens, and what is done about it."""
    if own is None or theirs in (None, own):
        return
    mine, other = (tokenizer.convert_ids_to_tokens(index) for index in (own, theirs))
    what = {
        "label": f"tokens {mine!r} are taught by their label alone",
        "map": "the two are swapped in the teacher",
        "keep": f"nothing is changed, so tokens {mine!r} are taught to be {other!r} as far as the target says",
    }[setting]
    logger.warning(
        "the data end with %r (id %d) and the teacher with %r (id %d): %s (teacher_end_token: %s)",
        *(mine, own, other, theirs, what, setting),
    )


def split_end_tokens(
    targets: list[Target], source: Tensor | None, labels: Tensor, token: int
) -> tuple[list[Target], Tensor | None]:
    """Targets and the number of each label's target, with plain SFT where a teacher would be asked about ``token``.

    Args:
        targets: in the order of their numbers. source: numbers of the labels' shape, or None for all 0.
    """
    asked = [number for number, target in enumerate(targets) if "teacher" in target.requires]
    numbers = torch.zeros_like(labels) if source is None else source
    alone = (labels == token) & torch.isin(numbers, torch.tensor(asked, device=labels.device, dtype=numbers.dtype))
    return [*targets, presets.build("sft")], numbers.masked_fill(alone, len(targets))
