"""Statistics as (sum, count) over tokens, micro-batches and processes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qtarget import files
from qtarget.data.batch import Batch
from qtarget.data.columns import SOURCE_ID
from qtarget.errors import loading
from qtarget.training.history import History

if TYPE_CHECKING:
    from qtarget.training.trainer import QTargetTrainer

# Log lines that carry the learning rate at which plain SFT's step would be matched.
_LINES_WITH_MATCHING_RATE = 5
# In a checkpoint: what is counted over a whole run and is in none of Transformers' files.
COUNTS = "qtarget_counts.json"
# Σ (1 − p_y), what plain SFT would ask for on the same tokens; read out as the ratio of the updates.
_SFT_UPDATE = "sft_update"


class TokenSums:
    """Sums of per-token statistics since they were last read, kept on the device so that no step waits for them.

    Args:
        sources: data sources, in the order of their numbers; each gets the same figures as ``source/name``.
    """

    def __init__(self, sources: Sequence[str] = ()) -> None:
        self._sources = sources
        self._sums: dict[str, Tensor] = {}

    def add(self, stats: dict[str, Tensor], source: Tensor | None = None, loss_sum: Tensor | None = None) -> None:
        """Add a micro-batch: tensors of the labels' shape, NaN where a token takes no part."""
        stats = {**stats, _SFT_UPDATE: -torch.expm1(-stats["nll"])}
        for name, value in stats.items():
            taking_part = ~torch.isnan(value)
            self._add(name, value.nansum(), taking_part.sum())
            for number, source_name in enumerate(self._sources if source is not None else ()):
                mine = taking_part & (source == number)
                self._add(f"{source_name}/{name}", value.masked_fill(~mine, 0).sum(), mine.sum())
        if loss_sum is not None:
            self._add("loss", loss_sum.detach(), (~torch.isnan(stats["nll"])).sum())

    def _add(self, name: str, total: Tensor, count: Tensor) -> None:
        pair = (
            torch.stack([total.double().cpu(), count.double().cpu()])
            if total.device.type == "mps"
            else torch.stack([total.double(), count.double()])
        )
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def read(self, accelerator: Any) -> dict[str, float]:
        """Token-weighted means over all processes, with the number of tokens, and start again."""
        if not self._sums:
            return {}
        names = list(self._sums)
        pairs = torch.stack([self._sums[name] for name in names])
        pairs = accelerator.reduce(pairs, reduction="sum").cpu()
        self._sums = {}
        means = {name: float(total / count) for name, (total, count) in zip(names, pairs, strict=True) if count > 0}
        for prefix in ("", *(f"{source}/" for source in self._sources)):
            if f"{prefix}nll" in names:
                means[f"{prefix}supervised_tokens"] = float(pairs[names.index(f"{prefix}nll"), 1])
            sft_update = means.pop(prefix + _SFT_UPDATE, 0.0)
            if sft_update > 0 and f"{prefix}update" in means:
                means[f"{prefix}update_vs_sft"] = means[f"{prefix}update"] / sft_update
        return means


class TokenMeter:
    """What a run logs: means over tokens, micro-batches and processes.

    Args:
        sources: data sources, in the order of their numbers. accelerator: the run's. history: collects the lens' maps.
    """

    def __init__(self, sources: Sequence[str], accelerator: Any, history: History | None = None):
        self._sources, self._accelerator, self._history = sources, accelerator, history
        self._sums = {mode: TokenSums(sources) for mode in ("train", "eval")}
        self._lines_logged = 0

    def add(self, stats: dict[str, Tensor], batch: Batch, step: int) -> None:
        """A micro-batch of training, in optimiser step ``step`` (1 is the first)."""
        self._sums["train"].add(stats, _sources_of(batch))
        if self._history is not None and self._history.wants(step):
            self._history.add(stats)

    def add_evaluated(self, stats: dict[str, Tensor], batch: Batch, loss: Tensor) -> None:
        """A batch of evaluation; ``loss`` is a mean over its tokens."""
        tokens = (batch.shifted != -100).sum().clamp(min=1)
        self._sums["eval"].add(stats, _sources_of(batch), loss_sum=loss.detach() * tokens)

    def begin_evaluation(self) -> None:
        self._sums["eval"] = TokenSums(self._sources)

    def read(self, mode: str) -> dict[str, float]:
        """Means of "train" or "eval" since they were last read, TRL's name for the accuracy among them."""
        means = self._sums[mode].read(self._accelerator)
        return {**means, "mean_token_accuracy": means["accuracy"]} if "accuracy" in means else means

    def add_to_log(self, trainer: QTargetTrainer, logs: dict[str, float]) -> None:
        """A line of training: means since the last one, and the scheduled numbers of the step just done.

        Nothing was added before the summary at the end of training, which stays as it is.
        """
        if means := self.read("train"):
            logs.update(means)
            logs.update(trainer.objective.values(max(trainer.state.global_step - 1, 0), trainer.total_steps))
            if (sentence := self._add_matching_rate(logs)) is not None:
                trainer.accelerator.print(sentence)

    def _add_matching_rate(self, logs: dict[str, float]) -> str | None:
        """In the first lines: the rate at which plain SFT's step would be as large. Returns a sentence to print once."""
        share, rate = logs.get("update_vs_sft"), logs.get("learning_rate")
        if not share or not rate or self._lines_logged >= _LINES_WITH_MATCHING_RATE:
            return None
        logs["lr_to_match_sft"] = rate / share
        self._lines_logged += 1
        return update_against_sft(share, rate) if self._lines_logged == 1 and abs(share - 1) > 1e-3 else None

    def save(self, folder: Path, num_tokens: int) -> None:
        """Into a checkpoint: the counts of a whole run."""
        counts = {"num_tokens": num_tokens, "lines_logged": self._lines_logged}
        (folder / COUNTS).write_text(json.dumps(counts) + "\n", encoding="utf-8")

    def load(self, folder: Path) -> int | None:
        """Tokens forwarded so far; None in another program's checkpoint."""
        if not (folder / COUNTS).is_file():
            return None
        with loading("resume_from_checkpoint", str(folder), COUNTS):
            counts = files.loads((folder / COUNTS).read_bytes())
            self._lines_logged = int(counts["lines_logged"])
            return int(counts["num_tokens"])


def _sources_of(batch: Batch) -> Tensor | None:
    source = batch.columns.get(SOURCE_ID)
    return None if source is None else source[:, 1:]


def update_against_sft(share: float, learning_rate: float) -> str:
    """The sentence a run prints at its first log line."""
    return (
        f"the update is {share:.3g} of plain SFT's on the same tokens; at this learning rate of {learning_rate:.3g} the "
        f"step of {learning_rate / share:.3g} would match it under SGD (Adam divides a constant factor out again, so "
        "there it tells how the steps compare with weight decay and clipping)"
    )
