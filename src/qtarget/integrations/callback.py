"""``TargetCallback``: a target in any trainer built on Transformers' ``Trainer``."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from qtarget.errors import ConfigError
from qtarget.models.applied import applied_to, apply_target


class TargetCallback(TrainerCallback):
    """Applies a target to the model of a Transformers trainer when the trainer is made.

    The trainer calls the model with labels and trains the loss it returns. If it computes its own loss instead, the run
    stops in its first step. Logged along with the loss, under ``target/``: nll, trust, update, entropy and accuracy, as
    means over this process's labels since the last log line. Trackers of ``report_to`` do not get them: they read the
    line before these are added.

    Args:
        target: as in ``qtarget.apply_target``. **settings: its other arguments (teacher, reference, vocab_size, ...).

    Raises:
        ConfigError: as in ``apply_target``; or the trainer does not train the model's own loss.

    Example:
        >>> Trainer(model, args, callbacks=[qt.TargetCallback("dft")], train_dataset=rows).train()  # doctest: +SKIP
    """

    def __init__(self, target: Any, **settings: Any):
        self.target, self.settings = target, settings
        self._model: Any = None
        self._passes = 0

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        # Now, and not when training begins: Accelerate wraps the forward in between, for mixed precision.
        self._model = apply_target(model, self.target, **self.settings)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._model is None:
            raise ConfigError(
                "TargetCallback was added after the trainer was made; give it to the trainer: callbacks=[...]"
            )
        self._at(state)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._at(state)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        applied = applied_to(self._model)
        if applied.backward_passes == self._passes:
            raise ConfigError(
                f"step {state.global_step + 1}: the trainer did not train the loss of target {applied.target}, but one "
                "of its own; turn its own loss off (label_smoothing_factor, compute_loss_func, a loss flag), or use "
                "QTargetTrainer"
            )
        self._passes = applied.backward_passes

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        figures = {f"target/{name}": value for name, value in applied_to(self._model).figures().items()}
        logs.update(figures)
        state.log_history[-1].update(figures)

    def _at(self, state: Any) -> None:
        applied = applied_to(self._model)
        applied.step, applied.total_steps = state.global_step, max(state.max_steps, 0)
