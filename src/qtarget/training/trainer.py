"""QTargetTrainer: TRL's SFTTrainer with the loss of a target, computed by the engine."""

from __future__ import annotations

import contextlib
import inspect
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments
from trl import SFTTrainer

from qtarget.data.columns import REFERENCE, SOURCE_ID, UID, TokenColumnCollator, TokenColumns, columns_for, columns_of
from qtarget.errors import ConfigError
from qtarget.losses import engine
from qtarget.models.forward import LossCall, accepted, add_target_forward, check_head_transform
from qtarget.models.frozen import evaluation_mode
from qtarget.targets import Target
from qtarget.targets.objective import Objective
from qtarget.teachers.joins import CacheJoin, ContextJoin
from qtarget.teachers.settings import (
    told_of_end_tokens,
    with_label_alone,
)
from qtarget.teachers.vocabulary import real_vocabulary_size
from qtarget.training import checkpoint_files, checkpoints, checks, compiling, denominator, run_identity
from qtarget.training.auxiliary import AuxiliaryModels
from qtarget.training.checkpoints import AtomicCheckpoints
from qtarget.training.config import QTargetConfig
from qtarget.training.figures import FiguresTrainer
from qtarget.training.history import History
from qtarget.training.host_repairs import HostRepairs
from qtarget.training.metrics import TokenSums
from qtarget.training.rows import ColumnsTrainer

logger = logging.getLogger(__name__)


class QTargetTrainer(ColumnsTrainer, FiguresTrainer, HostRepairs, AtomicCheckpoints):
    """Fine-tune toward a designed target; otherwise TRL's ``SFTTrainer``, with the same arguments.

    The loss is computed inside the model's own forward from its last hidden states; logits are never held.

    Args:
        model: a model, or the name or path of one.
        args: ``QTargetConfig``; ``SFTConfig`` and ``TrainingArguments`` are converted.
        target: what to learn, in place of ``args.target``.
        teacher_model: the teacher as a model, in place of ``args.teacher_model_name_or_path``.
        reference_model: the reference as a model; by default the model as it starts, or its adapters off.
        **kwargs: ``SFTTrainer``'s (train_dataset, eval_dataset, processing_class, peft_config, callbacks, ...).

    Raises:
        ConfigError: with every fault that can be found before weights are loaded.

    Logged beside the loss, as token-weighted means over micro-batches and processes: nll, ce_q, kl_q, trust,
    residual_mass, strength, update, update_vs_sft, entropy, accuracy, off_simplex_fraction, supervised_tokens; with data
    sources each also as ``SOURCE/name``; numbers on a schedule as ``target/name``.
    """

    _tag_names = ["trl", "sft", "qtarget"]  # noqa: RUF012
    _name = "QTarget"

    def __init__(
        self,
        model: str | nn.Module,
        args: QTargetConfig | TrainingArguments | None = None,
        *positional: Any,
        target: Target | str | dict | None = None,
        teacher_model: nn.Module | None = None,
        reference_model: nn.Module | None = None,
        **kwargs: Any,
    ):
        names = list(inspect.signature(SFTTrainer.__init__).parameters)[3:]  # after self, model, args
        kwargs.update(zip(names, positional, strict=False))
        args = QTargetConfig.of(model, args, target)
        self._objective = args.resolve_objective()
        self._eval_objective = args.resolve_eval_objective()
        sets = checks.column_sets(self._objective, self._eval_objective, kwargs)
        self._reads_reference_column = checks.reference_column(args, sets, reference_model is not None)[0]
        self._columns = self._columns_to_carry(args)
        self.rows_without_labels: dict[str, int] = {}
        self._uids: CacheJoin | ContextJoin | None = None
        objectives = self._objective, self._eval_objective
        given = teacher_model is not None, reference_model is not None
        checks.raise_together(checks.before_loading(model, args, *objectives, kwargs, *given))
        for warning in checks.unused_teacher(args, objectives, teacher_model is not None):
            logger.warning(warning)
        engine.choose(args.loss_backend, args.device, torch.float32, "loss_backend")
        kwargs.pop("compute_loss_func", None)
        with _as_plain_nll(args):
            super().__init__(model, args, **kwargs)  # type: ignore[arg-type]
        # The trainer divides by the accumulation steps itself only where each micro-batch brings its own mean.
        self.loss_is_scaled_for_ga = args.denominator != "micro_batch"  # type: ignore[assignment]
        checks.raise_together(checks.prepared(self))
        self.data_collator = TokenColumnCollator(
            self.data_collator,
            [*self._columns.carried, UID],
            self._uids.gather if isinstance(self._uids, CacheJoin) else None,
        )
        add_target_forward(self._base_model())
        self._vocab_size = real_vocabulary_size(self._tokenizer)
        requires = self._models_for(self._objective.requires | self._eval_objective.requires)
        self._others = AuxiliaryModels(
            args, self.accelerator, self.model, requires, self._tokenizer, teacher_model, reference_model, self._uids
        )
        self._label_only = self._end_tokens_taught_by_label()
        self._sums = {mode: TokenSums(self._columns.sources) for mode in ("train", "eval")}
        self._transform_checked = False
        self._backends: dict[int, str] = {}
        self._lines_logged = 0
        self._history = None
        if args.lens_every:
            self._history = History(str(args.output_dir), self._vocab_size, args.lens_every, self.accelerator)
            self.add_callback(self._history)

    def _columns_to_carry(self, args: QTargetConfig) -> TokenColumns:
        names = args.columns_for(self._objective.requires | self._eval_objective.requires)
        names += [REFERENCE] if self._reads_reference_column else []
        return TokenColumns(tuple(names), tuple(self._objective.sources), args.source_column)

    def _models_for(self, requires: frozenset[str]) -> frozenset[str]:
        """The models that targets need; online weights against a column need no reference of their own."""
        models = self.args.models_for(requires)
        return models - {"reference"} if self._reads_reference_column and "reference" not in requires else models

    # -- models --------------------------------------------------------------------------------------------------

    def _base_model(self) -> nn.Module:
        """The causal language model itself, without wrappers or adapters."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    @property
    def reads_teacher(self) -> bool:
        """Whether there is a teacher to ask."""
        return self._others.teacher_source is not None

    @property
    def evaluates_teacher(self) -> bool:
        """Whether the rows of evaluation find the teacher: by position always, by uid where their target asks one."""
        return self.reads_teacher and (self._uids is None or "teacher" in self.args.resolve_eval_objective().requires)

    def _end_tokens_taught_by_label(self) -> int | None:
        """The student's end token, where the teacher ends with another and its word on that position is not taken."""
        others, own = self._others, self._tokenizer.eos_token_id
        if others.ends_with in (None, own) or own is None:
            return None
        return told_of_end_tokens(self._tokenizer, own, others.ends_with, self.args.teacher_end_token)

    # -- the loss ------------------------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        """The denominator over all micro-batches and processes; None where each micro-batch has its own."""
        if self.args.denominator == "micro_batch" or not batch_samples:
            return None
        count = denominator.count(batch_samples, self.args.denominator, self._objective).to(device)
        if self.args.world_size > 1:
            count = self.accelerator.gather(count).sum() / self.get_tp_size()
        return count.float()

    def _engine_backend(self) -> str:
        """Who does the rows' mathematics: the same at every step of a run, and asked once."""
        if self.args.loss_backend != "auto":
            return self.args.loss_backend
        steps = self._total_steps
        if steps not in self._backends:
            rows = steps * self.args.gradient_accumulation_steps * self.args.per_device_train_batch_size
            logits = compiling.logits_of_run(self.train_dataset, rows, self._vocab_size or 0)
            targets = list(self._objective.finals())
            self._backends[steps] = compiling.backend(targets, self.accelerator.device, logits)
        return self._backends[steps]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ):
        training = model.training
        objective = self._objective if training else self._eval_objective
        targets = objective.at(self._step, self._total_steps)
        requires = frozenset().union(*(target.requires for target in targets))
        columns = self.pop_columns(inputs)
        labels = inputs["labels"]
        model_inputs = {name: value for name, value in inputs.items() if name != "labels"}
        if not self._transform_checked:
            checks.packed_batch(inputs)
            self._check_transform(model, model_inputs)
        self._add_computed_columns(columns, model, model_inputs, labels, requires, training)
        heads = self._others.heads(model, model_inputs, requires, labels, columns)
        source = columns.get(SOURCE_ID) if objective.sources else None
        if self._label_only is not None:
            targets, source = with_label_alone(targets, source, labels, self._label_only)
        read = {name: columns[name] for name in columns_of(*targets) if name in columns}
        call = LossCall(
            targets,
            labels,
            read if source is None else {**read, SOURCE_ID: source},
            heads,
            self._vocab_size,
            num_items_in_batch,
            "all" if not training or self._logs_this_step() else "basic",
            self.aux_loss_enabled,
            self._engine_backend(),
        )
        try:
            output = model(**model_inputs, qtarget=call)
        except ConfigError as error:
            raise ConfigError([f"step {self._step + 1}: {fault}" for fault in error.faults]) from error
        loss = self._scaled(output, num_items_in_batch, training)
        self._record(output, loss, labels, columns, training)
        if training:
            self._count_tokens(inputs)
        if return_outputs:
            with torch.no_grad():
                return loss, model(**accepted(self._base_model(), model_inputs))
        return loss

    def _add_computed_columns(
        self,
        columns: dict[str, Tensor],
        model: nn.Module,
        inputs: dict[str, Any],
        labels: Tensor,
        requires: frozenset[str],
        training: bool,
    ) -> None:
        """psft's old policy and iw-sft's online weights: passes without gradient before the student's. The teacher's
        average moves before it is asked."""
        average = self._others.average
        if average is not None and training:
            average.update(self._step)
        if self._others.old_policy is not None and "old_policy" in requires:
            if training:
                self._others.old_policy.refresh(self._step)
            columns["old_logps"] = self._others.old_logps(model, inputs, labels)
        if self.args.weights == "online" and "weight" in requires:
            columns["weight"] = self._others.online_weights(
                model, inputs, labels, self.args.weights_temperature, columns.get(REFERENCE)
            )

    def _scaled(self, output: Any, num_items: Tensor | int | None, training: bool) -> Tensor:
        """The loss as the trainer wants it: DDP averages what was divided by a count over all processes, and the
        auxiliary loss is a mean of its micro-batch."""
        loss = output.exact_loss
        if training and num_items is not None:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        if output.aux_loss is not None:
            steps = self.current_gradient_accumulation_steps if training and num_items is not None else 1
            loss = loss + self.router_aux_loss_coef * output.aux_loss / steps
            mode = "train" if training else "eval"
            mean = self.accelerator.gather_for_metrics(output.aux_loss.detach()).mean()
            self._metrics[mode]["aux_loss"].append(mean.item())
        return loss

    def _check_transform(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Once: logits rebuilt from hidden states are the model's own, for the student and every other model."""
        mixed = self.accelerator.mixed_precision != "no"
        with evaluation_mode(model):
            check_head_transform(model, self._base_model(), inputs, mixed)
        self._others.check_head_transforms(inputs)
        self._transform_checked = True

    # -- the run -------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        if self.args.should_save:
            checks.raise_together(checkpoints.unwritable(str(self.args.output_dir)))
        folder = checks.checkpoint_folder(resume_from_checkpoint, self.args.output_dir)
        if resume_from_checkpoint is True and self.is_world_process_zero():
            for said in checkpoints.passed_over(str(self.args.output_dir)):
                logger.warning(said)
            if folder is None:
                logger.warning(f"{self.args.output_dir} holds no checkpoint to resume from: the run starts at step 0")
        checks.raise_together([] if folder is None else checkpoint_files.faults(folder))
        if self.args.should_save:
            checkpoints.clear(str(self.args.output_dir))
        for kept in self._others.kept_weights:
            kept.forget()
        if folder is not None:
            run_identity.check(folder, self._identity())
            for kept in self._others.kept_weights:
                kept.load(folder)
            self._read_counts(Path(folder))
        self.accelerator.print(self.describe())
        self._tell_agreement()
        with checkpoints.told("what the run leaves", str(self.args.output_dir)):
            return super().train(folder, *args, **kwargs)

    def _tell_agreement(self) -> None:
        """A line on how far student and teacher agree, before anything is trained."""
        from qtarget.training import agreement  # it needs this trainer's parts

        if not self.args.teacher_check_rows or not self.reads_teacher:
            return
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # the student is not in pieces yet, and may not fit whole
            self.accelerator.print(
                "student and teacher are not compared here: run qtarget teacher check on one process"
            )
            return
        self.accelerator.print(agreement.measure(self, self.args.teacher_check_rows).short())

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        objectives = self._objective, self._eval_objective
        ahead = frozenset().union(*(o.requires_from(self._step, self._total_steps) for o in objectives))
        self._others.release(self._models_for(ahead))
        return super().training_step(*args, **kwargs)

    def write_into_checkpoint(self, folder: Path) -> None:
        for kept in self._others.kept_weights:
            kept.save(folder)
        if self.is_world_process_zero():
            run_identity.write(folder, self._identity())
            self._write_counts(folder)

    @contextlib.contextmanager
    def evaluating(self, target: Target | str | dict):
        """Report another target for the duration, such as "kd" to see how far the teacher is.

        Raises:
            ConfigError: it needs a model or a column that this trainer did not load.
        """
        objective = Objective.single(target)
        if missing := self._not_loaded(objective.requires):
            raise ConfigError(
                f"target {objective} needs {', '.join(missing)}, which this trainer did not load; name the target "
                "in eval_target when you make the trainer"
            )
        before, self._eval_objective = self._eval_objective, objective
        try:
            yield self
        finally:
            self._eval_objective = before

    def _not_loaded(self, requires: frozenset[str]) -> list[str]:
        others = self._others
        loaded = {
            "teacher": self.evaluates_teacher,
            "reference": others.reference is not None or others.has_adapters,
        }
        missing = [f"a {name}" for name, there in loaded.items() if name in requires and not there]
        return missing + [f"column {name!r}" for name in columns_for(requires) if name not in self._columns.names]


@contextlib.contextmanager
def _as_plain_nll(args: QTargetConfig):
    """Show TRL the settings of its plain loss while it sets itself up: the loss is this trainer's from then on."""
    kept = args.loss_type, args.label_smoothing_factor
    args.loss_type, args.label_smoothing_factor = "nll", 0.0
    try:
        yield
    finally:
        args.loss_type, args.label_smoothing_factor = kept
