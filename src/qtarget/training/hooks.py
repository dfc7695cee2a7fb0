"""Hands each overridden hook of TRL's trainer on to the part that owns its state.

A new version of TRL is this file's work: ``SFTTrainer`` changes its private hooks with every minor version.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from trl import SFTTrainer

from qtarget.training import denominator, host_repairs
from qtarget.training.checks import trainable
from qtarget.training.saving import model_card, side_files

if TYPE_CHECKING:
    from qtarget.training.metrics import TokenMeter
    from qtarget.training.rows import RowPreparer
    from qtarget.training.saving.checkpoints import AtomicCheckpoints
    from qtarget.training.trainer import QTargetTrainer


class HostHooks(SFTTrainer):
    """TRL's trainer with its hooks handed on; ``QTargetTrainer`` makes the parts and computes the loss."""

    rows: RowPreparer
    meter: TokenMeter
    checkpoints: AtomicCheckpoints
    step_batches: host_repairs.StepBatches
    side_files: side_files.SideFiles
    _gradient_seen = False

    @property
    def _whole(self) -> QTargetTrainer:
        """What a part is handed: the trainer that is built on this class."""
        return cast("QTargetTrainer", self)

    # -- rows and batches ----------------------------------------------------------------------------------------

    def _prepare_dataset(self, *args: Any, **kwargs: Any):
        return self.rows.prepare(self._whole, super()._prepare_dataset, *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = self.rows.signature(self._signature_columns)  # type: ignore[assignment]

    def _reject_skip_prepare_without_labels(self, datasets: dict[str, Any], data_collator: Any) -> None:
        # TRL's guard knows its own collator only, which the columns' wraps.
        super()._reject_skip_prepare_without_labels(datasets, getattr(data_collator, "inner", data_collator))

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return self.rows.on_device(super()._prepare_inputs, inputs)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        return self.step_batches.of_step(self._whole, super().get_batch_samples, epoch_iterator, num_batches)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        return denominator.of_step(self._whole, batch_samples, device)

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ) -> tuple[int, int]:
        length = max_steps, num_update_steps_per_epoch, num_train_epochs
        finished, trained = super()._init_training_state(*length, resume_from_checkpoint, trial)
        return self.step_batches.resumed(self._whole, finished, trained, resume_from_checkpoint)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self._whole.release_models()
        loss = super().training_step(*args, **kwargs)
        if not self._gradient_seen:
            trainable.check_reached(self._whole)
            self._gradient_seen = True
        return loss

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any):
        host_repairs.leave_out_repeated(self._whole, inputs)
        return super().prediction_step(model, inputs, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with host_repairs.one_run_in_trackers(self._whole):
            return super().evaluate(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any):
        """As Transformers', with the loss and every statistic weighted by tokens instead of by batches."""
        prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval")
        self.meter.begin_evaluation()
        with host_repairs.still_to_prepare(self._whole):
            output = super().evaluation_loop(*args, **kwargs)
        assert output.metrics is not None
        output.metrics.update({f"{prefix}_{name}": value for name, value in self.meter.read("eval").items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        assert self.model is not None
        if self.model.training and "eval_loss" not in logs:
            self.meter.add_to_log(self._whole, logs)
        super().log(logs, start_time)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        with self.side_files.writing("README.md", full_disk=self.checkpoints.writing):
            super().create_model_card(*args, **kwargs)
            model_card.complete(self._whole)

    def _get_output_dir(self, trial: Any) -> str:
        return self.checkpoints.folder(super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        host, run = super()._save_checkpoint, Path(super()._get_output_dir(trial))
        self.checkpoints.save(self._whole, run, lambda: host(model, trial), self._push_from_checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        side_files.weights_first(self._whole, super()._save, output_dir, state_dict)

    def push_to_hub(self, *args: Any, **kwargs: Any):
        with self.side_files.writing("the upload to the hub (push_to_hub)"):
            return super().push_to_hub(*args, **kwargs)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        super()._issue_warnings_after_load(host_repairs.without_tied(self._whole, load_result))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.checkpoints.writing:
            with self.side_files.writing("the upload to the hub (push_to_hub)"):
                super()._push_from_checkpoint(checkpoint_folder)
