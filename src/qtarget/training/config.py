"""``QTargetConfig``: TRL's SFTConfig with a target."""

from __future__ import annotations

import copy
import dataclasses
import logging
import pickle
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments
from trl import SFTConfig

from qtarget.data.columns import columns_for
from qtarget.errors import ConfigError, check_range, unknown
from qtarget.losses.engine import BACKENDS
from qtarget.targets import Target, presets
from qtarget.targets.objective import Objective
from qtarget.targets.schedule import ScheduledTarget
from qtarget.teachers import context
from qtarget.teachers.pool import PoolMember, read_pool
from qtarget.training import ranges

logger = logging.getLogger(__name__)

DENOMINATORS = ("all_labels", "kept", "micro_batch")
WEIGHTS = ("column", "online")
TAILS = ("student", "even")
END_TOKENS = ("label", "map", "keep")
# Settings that each say where a teacher comes from.
TEACHER_SOURCES = ("teacher_model_name_or_path", "teachers", "teacher_cache", "teacher_ema_decay")


@dataclass
class QTargetConfig(SFTConfig):
    r"""Settings of ``QTargetTrainer``: every field of TRL's ``SFTConfig`` and these.

    Args:
        target: what to learn: a preset's name, its YAML form, ``my_pkg.my_module:my_target`` or a ``Target``. None
            reads ``loss_type`` or ``label_smoothing_factor``, and is sft where those are unset too. A number in it may
            be on a schedule, ``{schedule: linear, from: 0, to: 0.5, steps: 200}`` (or cosine), and
            ``warmup_from_sft: 100`` starts from plain SFT.
        targets: in place of ``target``: a target for each data source, as in ``{math: target-sft, chat: sft}``.
        source_column: the dataset column that names the source of a row, for ``targets``.
        eval_target: the target evaluation reports; None is what is trained. nll is reported in any case.
        denominator: what the summed loss is divided by: "all_labels", every supervised label over all micro-batches
            and processes; "kept", only those a weight or critical column keeps; "micro_batch", each micro-batch's own,
            averaged.
        loss_backend: who computes the loss's passes over the logits: "auto", "torch", "triton" or "compiled"; see
            ``qtarget.linear_target_loss``. "auto" also compiles them on a CPU where the run is long enough to pay for it.
        teacher_model_name_or_path, teacher_model_revision, teacher_model_init_kwargs: the teacher, loaded by
            Transformers and frozen.
        teachers: in place of one teacher, several in a log-linear pool, softmax(Σ w z): {name: w} or a list of
            {model_name_or_path, weight, revision, init_kwargs}; the weights sum to 1.
        teacher_cache: a folder that ``qtarget cache build`` wrote: the teacher is read from it and not loaded.
        teacher_tail: shape of a cached teacher's mass outside its k tokens: "student" (∝ p) or "even".
        teacher_ema_decay: the teacher is the average of the student's own weights, kept ← decay · kept +
            (1 − decay) · present after each optimiser step; 0 is the student as it is.
        teacher_context: what the teacher reads in place of the prompt, a Jinja template over the row's columns in which
            ``prompt`` is the original text: text, or {prompt: text, system: text}.
        teacher_end_token: where the teacher ends a text with another token than the data: "label" teaches that position
            by its label alone, "map" exchanges the two tokens in the teacher, "keep" does neither.
        teacher_check_rows: rows on which student and teacher are compared in a line before training; 0: none.
        reference_model_name_or_path, reference_model_revision, reference_model_init_kwargs: the reference; None is the
            model as it starts (with adapters, the model without them).
        weights: where iw-sft's weights come from: "column", the numbers of the dataset's column weight; "online", one
            number per sequence, exp(weights_temperature · mean(log p − log p_reference)) clamped to [0, 16], taken
            before each step (arXiv:2507.12856 and its code).
        weights_temperature: the factor in the exponent of the online weights.
        psft_refresh: psft's old policy is a copy of the trainable weights, taken anew after so many optimiser steps (the
            paper's schedule: 8), or "never": the column old_logps, whose numbers stay as they are.
        lens_every: every so many optimiser steps, add a map of (p_y, entropy) to ``lens_history.parquet`` in
            ``output_dir``: counts, trust and update by cell, a few kB each, which the lens' page plays.
        loss_type: None, or TRL's "nll" (sft) and "dft"; must agree with ``target``.
        bf16: unset, it is on where the device has bfloat16 units and off on cpu and mps.

    Raises:
        ConfigError: with every fault found.
    """

    _VALID_DICT_FIELDS = [  # noqa: RUF012
        *SFTConfig._VALID_DICT_FIELDS,
        "teacher_model_init_kwargs",
        "reference_model_init_kwargs",
        "targets",
        "teachers",
    ]

    target: Any = field(
        default=None,
        metadata={
            "help": "What to learn: a preset's name, its YAML form, or my_pkg.my_module:my_target (default: sft)."
        },
    )
    targets: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "In place of target: a target for each data source, as in {math: target-sft, chat: sft}."},
    )
    source_column: str = field(
        default="source", metadata={"help": "The dataset column that names the source of a row, for targets."}
    )
    eval_target: Any = field(
        default=None, metadata={"help": "The target evaluation reports (default: target). nll is always reported."}
    )
    denominator: str = field(
        default="all_labels",
        metadata={
            "help": "What the summed loss is divided by: all_labels, kept (by a weight or critical column) or "
            "micro_batch.",
            "choices": list(DENOMINATORS),
        },
    )
    loss_backend: str = field(
        default="auto",
        metadata={
            "help": "Who computes the loss's passes over the logits: auto, torch, triton or compiled.",
            "choices": list(BACKENDS),
        },
    )
    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "The teacher: a folder or hub id, same tokenizer as the model."}
    )
    teacher_model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the teacher."})
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments for the teacher's from_pretrained, such as dtype."}
    )
    teachers: dict[str, Any] | list | str | None = field(
        default=None,
        metadata={"help": "In place of one teacher: several, {name: weight}, in a log-linear pool; weights sum to 1."},
    )
    teacher_cache: str | None = field(
        default=None, metadata={"help": "A folder of qtarget cache build: the teacher is read from it, not loaded."}
    )
    teacher_tail: str = field(
        default="student",
        metadata={
            "help": "Shape of a cached teacher's mass outside its k tokens: student (like the student's) or even.",
            "choices": list(TAILS),
        },
    )
    teacher_ema_decay: float | None = field(
        default=None,
        metadata={"help": "The teacher is the average of the student's own weights with this decay; 0: as they are."},
    )
    teacher_context: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "What the teacher reads in place of the prompt: a Jinja template over the row's columns, or "
            "{system: text, prompt: text}."
        },
    )
    teacher_end_token: str = field(
        default="label",
        metadata={
            "help": "Where teacher and data end with different tokens: label (taught by the label alone), map or keep.",
            "choices": list(END_TOKENS),
        },
    )
    teacher_check_rows: int = field(
        default=16, metadata={"help": "Rows on which student and teacher are compared before training; 0: none."}
    )
    reference_model_name_or_path: str | None = field(
        default=None, metadata={"help": "The reference (default: the model as it starts, or with adapters off)."}
    )
    reference_model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the reference."}
    )
    reference_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments for the reference's from_pretrained."}
    )
    weights: str = field(
        default="column",
        metadata={
            "help": "Where iw-sft's weights come from: column (the dataset's) or online (model against reference).",
            "choices": list(WEIGHTS),
        },
    )
    weights_temperature: float = field(
        default=1.0, metadata={"help": "The factor in the exponent of iw-sft's online weights."}
    )
    psft_refresh: int | str = field(
        default=8,
        metadata={"help": "Optimiser steps between two copies of psft's old policy, or never (the column old_logps)."},
    )
    lens_every: int | None = field(
        default=None,
        metadata={
            "help": "Steps between two maps of (p_y, entropy) in lens_history.parquet, 256 at most; unset: none."
        },
    )
    loss_type: str | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "TRL's name of the loss: nll is target sft, dft is target dft."}
    )

    def __post_init__(self):
        if faults := ranges.faults(self):
            raise ConfigError(faults)
        if self.bf16 is None and not self.fp16 and not _has_bf16_units(self.use_cpu):
            self.bf16 = False
        elif self.bf16 and not _has_bf16_units(self.use_cpu):
            logger.warning(
                "bf16=True is kept, but this device has no bfloat16 units: expect it to be many times slower"
            )
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # there is no device to copy to, and torch warns on every start
        super().__post_init__()
        faults = [
            f"{name} is {getattr(self, name)!r}; write a mapping, as in {{dtype: bfloat16}}"
            for name in ("model_init_kwargs", "teacher_model_init_kwargs", "reference_model_init_kwargs")
            if not isinstance(getattr(self, name) or {}, dict)
        ]
        for name, valid in (
            ("denominator", DENOMINATORS),
            ("loss_backend", BACKENDS),
            ("weights", WEIGHTS),
            ("teacher_tail", TAILS),
            ("teacher_end_token", END_TOKENS),
        ):
            if getattr(self, name) not in valid:
                faults += unknown(name, getattr(self, name), valid).faults
        faults += self._teacher_faults()
        faults += self._refresh_faults()
        for resolve in (
            lambda: check_range("weights_temperature", self.weights_temperature, 0, open_low=True),
            self.resolve_objective,
            self.resolve_eval_objective,
        ):
            try:
                objective = resolve()
            except ConfigError as error:
                faults += [fault for fault in error.faults if fault not in faults]
                continue
            if isinstance(objective, Objective):
                faults += self._objective_faults(objective)
        if faults:
            raise ConfigError(list(dict.fromkeys(faults)))

    def _teacher_faults(self) -> list[str]:
        faults = []
        for read in (lambda: context.read_template(self.teacher_context), self.pool_members):
            try:
                read()
            except ConfigError as error:
                faults += error.faults
        named = self.teacher_settings
        by_name = [name for name in named if name != "teacher_cache"]  # a cache is held against the teacher named
        if len(by_name) > 1 or (len(named) > 1 and "teacher_ema_decay" in named):
            faults.append(f"{' and '.join(named)} are set; a run has one teacher: keep one of them")
        decay = self.teacher_ema_decay
        if decay is not None:
            try:
                check_range("teacher_ema_decay", decay, 0, 1, open_high=True)
            except ConfigError as error:
                faults += error.faults
        return faults

    @property
    def teacher_settings(self) -> list[str]:
        """Of the settings that say where a teacher comes from, those that are set."""
        return [name for name in TEACHER_SOURCES if getattr(self, name) is not None]

    @property
    def names_teacher(self) -> bool:
        return bool(self.teacher_settings)

    def pool_members(self) -> list[PoolMember]:
        """The teachers of ``teachers``; none where it is unset. Raises ConfigError with every fault."""
        return read_pool(self.teachers)

    def _refresh_faults(self) -> list[str]:
        refresh = self.psft_refresh
        if isinstance(refresh, str) and refresh.isdigit():
            refresh = self.psft_refresh = int(refresh)
        if refresh == "never":
            return []
        if isinstance(refresh, bool) or not isinstance(refresh, int) or refresh < 1:
            return [f"psft_refresh is {refresh!r}; use a number of optimiser steps from 2, or never"]
        return []

    def _objective_faults(self, objective: Objective) -> list[str]:
        faults = []
        if self.psft_refresh == 1 and "old_policy" in objective.requires:
            faults.append(
                "psft_refresh is 1, so the old policy is always the present one, r = 1 and the clip never acts: that is "
                "sft; use 2 or more (the paper: 8), or target: sft"
            )
        if self.denominator == "kept":
            known = {"critical"} | ({"weight"} if self.weights == "column" else set())
            for target in objective.finals():
                if not known & target.requires:
                    faults.append(
                        f"denominator is 'kept' with target {target}; which tokens are kept is known beforehand only "
                        "from a critical or weight column (cft, iw-sft): use all_labels"
                    )
        return faults

    def resolve_objective(self) -> Objective:
        """What these settings train; sft where they name nothing. Raises where they contradict each other."""
        named: list[tuple[str, ScheduledTarget]] = []
        if self.target is not None:
            named.append(("target", ScheduledTarget.read(self.target)))
        if self.loss_type is not None:
            if self.loss_type not in ("nll", "dft"):
                raise unknown("loss_type", self.loss_type, ("nll", "dft"))
            named.append((f"loss_type {self.loss_type}", ScheduledTarget.read(presets.build(self.loss_type))))
        if self.label_smoothing_factor:
            smoothed = presets.build("label-smoothing", smoothing=self.label_smoothing_factor)
            named.append((f"label_smoothing_factor {self.label_smoothing_factor}", ScheduledTarget.read(smoothed)))
        if self.targets is not None:
            if named:
                raise ConfigError(f"the settings name targets and also {named[0][0]}; keep one of them")
            return Objective.by_source(self.targets, self.source_column)
        if any(target.schedules or target.final != named[0][1].final for _, target in named[1:]) or (
            len(named) > 1 and named[0][1].schedules
        ):
            told = ", ".join(f"{field} means {target}" for field, target in named)
            raise ConfigError(f"the settings contradict each other: {told}; keep one of them")
        return Objective({None: named[0][1]}) if named else Objective.single("sft")

    def resolve_eval_objective(self) -> Objective:
        """What evaluation reports."""
        if self.eval_target is None:
            return self.resolve_objective()
        try:
            return Objective.single(self.eval_target)
        except ConfigError as error:
            error.during("eval_target")
            raise

    def models_for(self, requires: Iterable[str]) -> frozenset[str]:
        """Of what targets require, what is a model: teacher, reference, old_policy (psft's copy of the student).

        Online weights compare the student with a reference.
        """
        models = {"teacher", "reference"} & set(requires)
        if self.weights == "online" and "weight" in requires:
            models.add("reference")
        if self.psft_refresh != "never" and "old_policy" in requires:
            models.add("old_policy")
        return frozenset(models)

    def columns_for(self, requires: Iterable[str]) -> list[str]:
        """Of what targets require, the dataset's columns."""
        made = {"weight"} if self.weights == "online" else set()
        if self.psft_refresh != "never":
            made.add("old_policy")
        return columns_for(set(requires) - made)

    def to_dict(self) -> dict[str, Any]:
        settings = super().to_dict()
        for name in ("target", "eval_target"):
            if isinstance(getattr(self, name), Target):
                settings[name] = getattr(self, name).to_config()
        if isinstance(self.targets, dict):
            settings["targets"] = {
                source: target.to_config() if isinstance(target, Target) else target
                for source, target in self.targets.items()
            }
        return settings

    def __getstate__(self) -> dict[str, Any]:
        """What training_args.bin holds. A target made of a lambda cannot be pickled and goes there in its written
        form: a run must not stop at its first checkpoint for it."""
        state = dict(self.__dict__)
        written = self.to_dict()
        for name in ("target", "eval_target", "targets"):
            try:
                pickle.dumps(state[name])
            except Exception:
                state[name] = written[name]
        return state

    @classmethod
    def of(cls, model: Any, args: TrainingArguments | None, target: object = None) -> QTargetConfig:
        """The settings of a trainer made with ``args`` (any kind, or none) and ``target``."""
        if args is None:
            name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "model")
            args = cls(f"{str(name).rstrip('/').split('/')[-1]}-QTarget", target=target)
        elif not isinstance(args, QTargetConfig):
            args = cls.from_arguments(args)
        if target is not None:
            if args.target is not None and args.target is not target:
                raise ConfigError(
                    f"target is {target!r} beside args.target, which is {args.target!r}; keep one of them"
                )
            args = copy.copy(args)
            args.target = target
            args.resolve_objective()  # raises where it contradicts loss_type, targets or label_smoothing_factor
        return args

    @classmethod
    def from_arguments(cls, args: TrainingArguments) -> QTargetConfig:
        """Settings of TRL or Transformers as a QTargetConfig. TRL's default loss_type counts as unset."""
        known = {f.name for f in dataclasses.fields(cls) if f.init}
        settings = {f.name: getattr(args, f.name) for f in dataclasses.fields(args) if f.name in known}
        if settings.get("loss_type") == "nll":
            settings["loss_type"] = None
        return cls(**settings)


def _has_bf16_units(use_cpu: bool) -> bool:
    if use_cpu:
        return False
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(hasattr(torch, name) and getattr(torch, name).is_available() for name in ("xpu", "npu"))
