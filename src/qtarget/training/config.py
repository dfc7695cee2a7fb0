"""QTargetConfig: TRL's SFTConfig with a target."""

from __future__ import annotations

import dataclasses
import logging
import pickle
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments
from trl import SFTConfig

from qtarget.errors import ConfigError, unknown
from qtarget.targets import Target, presets

logger = logging.getLogger(__name__)

DENOMINATORS = ("all_labels", "kept", "micro_batch")


@dataclass
class QTargetConfig(SFTConfig):
    r"""Settings of ``QTargetTrainer``: every field of TRL's ``SFTConfig`` and these.

    Args:
        target: what to learn: a preset's name, its YAML form, ``my_pkg.my_module:my_target`` or a ``Target``. None
            reads ``loss_type`` or ``label_smoothing_factor``, and is sft where those are unset too.
        eval_target: the target evaluation reports; None is ``target``. nll is reported in any case.
        denominator: what the summed loss is divided by: "all_labels", every supervised label over all micro-batches
            and processes; "kept", only those a weight or critical column keeps; "micro_batch", each micro-batch's own,
            averaged.
        teacher_model_name_or_path, teacher_model_revision, teacher_model_init_kwargs: the teacher, loaded by
            Transformers and frozen.
        reference_model_name_or_path, reference_model_revision, reference_model_init_kwargs: the reference; None is the
            model as it starts (with adapters, the model without them).
        loss_type: None, or TRL's "nll" (sft) and "dft"; must agree with ``target``.
        bf16: unset, it is on where the device has bfloat16 units and off on cpu and mps.

    Raises:
        ConfigError: with every fault found.
    """

    _VALID_DICT_FIELDS = [  # noqa: RUF012
        *SFTConfig._VALID_DICT_FIELDS,
        "teacher_model_init_kwargs",
        "reference_model_init_kwargs",
    ]

    target: Any = field(
        default=None,
        metadata={
            "help": "What to learn: a preset's name, its YAML form, or my_pkg.my_module:my_target (default: sft)."
        },
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
    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "The teacher: a folder or hub id, same tokenizer as the model."}
    )
    teacher_model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the teacher."})
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments for the teacher's from_pretrained, such as dtype."}
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
    loss_type: str | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "TRL's name of the loss: nll is target sft, dft is target dft."}
    )

    def __post_init__(self):
        if self.bf16 is None and not self.fp16 and not _has_bf16_units(self.use_cpu):
            self.bf16 = False
        elif self.bf16 and not _has_bf16_units(self.use_cpu):
            logger.warning(
                "bf16=True is kept, but this device has no bfloat16 units: expect it to be many times slower"
            )
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # there is no device to copy to, and torch warns on every start
        super().__post_init__()
        faults = []
        if self.denominator not in DENOMINATORS:
            faults += unknown("denominator", self.denominator, DENOMINATORS).faults
        for resolve in (self.resolve_target, self.resolve_eval_target):
            try:
                target = resolve()
            except ConfigError as error:
                faults += [fault for fault in error.faults if fault not in faults]
                continue
            if self.denominator == "kept" and not {"weight", "critical"} & target.requires:
                faults.append(
                    f"denominator is 'kept' with target {target}; which tokens are kept is known beforehand only from a "
                    "critical or weight column (cft, iw-sft): use all_labels"
                )
        if faults:
            raise ConfigError(list(dict.fromkeys(faults)))

    def resolve_target(self) -> Target:
        """The objective these settings name; sft where they name none. Raises where they contradict each other."""
        named: list[tuple[str, Target]] = []
        if self.target is not None:
            named.append(("target", Target.from_config(self.target)))
        if self.loss_type is not None:
            if self.loss_type not in ("nll", "dft"):
                raise unknown("loss_type", self.loss_type, ("nll", "dft"))
            named.append((f"loss_type {self.loss_type}", presets.build(self.loss_type)))
        if self.label_smoothing_factor:
            smoothing = self.label_smoothing_factor
            named.append((f"label_smoothing_factor {smoothing}", presets.build("label-smoothing", smoothing=smoothing)))
        if any(target != named[0][1] for _, target in named):
            told = ", ".join(f"{field} means {target}" for field, target in named)
            raise ConfigError(f"the settings contradict each other: {told}; keep one of them")
        return named[0][1] if named else presets.build("sft")

    def resolve_eval_target(self) -> Target:
        """The objective evaluation reports."""
        if self.eval_target is None:
            return self.resolve_target()
        try:
            return Target.from_config(self.eval_target)
        except ConfigError as error:
            raise ConfigError([f"eval_target: {fault}" for fault in error.faults]) from None

    def to_dict(self) -> dict[str, Any]:
        settings = super().to_dict()
        for name in ("target", "eval_target"):
            if isinstance(getattr(self, name), Target):
                settings[name] = getattr(self, name).to_config()
        return settings

    def __getstate__(self) -> dict[str, Any]:
        """What training_args.bin holds. A target made of a lambda cannot be pickled and goes there in its written
        form: a run must not stop at its first checkpoint for it."""
        state = dict(self.__dict__)
        for name in ("target", "eval_target"):
            if isinstance(state[name], Target):
                try:
                    pickle.dumps(state[name])
                except Exception:
                    state[name] = state[name].to_config()
        return state

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
