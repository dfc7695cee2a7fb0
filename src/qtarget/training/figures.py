"""What a trainer says of itself: statistics of the loss, log lines, evaluation's figures, the model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trl import SFTTrainer

from qtarget import json_text
from qtarget.data.columns import SOURCE_ID
from qtarget.errors import loading
from qtarget.targets.objective import Objective
from qtarget.teachers.settings import teacher_named_by
from qtarget.training import model_card, run_identity
from qtarget.training.config import QTargetConfig
from qtarget.training.history import History
from qtarget.training.metrics import TokenSums, update_against_sft

# Log lines that carry the learning rate at which plain SFT's step would be matched.
_LINES_WITH_MATCHING_RATE = 5
# In a checkpoint: what is counted over a whole run and is in none of Transformers' files.
COUNTS = "qtarget_counts.json"


class FiguresTrainer(SFTTrainer):
    """TRL's trainer with figures as means over tokens, micro-batches and processes; its subclass trains."""

    args: QTargetConfig
    _objective: Objective
    _others: Any
    _uids: Any
    _columns: Any
    _sums: dict[str, TokenSums]
    _history: History | None
    _lines_logged: int
    _reads_reference_column: bool

    @property
    def _step(self) -> int:
        """Optimiser steps finished so far, on which schedules depend."""
        return self.state.global_step

    @property
    def _total_steps(self) -> int:
        return max(self.state.max_steps, 0)

    def _record(self, output: Any, loss: Tensor, labels: Tensor, columns: dict[str, Tensor], training: bool) -> None:
        stats = output.figures.stats
        source = columns.get(SOURCE_ID)
        source = None if source is None else source[:, 1:]
        if training:
            self._sums["train"].add(stats, source)
            if self._history is not None and self._history.wants(self._step + 1):
                self._history.add(stats)
        else:
            tokens = (labels[:, 1:] != -100).sum().clamp(min=1)
            self._sums["eval"].add(stats, source, loss_sum=loss.detach() * tokens)
            self._metrics["eval"]["num_tokens"] = [self._total_train_tokens]

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

    def _write_counts(self, folder: Path) -> None:
        counts = {"num_tokens": self._total_train_tokens, "lines_logged": self._lines_logged}
        (folder / COUNTS).write_text(json.dumps(counts) + "\n", encoding="utf-8")

    def _read_counts(self, folder: Path) -> None:
        if (folder / COUNTS).is_file():  # else another program's checkpoint
            with loading("resume_from_checkpoint", str(folder), COUNTS):
                counts = json_text.loads((folder / COUNTS).read_bytes())
                self._total_train_tokens, self._lines_logged = int(counts["num_tokens"]), int(counts["lines_logged"])

    def _reference_named(self) -> str:
        if self._reads_reference_column:
            return "the column reference_logp"
        return self._others.reference_name or "the adapters off"

    def describe(self) -> str:
        """One line: the targets, their formulas, the denominator and where the other models come from."""
        return run_identity.describe(self.args, self._objective, self._identity())

    def _identity(self) -> dict[str, Any]:
        """What decides what is trained; see ``identity``."""
        others = self._others
        teacher = others.teacher_name or teacher_named_by(self.args, self._uids)
        own = {"teacher": teacher, "reference": self._reference_named()}
        return run_identity.identity(self.args, self._objective, own)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)
        card = Path(str(self.args.output_dir)) / "README.md"
        if not self.is_world_process_zero() or not card.is_file():
            return
        evaluated = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        rows = {
            name: f"{len(data)} rows" if hasattr(data, "__len__") else "a stream"
            for name, data in {"train": self.train_dataset, **evaluated}.items()
            if data is not None
        }
        trusted = run_identity.trusted_code(self.args)
        part = model_card.section(self._objective, self._identity(), rows, self.state.log_history, trusted)
        card.write_text(model_card.insert(card.read_text(encoding="utf-8"), part), encoding="utf-8")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        assert self.model is not None
        if self.model.training and "eval_loss" not in logs:
            means = self._sums["train"].read(self.accelerator)
            if means:  # else it is the summary at the end of training
                logs.update(_with_trl_names(means))
                logs.update(self._objective.values(max(self._step - 1, 0), self._total_steps))  # of the step just done
                self._tell_matching_rate(logs)
        super().log(logs, start_time)

    def _tell_matching_rate(self, logs: dict[str, float]) -> None:
        """In the first lines: how much smaller the update is than plain SFT's, and the rate that would match it."""
        share, rate = logs.get("update_vs_sft"), logs.get("learning_rate")
        if not share or not rate or self._lines_logged >= _LINES_WITH_MATCHING_RATE:
            return
        logs["lr_to_match_sft"] = rate / share
        if not self._lines_logged and abs(share - 1) > 1e-3:
            self.accelerator.print(update_against_sft(share, rate))
        self._lines_logged += 1

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any):
        self._leave_out_repeated(inputs)
        return super().prediction_step(model, inputs, *args, **kwargs)

    def _leave_out_repeated(self, inputs: dict[str, Any]) -> None:
        """Accelerate fills the last batch of all processes with rows that were there already: these lose their labels.

        Where packed rows of one process stand in one line, part of them repeated, they are counted as they come.
        """
        state, labels = self.accelerator.gradient_state, inputs["labels"]
        if self.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder < 1:
            return
        in_a_line = (
            len(labels) == 1 and "position_ids" in inputs and hasattr(state.active_dataloader.dataset, "__len__")
        )
        size = self.args.eval_batch_size if in_a_line else len(labels)
        real = min(max(state.remainder - self.accelerator.process_index * size, 0), size)
        if not in_a_line or not real:
            labels[real:] = -100
        elif real < size:
            starts = (inputs["position_ids"][0] == 0).nonzero().flatten()
            if len(starts) == size:
                labels[:, starts[real] :] = -100

    def evaluation_loop(self, *args: Any, **kwargs: Any):
        """As Transformers', with the loss and every statistic weighted by tokens instead of by batches."""
        prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval")
        self._sums["eval"] = TokenSums(self._columns.sources)
        output = super().evaluation_loop(*args, **kwargs)
        means = _with_trl_names(self._sums["eval"].read(self.accelerator))
        assert output.metrics is not None
        output.metrics.update({f"{prefix}_{name}": value for name, value in means.items()})
        return output


def _with_trl_names(means: dict[str, float]) -> dict[str, float]:
    return {**means, "mean_token_accuracy": means["accuracy"]} if "accuracy" in means else means
