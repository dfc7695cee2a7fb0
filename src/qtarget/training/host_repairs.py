"""Which micro-batches make an optimiser step, after a resume and on a stream too.

Three things go wrong there in Transformers 5.23. A finished run that is resumed trains one step more. On a stream, whose
length is not known, a pass that does not end with a full step adds its last micro-batches to the gradient of the next
pass's first step with a denominator of their own, so that step is up to twice as long; a pass shorter than a step never
ends. And a stream that is resumed in its second pass or later skips all batches so far in the first pass, which ends
meanwhile: the run goes on with the beginning of the second, whatever it had trained of it.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
from collections.abc import Iterator
from typing import Any

import torch
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import has_length
from trl import SFTTrainer

from qtarget.errors import ConfigError

logger = logging.getLogger(__name__)


class HostRepairs(SFTTrainer):
    """TRL's trainer with the right micro-batches in every optimiser step."""

    _pass: Iterator | None = None
    _begins_within = False  # a resumed run's first pass
    _told = False

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """The micro-batches of a step and their denominator.

        None where the run is at its end, and where a pass over a stream has too few left for a whole step.

        Raises:
            ConfigError: a whole pass over a stream holds less than one step.
        """
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return [], None
        if has_length(self.train_dataset):
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = [*itertools.islice(epoch_iterator, num_batches)]
        if batches and len(batches) < num_batches:
            if self._pass is not epoch_iterator and not self._begins_within:
                raise ConfigError(
                    f"gradient_accumulation_steps is {num_batches}, but a pass over the streamed dataset holds "
                    f"{len(batches)} micro-batches; lower it, or read the dataset whole: dataset_streaming: false"
                )
            if not self._told:
                self._told = True
                logger.warning(
                    f"the last {len(batches)} micro-batches of each pass over the stream are left out: they do not fill "
                    f"an optimiser step of {num_batches}"
                )
            batches = []
        self._pass, self._begins_within = epoch_iterator, False
        return batches, self._get_num_items_in_batch(batches, device) if batches else None

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        """Passes finished, and micro-batches trained of the present one."""
        finished, trained = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is None or has_length(self.train_dataset) or self.args.ignore_data_skip:
            return finished, trained
        # On a stream the epoch is the passes finished, and the steps of this one over those of the whole run: never none
        # of them, since a checkpoint comes after a step, and all of them where the run ended in its first pass.
        saved = TrainerState.load_from_json(os.path.join(resume_from_checkpoint, TRAINER_STATE_NAME))
        epoch = saved.epoch or 0.0
        passes = max(math.ceil(epoch) - 1, 0)
        steps = round((epoch - passes) * saved.max_steps)
        self._begins_within = steps > 0
        return passes, steps * self.args.gradient_accumulation_steps
