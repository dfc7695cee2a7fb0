"""``QTargetTrainer``: TRL's SFTTrainer with the loss of a target."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments
from trl import SFTTrainer

from qtarget.data.batch import Batch
from qtarget.data.columns import SOURCE_ID, columns_for
from qtarget.data.picture import Picture
from qtarget.errors import ConfigError, raise_together
from qtarget.losses import Head, TopK, engine
from qtarget.models.causal_lm import CausalLM
from qtarget.models.forward import LossCall, accepted, add_target_forward
from qtarget.models.frozen import evaluation_mode
from qtarget.targets import Target
from qtarget.targets.objective import Objective
from qtarget.teachers import settings as teacher_settings
from qtarget.teachers.vocabulary import real_vocabulary_size
from qtarget.training import checks, compiling
from qtarget.training.auxiliary import AuxiliaryModels
from qtarget.training.checks import trainable
from qtarget.training.config import QTargetConfig
from qtarget.training.history import History
from qtarget.training.hooks import HostHooks
from qtarget.training.host_repairs import StepBatches, adapter_by_name, as_plain_nll
from qtarget.training.metrics import TokenMeter
from qtarget.training.rows import RowPreparer, as_conversations
from qtarget.training.saving import checkpoints, course, run_identity
from qtarget.training.saving.checkpoints import AtomicCheckpoints
from qtarget.training.saving.side_files import SideFiles, mend_generation_config

logger = logging.getLogger(__name__)


class QTargetTrainer(HostHooks):
    """Fine-tune toward a designed target; otherwise TRL's ``SFTTrainer``, with the same arguments.

    The loss is computed inside the model's own forward from its last hidden states; logits are never held.

    Args:
        model: a model, or the name or path of one; of an adapter: it is trained on.
        args: ``QTargetConfig``; ``SFTConfig`` and ``TrainingArguments`` are converted.
        target: what to learn, in place of ``args.target``.
        teacher_model: the teacher as a model, in place of ``args.teacher_model_name_or_path``.
        reference_model: the reference as a model; by default the model as it starts, or its adapters off.
        **kwargs: ``SFTTrainer``'s (train_dataset, eval_dataset, processing_class, peft_config, callbacks, ...).

    Attributes:
        objective, eval_objective: what is trained, and what evaluation reports.
        rows: prepares datasets, and knows the per-token columns. aux: teacher, reference and old policy.
        meter: what is logged. vocab_size: the tokens of the tokenizer; a head may be padded beyond them.
        label_only_token: the end token that is taught by its label alone, or None.
        side_files: what could not be written beside the weights, in ``failed``.

    Raises:
        ConfigError: with every fault that can be found before weights are loaded.

    Logged beside the loss, as token-weighted means over micro-batches and processes: nll, ce_q, kl_q, trust,
    residual_mass, strength, update, update_vs_sft, entropy, accuracy, off_simplex_fraction, supervised_tokens; with data
    sources each also as ``SOURCE/name``; numbers on a schedule as ``target/name``.

    Example:
        >>> trainer = QTargetTrainer("org/model", QTargetConfig(target="dft"), train_dataset=rows)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    _tag_names = ["trl", "sft", "qtarget"]  # noqa: RUF012
    _name = "QTarget"
    # Whether rows are joined to the teacher even where no target asks one.
    opens_teacher = False
    args: QTargetConfig
    objective: Objective
    eval_objective: Objective
    # The host declares each as one of several kinds of which a user gives one.
    model: Any
    train_dataset: Any
    eval_dataset: Any
    data_collator: Any
    processing_class: Any

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
        objectives = self.objective, self.eval_objective = args.resolve_objective(), args.resolve_eval_objective()
        datasets = checks.datasets_of(kwargs.get("train_dataset"), kwargs.get("eval_dataset"))
        sets = checks.column_sets(*objectives, datasets)
        self.reads_reference_column, faults = checks.reference_column(args, sets, reference_model is not None)
        given = teacher_model is not None
        raise_together([*checks.before_loading(model, args, objectives, sets, kwargs, given), *faults])
        asked = any("teacher" in objective.requires for objective in objectives)
        self._idle_teacher = (given or args.names_teacher) and not asked
        engine.choose(args.loss_backend, args.device, torch.float32, "loss_backend")
        self.rows = RowPreparer(args, *objectives, self.reads_reference_column, self.opens_teacher)
        self.step_batches, self.checkpoints, self.side_files = StepBatches(), AtomicCheckpoints(), SideFiles()
        if args.assistant_only_loss:
            kwargs["train_dataset"] = as_conversations(kwargs.get("train_dataset"), args.dataset_text_field)
        model, args = adapter_by_name(model, args, kwargs)
        with as_plain_nll(args):
            super().__init__(model, args, **kwargs)  # type: ignore[arg-type]
        # The trainer divides only where each micro-batch brings its own mean; Transformers 5.10 reads the second name.
        self.loss_is_scaled_for_ga = self.model_accepts_loss_kwargs = args.denominator != "micro_batch"  # type: ignore[assignment]
        raise_together(checks.prepared(self, self._is_vision_dataset))
        mend_generation_config(CausalLM(self.model, 0).base)
        self.data_collator = self.rows.collator(self.data_collator)
        add_target_forward(CausalLM(self.model, 0).base)
        self.vocab_size = real_vocabulary_size(self.tokenizer)
        roles = self._roles(self.objective.requires | self.eval_objective.requires)
        self.aux = self._load(roles, teacher_model, reference_model, self.rows.join)
        ends = self.tokenizer.eos_token_id, getattr(self.aux.teacher, "ends_with", None), args.teacher_end_token
        teacher_settings.log_end_tokens(self.tokenizer, *ends)
        self.label_only_token = teacher_settings.label_only_end_token(*ends)
        every = args.lens_every
        history = History(str(args.output_dir), self.vocab_size, every, self.accelerator) if every else None
        if history is not None:
            self.add_callback(history)
        self.meter = TokenMeter(self.rows.columns.sources, self.accelerator, history)
        self._heads_checked = False
        self._virtual_tokens = self.student.virtual_tokens  # looked up once: unwrapping walks all modules
        self._backends: dict[int, str] = {}

    def picture(self) -> Picture | None:
        """What will be trained: rows, tokens by role, cuts, ends; None where the rows have no labels yet."""
        return self.rows.picture(self.student.stop_tokens(self.tokenizer), self.tokenizer, self.train_dataset)

    # -- the models, asked about a batch -------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        """The text tokenizer, also where ``processing_class`` is a processor."""
        return self._tokenizer

    @property
    def student(self) -> CausalLM:
        """The model that is trained, as it is now."""
        return CausalLM(self.model, self.vocab_size)

    def batch(self, rows: Iterable[Mapping[str, Any]]) -> Batch:
        """Prepared rows as a step would be given them: collated, on the device, columns beside the tokens.

        Example:
            >>> batch = trainer.batch([trainer.train_dataset[0]])  # doctest: +SKIP
        """
        return self.rows.batch(self._prepare_inputs(self.data_collator([dict(row) for row in rows])))

    def ask(self, batch: Batch, of: Collection[str]) -> dict[str, Head | TopK]:
        """Distributions at positions 0 to the last but one of a batch, [B, T − 1], without gradient.

        Args:
            of: some of student, teacher and reference, those that this trainer loaded. The student is asked in the mode
                that it is in: turn dropout off with ``model.eval()``.
        """
        return self.aux.ask(self.student, batch, of)

    def denominator(self, batches: Iterable[Mapping[str, Any]]) -> Tensor | None:
        """What the summed loss of some collated micro-batches is divided by; None where each has its own count."""
        return self._get_num_items_in_batch(list(batches), self.args.device)

    def one_pass(self, rows_per_device: int) -> tuple[nn.Module, list[dict[str, Any]]]:
        """The student as training wraps it, and the micro-batches of a pass over the training set in this process."""
        self.args.per_device_train_batch_size = self._train_batch_size = rows_per_device
        return self.accelerator.prepare(self._wrap_model(self.model)), list(self.get_train_dataloader())

    def check_heads(self, inputs: dict[str, Any], student: CausalLM | None = None) -> None:
        """Once: logits rebuilt from hidden states are the models' own, the student's and every other's.

        Raises:
            ConfigError: an architecture that does something to its logits that is not known here, or a packed batch whose
                documents see each other.
        """
        if self._heads_checked:
            return
        checks.packed_batch(inputs)
        student = self.student if student is None else student
        with evaluation_mode(student.model):
            student.check_head(inputs, self.accelerator.mixed_precision != "no")
        self.aux.check_heads(inputs)
        self._heads_checked = True

    def auxiliary(self, roles: Collection[str]) -> AuxiliaryModels:
        """Teacher and reference, loaded as the settings name them where this trainer's target needs none."""
        return self.aux if all(self.aux.has(role) for role in roles) else self._load(roles)

    def _load(self, roles: Collection[str], *given: Any) -> AuxiliaryModels:
        return AuxiliaryModels(self.args, self.accelerator, self.student, roles, self.tokenizer.eos_token_id, *given)

    def _roles(self, requires: frozenset[str]) -> frozenset[str]:
        """The models that targets need; online weights against a column need no reference of their own."""
        roles = self.args.models_for(requires)
        return roles - {"reference"} if self.reads_reference_column and "reference" not in requires else roles

    @property
    def reads_teacher(self) -> bool:
        """Whether there is a teacher to ask."""
        return self.aux.has("teacher")

    @property
    def evaluates_teacher(self) -> bool:
        """Whether the rows of evaluation find the teacher: by position always, by a join where their target asks one."""
        asked = self.args.resolve_eval_objective().requires
        return self.reads_teacher and (self.rows.join is None or "teacher" in asked)

    def release_models(self) -> None:
        """Free the models that no target needs from the next step on."""
        objectives = self.objective, self.eval_objective
        ahead = frozenset().union(*(o.requires_from(self.state.global_step, self.total_steps) for o in objectives))
        self.aux.release(self._roles(ahead))

    # -- the loss ------------------------------------------------------------------------------------------------

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run, on which schedules depend; 0 before it is known."""
        return max(self.state.max_steps, 0)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ):
        training, step = model.training, self.state.global_step
        targets = (self.objective if training else self.eval_objective).at(step, self.total_steps)
        requires = frozenset().union(*(target.requires for target in targets))
        batch, student = self.rows.batch(inputs), CausalLM(model, self.vocab_size)
        self.check_heads(batch.inputs, student)
        if training:
            self.aux.advance(step, requires)
        self._add_computed_columns(batch, student, requires)
        heads = self.aux.ask(student, batch, requires & {"teacher", "reference"})
        source = batch.columns.get(SOURCE_ID) if len(targets) > 1 else None
        if self.label_only_token is not None:
            targets, source = teacher_settings.split_end_tokens(targets, source, batch.labels, self.label_only_token)
        columns = batch.columns if source is None else {**batch.columns, SOURCE_ID: source}
        stats = "all" if not training or self._logs_this_step() else "basic"
        z_loss = self.args.z_loss if training else 0.0  # evaluation reports the target alone
        settings = (
            self.vocab_size,
            num_items_in_batch,
            stats,
            self.aux_loss_enabled,
            self._engine_backend(),
            z_loss,
            self._virtual_tokens,
        )
        call = LossCall(targets, batch.labels, columns, heads, *settings)
        try:
            output = model(**batch.inputs, qtarget=call)
        except ConfigError as error:
            error.during(f"step {step + 1}")
            raise
        loss = self._scaled(output, num_items_in_batch, training)
        if training:
            raise_together([] if loss.requires_grad else trainable.out_of_reach(self.model))
            self.meter.add(output.record.stats, batch, step + 1)
            self._count_tokens(inputs)
        else:
            self.meter.add_evaluated(output.record.stats, batch, loss)
            self._metrics["eval"]["num_tokens"] = [self._total_train_tokens]
        if return_outputs:
            with torch.no_grad():
                return loss, model(**accepted(student.base, batch.inputs))
        return loss

    def _add_computed_columns(self, batch: Batch, student: CausalLM, requires: frozenset[str]) -> None:
        """psft's old policy and iw-sft's online weights: passes without gradient before the student's."""
        if self.aux.old_policy is not None and "old_policy" in requires:
            batch.columns["old_logps"] = self.aux.old_logps(student, batch)
        if self.args.weights == "online" and "weight" in requires:
            batch.columns["weight"] = self.aux.online_weights(student, batch, self.args.weights_temperature)

    def _engine_backend(self) -> str:
        """Who does the rows' mathematics: the same at every step of a run, and asked once."""
        if self.args.loss_backend != "auto":
            return self.args.loss_backend
        steps = self.total_steps
        if steps not in self._backends:
            rows = steps * self.args.gradient_accumulation_steps * self.args.per_device_train_batch_size
            logits = compiling.logits_of_run(self.train_dataset, rows, self.vocab_size or 0)
            self._backends[steps] = compiling.backend(list(self.objective.finals()), self.accelerator.device, logits)
        return self._backends[steps]

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

    def _logs_this_step(self) -> bool:
        step, interval = self.state.global_step + 1, self.state.logging_steps
        return (self.args.logging_first_step and step == 1) or (bool(interval) and step % interval == 0)

    def _count_tokens(self, inputs: dict[str, Any]) -> None:
        """TRL's num_tokens: all tokens forwarded so far, padding left out."""
        count = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).sum()
        self._total_train_tokens += int(self.accelerator.gather_for_metrics(count).sum()) // self._tp_size
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]

    # -- the run -------------------------------------------------------------------------------------------------

    def describe(self) -> str:
        """One line: the targets, their formulas, the denominator and where the other models come from."""
        return run_identity.describe(self.args, self.objective, self.identity())

    def identity(self) -> dict[str, Any]:
        """What decides what is trained, as a checkpoint holds it; see ``run_identity``."""
        reference = "the column reference_logp" if self.reads_reference_column else self.aux.reference_name
        named = {
            "teacher": self.aux.teacher_name or teacher_settings.teacher_named_by(self.args, self.rows.join),
            "reference": reference or "the adapters off",
        }
        return run_identity.identity(self.args, self.objective, named)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        raise_together(trainable.all_frozen(self.model))
        run = str(self.args.output_dir)
        folder = checkpoints.begin(self, run, resume_from_checkpoint)
        for snapshot in self.aux.snapshots:
            snapshot.forget()
        if folder is not None:
            self._resume(Path(folder))
            self.accelerator.print(f"resumed at step {checkpoints.step_of(folder)} from {folder}")
        self.accelerator.print(self.describe())
        if self._idle_teacher:
            logger.warning(f"a teacher is given, but target {self.objective} does not need it; it is not loaded")
        if (picture := self.picture()) is not None and self.is_world_process_zero():
            picture.log()
        if self.args.teacher_check_rows and self.reads_teacher:
            from qtarget.teachers.agreement import measure  # it takes a trainer

            self.accelerator.print(measure.before_training(self))
        with checkpoints.storage_errors("what the run leaves", run):
            return super().train(folder, *args, **kwargs)

    def _resume(self, folder: Path) -> None:
        run_identity.check(folder, self.identity())
        course.check(folder, self)
        for snapshot in self.aux.snapshots:
            snapshot.load(folder)
        self._total_train_tokens = self.meter.load(folder) or self._total_train_tokens

    def write_into_checkpoint(self, folder: Path) -> None:
        """Write what a resumed run needs beside Transformers' files; called in every process."""
        for snapshot in self.aux.snapshots:
            snapshot.save(folder)
        if self.is_world_process_zero():
            run_identity.write(folder, self.identity())
            course.write(folder, self)
            self.meter.save(folder, self._total_train_tokens)

    @contextlib.contextmanager
    def evaluating(self, target: Target | str | dict) -> Iterator[QTargetTrainer]:
        """Report another target for the duration, such as "kd" to see how far the teacher is.

        Raises:
            ConfigError: it needs a model or a column that this trainer did not load.
        """
        objective = Objective.single(target)
        models = {"teacher": self.evaluates_teacher, "reference": self.aux.has("reference")}
        missing = [f"a {role}" for role, loaded in models.items() if role in objective.requires and not loaded]
        columns = self.rows.columns.names
        missing += [f"column {name!r}" for name in columns_for(objective.requires) if name not in columns]
        if missing:
            raise ConfigError(
                f"target {objective} needs {', '.join(missing)}, which this trainer did not load; name the target in "
                "eval_target when you create the trainer"
            )
        before, self.eval_objective = self.eval_objective, objective
        try:
            yield self
        finally:
            self.eval_objective = before
