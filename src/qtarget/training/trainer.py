"""QTargetTrainer: TRL's SFTTrainer with the loss of a target, computed by the engine."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, TrainingArguments
from trl import SFTTrainer

from qtarget.errors import ConfigError
from qtarget.losses import Head
from qtarget.targets import Target
from qtarget.teachers.frozen import adapters_off, evaluation_mode, freeze, frozen_copy, load_frozen
from qtarget.teachers.same_vocabulary import real_vocabulary_size
from qtarget.training import checks
from qtarget.training.columns import ColumnCollator, columns_of
from qtarget.training.config import QTargetConfig
from qtarget.training.forward import (
    HeadTransform,
    LossCall,
    StatesCall,
    accepted,
    add_target_forward,
    check_head_transform,
)
from qtarget.training.metrics import TokenSums

logger = logging.getLogger(__name__)


class QTargetTrainer(SFTTrainer):
    """Fine-tune toward a designed target; otherwise TRL's ``SFTTrainer``, with the same arguments.

    The loss is computed inside the model's own forward from its last hidden states; logits are never held.

    Args:
        model: a model, or the name or path of one.
        args: ``QTargetConfig``; ``SFTConfig`` and ``TrainingArguments`` are converted.
        teacher_model: the teacher as a model, in place of ``args.teacher_model_name_or_path``.
        reference_model: the reference as a model; by default the model as it starts, or its adapters off.
        **kwargs: ``SFTTrainer``'s (train_dataset, eval_dataset, processing_class, peft_config, callbacks, ...).

    Raises:
        ConfigError: with every fault that can be found before weights are loaded.

    Logged beside the loss, as token-weighted means over micro-batches and processes: nll, ce_q, kl_q, trust,
    residual_mass, strength, update, entropy, accuracy, off_simplex_fraction, supervised_tokens.
    """

    _tag_names = ["trl", "sft", "qtarget"]  # noqa: RUF012
    _name = "QTarget"

    def __init__(
        self,
        model: str | nn.Module,
        args: QTargetConfig | TrainingArguments | None = None,
        *positional: Any,
        teacher_model: nn.Module | None = None,
        reference_model: nn.Module | None = None,
        **kwargs: Any,
    ):
        names = list(inspect.signature(SFTTrainer.__init__).parameters)[3:]  # after self, model, args
        kwargs.update(zip(names, positional, strict=False))
        args = self._convert(model, args)
        self._target = args.resolve_target()
        self._eval_target = args.resolve_eval_target()
        self._columns = columns_of(self._target, self._eval_target)
        self._check(model, args, kwargs, teacher_model)
        kwargs.pop("compute_loss_func", None)
        with _as_plain_nll(args):
            super().__init__(model, args, **kwargs)  # type: ignore[arg-type]
        self.args: QTargetConfig
        # The trainer divides by the accumulation steps itself only where each micro-batch brings its own mean.
        self.loss_is_scaled_for_ga = args.denominator != "micro_batch"  # type: ignore[assignment]
        self._check_prepared_data()
        self._check_parallelism()
        self._vocab_size = real_vocabulary_size(self._tokenizer)
        if self._columns:
            self.data_collator = ColumnCollator(self.data_collator, self._columns, args.max_length)
        add_target_forward(self._base_model())
        self._teacher = self._load_teacher(teacher_model)
        self._reference = self._load_reference(reference_model)
        self._sums = {"train": TokenSums(), "eval": TokenSums()}
        self._transform_checked = False

    # -- what the user asked for ---------------------------------------------------------------------------------

    @staticmethod
    def _convert(model: str | nn.Module, args: TrainingArguments | None) -> QTargetConfig:
        if args is None:
            name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "model")
            return QTargetConfig(f"{str(name).rstrip('/').split('/')[-1]}-QTarget")
        return args if isinstance(args, QTargetConfig) else QTargetConfig.from_arguments(args)

    def _check(
        self, model: str | nn.Module, args: QTargetConfig, kwargs: dict[str, Any], teacher_model: nn.Module | None
    ) -> None:
        targets = [self._target, self._eval_target]
        formatted = kwargs.get("formatting_func") is not None
        faults = checks.own_loss_beside_target(kwargs.get("compute_loss_func"))
        faults += checks.missing_teacher(args, targets, teacher_model is not None)
        faults += checks.columns_cannot_follow(args, targets)
        faults += checks.adapter_on_head(getattr(kwargs.get("peft_config"), "target_modules", None))
        sets = [("train", kwargs.get("train_dataset"), self._target)]
        evaluated = kwargs.get("eval_dataset")
        named = evaluated.items() if isinstance(evaluated, Mapping) else [("eval", evaluated)]
        sets += [(name, dataset, self._eval_target) for name, dataset in named]
        for name, dataset, target in sets:
            columns = getattr(dataset, "column_names", None)
            if dataset is None or isinstance(columns, dict):
                continue
            faults += checks.missing_columns(name, columns, target)
            faults += checks.untrainable_rows(name, columns, args.dataset_text_field, formatted)
        if teacher_model is None and args.teacher_model_name_or_path and any("teacher" in t.requires for t in targets):
            name = args.teacher_model_name_or_path
            tokenizer = kwargs.get("processing_class") or _tokenizer_of(model)
            try:
                teacher_tokenizer = _teacher_tokenizer(args)
            except (OSError, ValueError) as error:
                reason = " ".join(str(error).split())
                faults.append(f"teacher_model_name_or_path is {name!r}, whose tokenizer cannot be loaded: {reason}")
            else:
                faults += checks.other_tokenizer(getattr(tokenizer, "tokenizer", tokenizer), teacher_tokenizer, name)
        if faults:
            raise ConfigError(faults)
        for warning in checks.unused_teacher(args, targets, teacher_model is not None):
            logger.warning(warning)

    def _check_prepared_data(self) -> None:
        if self._is_vision_dataset:
            raise ConfigError("the dataset holds images; only text can be trained with a target: use TRL's SFTTrainer")
        if self.aux_loss_enabled:
            raise ConfigError(
                "the model is a mixture of experts with an auxiliary loss, which is not supported yet; "
                "set router_aux_loss_coef: 0 to train without it"
            )
        evaluated = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        prepared: dict[str, Any] = {"train": self.train_dataset, **evaluated}
        faults = []
        for name, dataset in prepared.items():
            if dataset is not None and not isinstance(dataset, torch.utils.data.IterableDataset):
                faults += checks.no_supervised_token(name, dataset)
        if faults:
            raise ConfigError(faults)

    def _check_parallelism(self) -> None:
        parallelism = self.accelerator.parallelism_config
        if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
            raise ConfigError("context and sequence parallelism are not supported: their labels are already shifted")

    # -- other models --------------------------------------------------------------------------------------------

    def _base_model(self) -> nn.Module:
        """The causal language model itself, without wrappers or adapters."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def _requires(self, name: str) -> bool:
        return name in self._target.requires or name in self._eval_target.requires

    def _load_teacher(self, given: nn.Module | None) -> nn.Module | None:
        if not self._requires("teacher"):
            return None
        if given is not None:
            teacher = freeze(given).to(self.args.device)
        else:
            args = self.args
            teacher = load_frozen(
                args.teacher_model_name_or_path,  # type: ignore[arg-type]
                args.teacher_model_revision,
                args.teacher_model_init_kwargs,  # type: ignore[arg-type]
                args.device,
            )
        add_target_forward(teacher)
        return teacher

    def _load_reference(self, given: nn.Module | None) -> nn.Module | None:
        """A model of its own, or None where the reference is the student with its adapters off (or is not needed)."""
        if not self._requires("reference"):
            return None
        args = self.args
        if given is not None:
            reference = freeze(given).to(args.device)
        elif args.reference_model_name_or_path:
            reference = load_frozen(
                args.reference_model_name_or_path,
                args.reference_model_revision,
                args.reference_model_init_kwargs,  # type: ignore[arg-type]
                args.device,
            )
        elif hasattr(self.accelerator.unwrap_model(self.model), "disable_adapter"):
            return None
        else:
            reference = frozen_copy(self._base_model())
            reference.__dict__.pop("_qtarget_forward", None)
        add_target_forward(reference)
        return reference

    @torch.no_grad()
    def _other_heads(self, model: nn.Module, inputs: dict[str, Any], target: Target) -> dict[str, Head]:
        """Hidden states and heads of the models the target needs, on the student's inputs, before its forward."""
        heads = {}
        if "teacher" in target.requires:
            heads["teacher"] = self._head_of(self._teacher, self._teacher, inputs)
        if "reference" in target.requires:
            if self._reference is not None:
                heads["reference"] = self._head_of(self._reference, self._reference, inputs)
            else:
                with adapters_off(self.accelerator.unwrap_model(self.model)):
                    heads["reference"] = self._head_of(model, self._base_model(), inputs)
        return heads

    def _head_of(self, call: Any, base: Any, inputs: dict[str, Any]) -> Head:
        states = call(**inputs, qtarget=StatesCall())
        transform = HeadTransform.of(base.config)
        rows = states.weight.shape[0]
        return Head(
            states.hidden[:, :-1],
            states.weight,
            states.bias,
            logit_scale=transform.scale,
            logit_softcap=transform.softcap,
            vocab_size=min(rows, self._vocab_size),
        )

    @property
    def reads_teacher(self) -> bool:
        """Whether a teacher is loaded."""
        return self._teacher is not None

    # -- the loss ------------------------------------------------------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        kept: list[str] = self._signature_columns or []
        self._signature_columns = [*kept, *(name for name in self._columns if name not in kept)]  # type: ignore[assignment]

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        """The denominator: shifted labels of all micro-batches and processes, for every architecture alike.

        Transformers leaves the count to the architecture (GPT-2 counts position 0, a forward without ``**kwargs`` gets
        none), so that the same data would give other gradients.
        """
        if self.args.denominator == "micro_batch" or not batch_samples:
            return None
        count = torch.zeros((), dtype=torch.float64)
        for batch in batch_samples:
            counted = batch["labels"][..., 1:] != -100
            if self.args.denominator == "kept":
                for name in {"weight", "critical"} & set(columns_of(self._target)):
                    counted = counted & (batch[name][..., 1:] != 0)
            count = count + counted.sum().to(count)
        count = count.to(device)
        if self.args.world_size > 1:
            count = self.accelerator.gather(count).sum() / self.get_tp_size()
        return count.float()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ):
        training = model.training
        target = self._target if training else self._eval_target
        columns = {name: inputs.pop(name) for name in self._columns if name in inputs}
        columns = {name: column for name, column in columns.items() if name in columns_of(target)}
        labels = inputs["labels"]
        model_inputs = {name: value for name, value in inputs.items() if name != "labels"}
        if not self._transform_checked:
            self._check_transform(model, model_inputs)
        call = LossCall(
            target,
            labels,
            columns,
            self._other_heads(model, model_inputs, target),
            self._vocab_size,
            num_items_in_batch,
            "all" if not training or self._logs_this_step() else "basic",
        )
        try:
            output = model(**model_inputs, qtarget=call)
        except ConfigError as error:
            raise ConfigError([f"step {self.state.global_step + 1}: {fault}" for fault in error.faults]) from error
        loss = output.loss
        stats = {name: value.detach() for name, value in output.stats.items()}
        sums = self._sums["train" if training else "eval"]
        if training:
            sums.add(stats)
            self._count_tokens(inputs)
            if num_items_in_batch is not None:
                loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        else:
            sums.add(stats, loss_sum=loss.detach() * (labels[:, 1:] != -100).sum().clamp(min=1))
        if return_outputs:
            with torch.no_grad():
                return loss, model(**accepted(self._base_model(), model_inputs))
        return loss

    def _check_transform(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Once: logits rebuilt from hidden states are the model's own, for the student and every other model."""
        mixed = self.accelerator.mixed_precision != "no"
        with evaluation_mode(model):
            check_head_transform(model, self._base_model(), inputs, mixed)
        for other in (self._teacher, self._reference):
            if other is not None:
                check_head_transform(other, other, inputs)
        self._transform_checked = True

    def _logs_this_step(self) -> bool:
        step, interval = self.state.global_step + 1, self.state.logging_steps
        return (self.args.logging_first_step and step == 1) or (bool(interval) and step % interval == 0)

    def _count_tokens(self, inputs: dict[str, Any]) -> None:
        """TRL's num_tokens: all tokens forwarded so far, padding left out."""
        if "attention_mask" in inputs:
            count = inputs["attention_mask"].sum()
        else:
            count = torch.tensor(inputs["input_ids"].numel(), device=inputs["input_ids"].device)
        self._total_train_tokens += int(self.accelerator.gather_for_metrics(count).sum()) // self._tp_size
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]

    # -- what is logged ------------------------------------------------------------------------------------------

    def describe(self) -> str:
        """One line: the target, its formula, the denominator and where the other models come from."""
        target, args = self._target, self.args
        parts = [f"target {target}: {target.formula}", f"denominator {args.denominator}"]
        if "teacher" in target.requires:
            name = args.teacher_model_name_or_path or type(self._teacher).__name__
            parts.append(f"teacher {name} (revision {args.teacher_model_revision or 'default'})")
        if "reference" in target.requires:
            own = "the adapters off" if self._reference is None else "the weights at the start"
            name = args.reference_model_name_or_path or own
            parts.append(f"reference {name} (revision {args.reference_model_revision or 'default'})")
        return "; ".join(parts)

    def train(self, *args: Any, **kwargs: Any):
        self.accelerator.print(self.describe())
        return super().train(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        assert self.model is not None
        if self.model.training and "eval_loss" not in logs:
            means = self._sums["train"].read(self.accelerator)
            logs.update(_with_trl_names(means))
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, **kwargs: Any):
        """As Transformers', with the loss and every statistic weighted by tokens instead of by batches."""
        prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval")
        self._sums["eval"] = TokenSums()
        output = super().evaluation_loop(*args, **kwargs)
        means = _with_trl_names(self._sums["eval"].read(self.accelerator))
        assert output.metrics is not None
        output.metrics.update({f"{prefix}_{name}": value for name, value in means.items()})
        return output

    @contextlib.contextmanager
    def evaluating(self, target: Target | str | dict):
        """Report another target for the duration, such as "kd" to see how far the teacher is.

        Raises:
            ConfigError: it needs a model or a column that this trainer did not load.
        """
        target = Target.from_config(target)
        if missing := self._not_loaded(target):
            raise ConfigError(
                f"target {target} needs {', '.join(missing)}, which this trainer did not load; name the target "
                "in eval_target when you make the trainer"
            )
        before, self._eval_target = self._eval_target, target
        try:
            yield self
        finally:
            self._eval_target = before

    def _not_loaded(self, target: Target) -> list[str]:
        adapters = hasattr(self.accelerator.unwrap_model(self.model), "disable_adapter")
        loaded = {"teacher": self._teacher is not None, "reference": self._reference is not None or adapters}
        missing = [f"a {name}" for name, there in loaded.items() if name in target.requires and not there]
        return missing + [f"column {name!r}" for name in columns_of(target) if name not in self._columns]


def _with_trl_names(means: dict[str, float]) -> dict[str, float]:
    return {**means, "mean_token_accuracy": means["accuracy"]} if "accuracy" in means else means


@contextlib.contextmanager
def _as_plain_nll(args: QTargetConfig):
    """Show TRL the settings of its plain loss while it sets itself up: the loss is this trainer's from then on."""
    kept = args.loss_type, args.label_smoothing_factor
    args.loss_type, args.label_smoothing_factor = "nll", 0.0
    try:
        yield
    finally:
        args.loss_type, args.label_smoothing_factor = kept


def _tokenizer_of(model: Any) -> Any:
    return AutoTokenizer.from_pretrained(model if isinstance(model, str) else model.config._name_or_path)


def _teacher_tokenizer(args: QTargetConfig) -> Any:
    kwargs: dict[str, Any] = args.teacher_model_init_kwargs or {}  # type: ignore[assignment]
    return AutoTokenizer.from_pretrained(
        args.teacher_model_name_or_path,
        revision=args.teacher_model_revision or kwargs.get("revision") or "main",
        trust_remote_code=bool(kwargs.get("trust_remote_code", False)),
    )
