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
# An update that is less of plain SFT's is rounding, as where the teacher is the student: no rate matches it.
_NOTHING = 1e-6
# In a checkpoint: what is counted over a whole run and is in none of Transformers' files.
COUNTS = "qtarget_counts.json"
# Σ (1 − p_y), what plain SFT would ask for on the same tokens; read out as the ratio of the updates.
_SFT_UPDATE = "sft_update"


class TokenMeter:
    """What a run logs: means over tokens, micro-batches and processes.

    Sums and counts stay on the device until they are read, so that no step waits for them.

    Args:
        sources: data sources, in the order of their numbers; each gets the same figures as ``source/name``.
        accelerator: the run's. history: collects the lens' maps.
    """

    def __init__(self, sources: Sequence[str], accelerator: Any, history: History | None = None):
        self._sources, self._accelerator, self._history = sources, accelerator, history
        # "train" or "eval" → name → [sum, count]
        self._sums: dict[str, dict[str, Tensor]] = {"train": {}, "eval": {}}
        self._lines_logged = 0

    def add(self, stats: dict[str, Tensor], batch: Batch, step: int) -> None:
        """A micro-batch of training, in optimiser step ``step`` (1 is the first)."""
        self._add("train", stats, batch)
        if self._history is not None and self._history.wants(step):
            self._history.add(stats)

    def add_evaluated(self, stats: dict[str, Tensor], batch: Batch, loss: Tensor) -> None:
        """A batch of evaluation; ``loss`` is a mean over its tokens."""
        self._add("eval", stats, batch)
        tokens = (batch.shifted != -100).sum()
        self._add_sum("eval", "loss", loss.detach() * tokens.clamp(min=1), tokens)

    def _add(self, mode: str, stats: dict[str, Tensor], batch: Batch) -> None:
        """``stats``: tensors of the shifted labels' shape, NaN where a token takes no part."""
        source = batch.columns.get(SOURCE_ID)
        tokens_of = {} if source is None else {name: source[:, 1:] == n for n, name in enumerate(self._sources)}
        for name, value in {**stats, _SFT_UPDATE: -torch.expm1(-stats["nll"])}.items():
            taking_part = ~torch.isnan(value)
            self._add_sum(mode, name, value.nansum(), taking_part.sum())
            for source_name, tokens in tokens_of.items():
                of_source = taking_part & tokens
                self._add_sum(mode, f"{source_name}/{name}", value.masked_fill(~of_source, 0).sum(), of_source.sum())

    def _add_sum(self, mode: str, name: str, total: Tensor, count: Tensor) -> None:
        device = "cpu" if total.device.type == "mps" else total.device  # MPS has no float64
        pair = torch.stack([number.to(device).double() for number in (total, count)])
        self._sums[mode][name] = self._sums[mode].get(name, 0) + pair

    def begin_evaluation(self) -> None:
        self._sums["eval"] = {}

    def read(self, mode: str) -> dict[str, float]:
        """Token-weighted means of "train" or "eval" over all processes, with the number of tokens, and start again."""
        sums, self._sums[mode] = self._sums[mode], {}
        if not sums:
            return {}
        reduced = self._accelerator.reduce(torch.stack([*sums.values()]), reduction="sum").tolist()
        pairs = dict(zip(sums, reduced, strict=True))
        means = {name: total / count for name, (total, count) in pairs.items() if count > 0}
        for prefix in ("", *(f"{source}/" for source in self._sources)):
            if f"{prefix}nll" in pairs:
                means[f"{prefix}supervised_tokens"] = pairs[f"{prefix}nll"][1]
            sft_update = means.pop(prefix + _SFT_UPDATE, 0.0)
            if sft_update > 0 and f"{prefix}update" in means:
                means[f"{prefix}update_vs_sft"] = means[f"{prefix}update"] / sft_update
        return means

    def add_to_log(self, trainer: QTargetTrainer, logs: dict[str, float]) -> None:
        """A line of training: means since the last one, and the scheduled numbers of the step just done.

        Nothing was added before the summary at the end of training, which stays as it is.
        """
        if not (means := self.read("train")):
            return
        logs.update(means, **trainer.objective.values(max(trainer.state.global_step - 1, 0), trainer.total_steps))
        share, rate = logs.get("update_vs_sft"), logs.get("learning_rate")
        if share is not None and share > _NOTHING and rate and self._lines_logged < _LINES_WITH_MATCHING_RATE:
            logs["lr_to_match_sft"] = rate / share
            self._lines_logged += 1
            if self._lines_logged == 1 and abs(share - 1) > 1e-3:
                trainer.accelerator.print(
                    f"the update is {share:.3g} of plain SFT's on the same tokens (update_vs_sft). This asks for no "
                    "other learning rate under Adam, which divides a constant factor out; only plain SGD would need "
                    f"{rate / share:.3g} for the same step (lr_to_match_sft)"
                )

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
