"""``examples/trainers/lightning_module.py`` in Lightning, beside ``QTargetTrainer``; writes hosts.json.

It runs in an environment of Lightning's own, on a CPU, with a model made here:

    python -m venv build/lightning
    build/lightning/bin/pip install torch==2.13.0 lightning==2.6.6 transformers==5.23.0 trl==1.16.0 accelerate==1.15.0 \
        datasets==5.2.0
    PYTHONPATH=src:tests/helpers build/lightning/bin/python benchmarks/hosts/lightning_trainer.py

Lightning has no dft of its own: that run is held against ``QTargetTrainer`` with the same rows in the same order. Sft is
held against a plain module, which trains the model's own loss.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import lightning
import torch
from common import Steps, record, steps_of

import qtarget as qt
from quick_runs import largest_difference
from trainer_scripts import by_our_trainer, change_by_script, rows_in_order, run_script, write_inputs

PACKAGES = ("lightning", "torch", "transformers", "trl", "accelerate", "datasets")
ROWS = 12  # three steps of the script's four
OURS = {"train_sampling_strategy": "sequential"}  # QTargetTrainer: the order is that of the rows
SCHEDULE = {"preset": "beyond-log", "alpha": {"schedule": "linear", "from": 0.5, "to": 1.5}}


class Watch(lightning.Callback):
    """The loss of each batch, the gradient norm of each step, and what was logged last."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.logged: list[str] = []

    @property
    def steps(self) -> Steps:
        return [{"loss": a, "grad_norm": b} for a, b in zip(self.losses, self.norms, strict=True)]

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        self.norms.append(float(torch.nn.utils.get_total_norm(gradients)))

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))
        self.logged = sorted(trainer.logged_metrics)


def run(folder: Path, target: Any, **more: Any) -> Watch:
    """The script as it stands, watched, with more settings of Lightning's trainer."""
    watch, trainer = Watch(), lightning.Trainer
    with mock.patch.object(lightning, "Trainer", lambda **settings: trainer(callbacks=[watch], **settings, **more)):
        run_script("lightning_module.py", folder, repr(target))
    return watch


def plain(folder: Path) -> Steps:
    """The script without its line: the model's own loss."""
    figures = mock.Mock(figures=lambda: {})
    with mock.patch.multiple(qt, apply_target=lambda model, target: model, applied_to=lambda model: figures):
        return run(folder, "none").steps


def accumulated(folder: Path) -> float:
    """Weights after two micro-batches a step, which Lightning averages, against ``denominator: micro_batch``."""
    folder.mkdir()
    write_inputs(folder, 2 * ROWS)
    run(folder, "dft", accumulate_grad_batches=2)
    micro_batches = {"per_device_train_batch_size": 4, "denominator": "micro_batch", "target": "dft"}
    _, wanted = by_our_trainer(folder, rows_in_order(2 * ROWS), **OURS, **micro_batches)
    return largest_difference(change_by_script(folder), wanted)[0]


def main() -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_inputs(folder, ROWS)
        steps: dict[str, dict[str, Steps]] = {}
        weights = {"accumulation, each micro-batch's own mean": accumulated(folder / "accumulated")}
        for name, target in (("dft", "dft"), ("schedule", SCHEDULE)):
            watch = run(folder, target)
            change = change_by_script(folder)
            trainer, wanted = by_our_trainer(folder, rows_in_order(ROWS), target=target, **OURS)
            steps[name] = {"QTargetTrainer": steps_of(trainer.state.log_history), "ours": watch.steps}
            weights[name] = largest_difference(change, wanted)[0]
        steps["sft"] = {"own": plain(folder), "ours": run(folder, "sft").steps}
    record("Lightning", PACKAGES, steps, weights_against_QTargetTrainer=weights, logged=watch.logged)


if __name__ == "__main__":
    main()
