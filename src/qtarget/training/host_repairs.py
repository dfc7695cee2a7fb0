"""What goes wrong in Transformers and Accelerate around a step, repaired.

Three things are wrong with the micro-batches of a step in Transformers 5.23. A finished run that is resumed trains one
step more. On a stream, whose length is not known, a pass that does not end with a full step adds its last micro-batches
to the gradient of the next pass's first step with a denominator of their own, so that step is up to twice as long; a pass
shorter than a step never ends. And a stream that is resumed in its second pass or later skips all batches so far in the
first pass, which ends meanwhile: the run goes on with the beginning of the second, whatever it had trained of it.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import math
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from transformers.integrations.integration_utils import MLflowCallback, TensorBoardCallback, default_logdir
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import has_length

from qtarget.errors import ConfigError, DataError, QTargetError, loading, reason
from qtarget.models.loading import find_adapter, load_causal_lm, load_tokenizer

if TYPE_CHECKING:
    from qtarget.training.config import QTargetConfig
    from qtarget.training.trainer import QTargetTrainer

logger = logging.getLogger(__name__)


class StepBatches:
    """The right micro-batches in every optimiser step of a trainer."""

    def __init__(self) -> None:
        self._pass: Iterator | None = None
        self._begins_within = False  # a resumed run's first pass
        self._warned = False

    def of_step(
        self, trainer: QTargetTrainer, host: Callable[..., Any], batches: Iterator, num_batches: int
    ) -> tuple[list, Any]:
        """The micro-batches of a step and their denominator.

        None where the run is at its end, and where a pass over a stream has too few left for a whole step.

        Args:
            host: its ``get_batch_samples``. batches: of the present pass.

        Raises:
            ConfigError: a whole pass over a stream holds less than one step.
        """
        if trainer.state.global_step >= trainer.state.max_steps:
            trainer.control.should_training_stop = True
            return [], None
        if has_length(trainer.train_dataset):
            samples: tuple[list, Any] = host(batches, num_batches, trainer.args.device)
            return samples
        try:
            taken = [*itertools.islice(batches, num_batches)]
        except QTargetError:
            raise
        except Exception as error:  # of a file or server that is read on the way
            raise DataError(f"the train dataset cannot be read any further: {reason(error)}") from error
        if taken and len(taken) < num_batches:
            if self._pass is not batches and not self._begins_within:
                raise ConfigError(
                    f"gradient_accumulation_steps is {num_batches}, but a pass over the streamed dataset holds "
                    f"{len(taken)} micro-batches; lower it, or read the dataset whole: dataset_streaming: false"
                )
            if not self._warned:
                self._warned = True
                logger.warning(
                    f"the last {len(taken)} micro-batches of each pass over the stream are left out: they do not fill "
                    f"an optimiser step of {num_batches}"
                )
            taken = []
        self._pass, self._begins_within = batches, False
        return taken, trainer.denominator(taken)

    def resumed(self, trainer: QTargetTrainer, finished: int, trained: int, checkpoint: str | None) -> tuple[int, int]:
        """Passes finished, and micro-batches trained of the present one; of a stream, counted again."""
        if checkpoint is None or has_length(trainer.train_dataset) or trainer.args.ignore_data_skip:
            return finished, trained
        # On a stream the epoch is the passes finished, and the steps of this one over those of the whole run: never none
        # of them, since a checkpoint comes after a step, and all of them where the run ended in its first pass.
        saved = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
        epoch = saved.epoch or 0.0
        passes = max(math.ceil(epoch) - 1, 0)
        steps = round((epoch - passes) * saved.max_steps)
        self._begins_within = steps > 0
        return passes, steps * trainer.args.gradient_accumulation_steps


def leave_out_repeated(trainer: QTargetTrainer, inputs: dict[str, Any]) -> None:
    """Accelerate fills the last batch of all processes with rows that were there already: these lose their labels.

    Where packed rows of one process stand in one line, part of them repeated, they are counted as they come.
    """
    state, labels = trainer.accelerator.gradient_state, inputs["labels"]
    if trainer.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder < 1:
        return
    loader: Any = state.active_dataloader
    in_a_line = len(labels) == 1 and "position_ids" in inputs and hasattr(loader.dataset, "__len__")
    size = trainer.args.eval_batch_size if in_a_line else len(labels)
    real = min(max(state.remainder - trainer.accelerator.process_index * size, 0), size)
    if not in_a_line or not real:
        labels[real:] = -100
    elif real < size:
        starts = (inputs["position_ids"][0] == 0).nonzero().flatten()
        if len(starts) == size:
            labels[:, starts[real] :] = -100


@contextlib.contextmanager
def still_to_prepare(trainer: QTargetTrainer) -> Iterator[None]:
    """An evaluation before training leaves the model as it was.

    Accelerate marks the model that it prepares for evaluation, and training then takes it for prepared: without DDP, so
    that each process would train a model of its own on its own rows.
    """
    own_engine = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if trainer.accelerator.num_processes == 1 or own_engine or trainer.model_wrapped is not trainer.model:
        yield
        return
    with _unprepared_afterwards(trainer.accelerator, trainer.model):
        yield
    trainer.model_wrapped = trainer.model


@contextlib.contextmanager
def _unprepared_afterwards(accelerator: Any, model: Any) -> Iterator[None]:
    """Take away what ``Accelerator.prepare_model`` notes in a model and puts in place of its forward."""
    forward = model.__dict__.get("forward")
    try:
        yield
    finally:
        accelerator._models[:] = [other for other in accelerator._models if other is not model]
        for noted in ("_is_accelerate_prepared", "_original_forward", "forward"):  # the last two by mixed precision
            model.__dict__.pop(noted, None)
        if forward is not None:
            model.forward = forward


@contextlib.contextmanager
def one_run_in_trackers(trainer: QTargetTrainer) -> Iterator[None]:
    """An evaluation before or after training is logged where the training is.

    Transformers finds TensorBoard's folder when training begins: a line before that opens ./runs, and all of training
    follows it there. MLflow's run ends with training: a line after that begins a run without a name.
    """
    reopened = []
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = os.path.join(str(trainer.args.output_dir), default_logdir())
        if isinstance(callback, MLflowCallback) and callback._auto_end_run and not callback._ml_flow.active_run():
            callback._ml_flow.start_run(run_id=callback._ml_flow.last_active_run().info.run_id)
            reopened.append(callback._ml_flow)
    try:
        yield
    finally:
        for tracker in reopened:
            tracker.end_run()


def without_tied(trainer: QTargetTrainer, loaded: Any) -> Any:
    """What a checkpoint lacked, without names of weights that another name brought: a tied head is saved once."""
    missing = {*loaded.missing_keys}
    weights = [*trainer.model.named_parameters(remove_duplicate=False)]
    brought = {id(weight) for name, weight in weights if name not in missing}
    tied = {name for name, weight in weights if id(weight) in brought}
    return loaded._replace(missing_keys=[name for name in loaded.missing_keys if name not in tied])


@contextlib.contextmanager
def as_plain_nll(args: QTargetConfig) -> Iterator[None]:
    """Show TRL the settings of its plain loss while it sets itself up: the loss is the target's from then on."""
    kept = args.loss_type, args.label_smoothing_factor
    args.loss_type, args.label_smoothing_factor = "nll", 0.0
    try:
        yield
    finally:
        args.loss_type, args.label_smoothing_factor = kept


def adapter_by_name(model: Any, args: QTargetConfig, kwargs: dict[str, Any]) -> tuple[Any, QTargetConfig]:
    """(model, args) as TRL can take them, which knows no adapter by its name: it is loaded here, as TRL loads a model.

    Args:
        model: a model or a name. kwargs: the trainer's other arguments; the adapter's tokenizer is added.
    """
    init_kwargs: dict[str, Any] = {**(args.model_init_kwargs or {})}  # type: ignore[dict-item]
    revision = init_kwargs.get("revision")
    if not isinstance(model, str) or find_adapter(model, revision) is None:
        return model, args
    from trl.trainer.utils import create_model_from_path

    init_kwargs.pop("revision", None)
    if (quantised := kwargs.pop("quantization_config", None)) is not None:
        init_kwargs["quantization_config"] = quantised
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        init_kwargs["device_map"] = None
    init_kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    with loading("model_name_or_path", model):
        if kwargs.get("processing_class") is None:
            trusted = init_kwargs["trust_remote_code"]
            kwargs["processing_class"] = load_tokenizer(model, revision, trust_remote_code=trusted)
        loaded = load_causal_lm(model, revision, trainable=True, load=create_model_from_path, **init_kwargs)
    args = copy.copy(args)
    args.model_init_kwargs = None  # TRL would say that they are ignored
    return loaded, args
