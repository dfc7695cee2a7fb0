"""``QTargetConfig``: TRL's SFTConfig with a target."""

from __future__ import annotations

import copy
import dataclasses
import logging
import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainingArguments
from trl import SFTConfig

from qtarget.data.columns import columns_for
from qtarget.docstrings import with_help
from qtarget.errors import ConfigError, check_range, faults_of, raise_together, unknown
from qtarget.losses.engine import BACKENDS
from qtarget.targets import Target, presets
from qtarget.targets.objective import Objective
from qtarget.targets.schedule import ScheduledTarget
from qtarget.teachers import context, mapping
from qtarget.teachers.pool import PoolMember, read_pool
from qtarget.training import ranges

logger = logging.getLogger(__name__)

# setting → its values
CHOICES = {
    "denominator": ("all_labels", "kept", "micro_batch"),
    "loss_backend": BACKENDS,
    "teacher_tail": ("student", "even"),
    "teacher_end_token": ("label", "map", "keep"),
    "weights": ("column", "online"),
}
# Settings that each say where a teacher comes from.
TEACHER_SOURCES = ("teacher_model_name_or_path", "teachers", "teacher_cache", "teacher_ema_decay")
# Settings that name a folder, a file or a revision: an empty text names none.
NAMES = (
    *("teacher", "teacher_model_name_or_path", "teacher_model_revision", "teachers", "teacher_cache"),
    *("reference_model_name_or_path", "reference_model_revision", "resume_from_checkpoint", "chat_template_path"),
)


@with_help(CHOICES)
@dataclass
class QTargetConfig(SFTConfig):
    r"""Settings of ``QTargetTrainer``: every field of TRL's ``SFTConfig`` and these.

    The entries below are the one description of each setting: ``qtarget train --help`` shows their first sentences,
    docs/training.md all of them.

    Args:
        target: what to learn: a preset's name, its YAML form such as ``{preset: eaft, top_k: 20}``, parts such as
            ``{trust: entropy, residual: teacher}``, ``my_pkg.my_module:my_target`` or a ``Target``. Unset, it is
            ``loss_type`` or ``label_smoothing_factor``, and sft where those are unset too. A number in it may be on a
            schedule, ``{schedule: linear, from: 0, to: 0.5, steps: 200}`` (or cosine), and ``warmup_from_sft: 100``
            starts from plain SFT.
        targets: instead of ``target``: one target per data source, as in ``{math: target-sft, chat: sft}``.
        source_column: the dataset column that names the source of a row, for ``targets``.
        eval_target: the target that evaluation reports; unset: ``target``. The label's nll is always reported.
        denominator: what the summed loss is divided by: ``all_labels``, ``kept`` or ``micro_batch``. The first counts
            every supervised label over all micro-batches and processes, the second only those that a weight or critical
            column keeps; the third divides each micro-batch by its own count and averages.
        loss_backend: which code computes the loss's passes over the logits: ``auto``, ``torch``, ``triton`` or
            ``compiled``. ``triton`` is for NVIDIA's GPUs, ``compiled`` is inductor's code; ``auto`` uses the fastest
            one here, and compiles on a CPU only if the run is long enough to be worth it. See
            ``qtarget.linear_target_loss``.
        z_loss: c of c · lse² on every supervised token, which keeps lse = log Σ exp z near 0; 0: off. PaLM's c is 1e-4
            (arXiv:2204.02311). Statistics and evaluation do not include it.
        teacher: the teacher's settings as one mapping, ``{model: org/name, context: ...}``; a plain text is the model.
            Its keys are model, revision, init_kwargs, models (``teachers``), cache, tail, ema_decay, context, end_token
            and check_rows. Each is stored as the setting below and can be given there instead; two different values for
            one of them are refused. Flags override the config file key by key.
        teacher_model_name_or_path: the teacher: a folder or hub id with the student's tokenizer. It is frozen, loaded
            only if the target needs it, and freed once no later step needs it.
        teacher_model_revision: branch, tag or commit of the teacher.
        teacher_model_init_kwargs: keyword arguments for the teacher's from_pretrained, such as ``{dtype: bfloat16}``.
        teachers: instead of one teacher, several as a log-linear pool, ``{org/large: 0.7, org/maths: 0.3}``. The pool is
            softmax(Σ w z) and the weights sum to 1; it may also be a list of
            ``{model_name_or_path, weight, revision, init_kwargs}``.
        teacher_cache: a folder made by ``qtarget cache build``: the teacher's answers are read from it, and the teacher
            is not loaded.
        teacher_tail: shape of a cached teacher's mass outside its k tokens: ``student`` (∝ p) or ``even``.
        teacher_ema_decay: the teacher is the average of the student's own weights with this decay; 0: the current
            weights. After each optimiser step, average ← decay · average + (1 − decay) · current.
        teacher_context: what the teacher reads instead of the prompt: a Jinja template over the row's columns.
            ``prompt`` in it is the original text. ``{system: text, prompt: text}`` also adds a system message, or
            appends to the row's own.
        teacher_end_token: what to do if teacher and data end a text with different tokens: ``label``, ``map`` or
            ``keep``. The first teaches that position by its label alone, the second swaps the two tokens in the
            teacher, the third changes nothing.
        teacher_check_rows: number of rows on which student and teacher are compared before training, in one log line;
            0: none.
        reference_model_name_or_path: the reference: a folder or hub id; unset: the initial model, as a frozen copy or,
            with new adapters, with the adapters off.
        reference_model_revision: branch, tag or commit of the reference.
        reference_model_init_kwargs: keyword arguments for the reference's from_pretrained.
        weights: where iw-sft's weights come from: ``column`` (the dataset's) or ``online`` (model against reference). The
            latter is one number per sequence, exp(weights_temperature · mean(log p − log p_reference)) clamped to
            [0, 16], computed before each step (arXiv:2507.12856 and its code).
        weights_temperature: the factor in the exponent of the online weights.
        psft_refresh: optimiser steps between two copies of psft's old policy, or ``never`` to read the column
            old_logps. The paper's schedule is 8; the column is never updated.
        lens_every: optimiser steps between two maps of (p_y, entropy) for the lens; unset: none. They are written to
            ``lens_history.parquet`` in ``output_dir``, without a second forward pass: counts, trust and update by cell,
            a few kB each.
        overwrite_output_dir: delete the run in ``output_dir`` and start from scratch. Its checkpoints, weights and
            figures are deleted once models and data are loaded; other files stay.
        loss_type: TRL's name of the loss: ``nll`` is target sft, ``dft`` is target dft. It must agree with ``target``.
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

    target: Any = None
    targets: dict[str, Any] | str | None = None
    source_column: str = "source"
    eval_target: Any = None
    denominator: str = "all_labels"
    loss_backend: str = "auto"
    z_loss: float = 0.0
    teacher: dict[str, Any] | str | None = None
    teacher_model_name_or_path: str | None = None
    teacher_model_revision: str | None = None
    teacher_model_init_kwargs: dict[str, Any] | str | None = None
    teachers: dict[str, Any] | list | str | None = None
    teacher_cache: str | None = None
    teacher_tail: str = "student"
    teacher_ema_decay: float | None = None
    teacher_context: dict[str, Any] | str | None = None
    teacher_end_token: str = "label"
    teacher_check_rows: int = 16
    reference_model_name_or_path: str | None = None
    reference_model_revision: str | None = None
    reference_model_init_kwargs: dict[str, Any] | str | None = None
    weights: str = "column"
    weights_temperature: float = 1.0
    psft_refresh: int | str = 8
    lens_every: int | None = None
    overwrite_output_dir: bool = False
    loss_type: str | None = None  # type: ignore[assignment]

    def __post_init__(self):
        spread = mapping.spread(self)
        for name in NAMES:
            if isinstance(value := getattr(self, name), str) and not value.strip():
                setattr(self, name, None)
        raise_together([*spread, *ranges.faults(self)])
        if self.bf16 is None and not self.fp16 and not _has_bf16_units(self.use_cpu):
            self.bf16 = False
        elif self.bf16 and not _has_bf16_units(self.use_cpu):
            logger.warning(
                "bf16=True is kept, but this device has no bfloat16 units: expect it to be many times slower"
            )
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # there is no device to copy to, and torch warns on every start
        if self.metric_for_best_model:  # TRL's name for what is logged as accuracy
            self.metric_for_best_model = self.metric_for_best_model.replace("mean_token_accuracy", "accuracy")
        super().__post_init__()
        faults = [
            f"{name} is {getattr(self, name)!r}; write a mapping, as in {{dtype: bfloat16}}"
            for name in ("model_init_kwargs", "teacher_model_init_kwargs", "reference_model_init_kwargs")
            if not isinstance(getattr(self, name) or {}, dict)
        ]
        for name, valid in CHOICES.items():
            if getattr(self, name) not in valid:
                faults += unknown(name, getattr(self, name), valid).faults
        faults += self._teacher_faults()
        faults += self._refresh_faults()
        faults += faults_of(check_range, "weights_temperature", self.weights_temperature, 0, open_low=True)
        faults += faults_of(self._check, self.resolve_objective) + faults_of(self._check, self.resolve_eval_objective)
        raise_together(faults)

    def _teacher_faults(self) -> list[str]:
        faults = faults_of(context.read_template, self.teacher_context) + faults_of(self.pool_members)
        named = self.teacher_settings
        by_name = [name for name in named if name != "teacher_cache"]  # a cache is held against the teacher named
        if len(by_name) > 1 or (len(named) > 1 and "teacher_ema_decay" in named):
            faults.append(f"{' and '.join(named)} are set; a run has one teacher: keep one of them")
        if self.teacher_ema_decay is not None:
            faults += faults_of(check_range, "teacher_ema_decay", self.teacher_ema_decay, 0, 1, open_high=True)
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

    def _check(self, resolve: Callable[[], Objective]) -> None:
        """Raise where an objective cannot be resolved or does not go with the other settings."""
        objective, faults = resolve(), []
        if self.psft_refresh == 1 and "old_policy" in objective.requires:
            faults.append(
                "psft_refresh is 1, so the old policy is always the current one, r = 1 and the clip never acts: that "
                "is sft; use 2 or more (the paper: 8), or target: sft"
            )
        known = {"critical"} | ({"weight"} if self.weights == "column" else set())
        faults += [
            f"denominator is 'kept' with target {target}; which tokens are kept is known beforehand only from a critical "
            "or weight column (cft, iw-sft): use all_labels"
            for target in objective.finals()
            if self.denominator == "kept" and not known & target.requires
        ]
        raise_together(faults)

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
                raise ConfigError(f"target is {target!r} but args.target is {args.target!r}; keep one of them")
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
